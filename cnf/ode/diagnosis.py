"""Fields and settings that no solver can be right with: found before the solve, and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cnf.ode.rhs import Function
from cnf.ode.solver import Solver
from cnf.ode.torchdiffeq import TorchDiffEq
from cnf.warn import warn

__all__ = ["check_modules", "check_precision", "exportable", "refuse_randomness"]

_TF32_RESOLUTION = 2.0**-10


def check_modules(f: Function) -> None:
    """Refuse a field with modules that are random, or mix samples, as they stand.

    Raises:
        ValueError: naming the module.
    """
    module = f if isinstance(f, nn.Module) else getattr(f, "field", None)
    if not isinstance(module, nn.Module):
        return
    for name, part in module.named_modules():
        reason = _reason(part)
        if reason:
            path = f"{name!r} of the vector field ({type(part).__name__})"
            raise ValueError(
                f"the module {path} {reason}, so that the field is not a function of (t, x) alone; "
                "use field.eval(), leave it out, or put Solver(check_field=False)"
            )


def _reason(part: nn.Module) -> str:
    """Why a module does not belong in a field, or nothing."""
    if isinstance(part, _DropoutNd) and part.training and part.p > 0:
        return "drops at random in training mode"
    if isinstance(part, nn.MultiheadAttention) and part.training and part.dropout > 0:
        return "drops at random in training mode"
    if isinstance(part, nn.RReLU) and part.training:
        return "is random in training mode"
    if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
        return "normalises over the batch and so mixes samples"
    return ""


@contextmanager
def refuse_randomness(x: Tensor) -> Iterator[None]:
    """Refuse an evaluation of the field that draws from torch's global random numbers.

    Raises:
        ValueError: if it did.
    """
    before = _random_states(x)
    yield
    if not all(torch.equal(a, b) for a, b in zip(before, _random_states(x), strict=True)):
        raise ValueError(
            "the vector field drew random numbers (dropout, noise), so it is not a function of "
            "(t, x) and the solve has no solution; draw them once outside and pass them as "
            "context, use field.eval(), or put Solver(check_field=False)"
        )


def _random_states(x: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device))
    return states


def check_precision(solver: Solver | TorchDiffEq, x: Tensor) -> None:
    """Warn where the field is computed more coarsely than the tolerance asks."""
    if not solver.adaptive:
        return
    tolerance = max(solver.rtol, solver.atol)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        resolution, name = torch.finfo(dtype).eps, f"autocast to {dtype}"
        remedy = "leave the solve out of autocast"
    elif x.is_cuda and x.dtype == torch.float32 and _tf32():
        resolution, name = _TF32_RESOLUTION, "TF32 in matrix products"
        remedy = "use torch.set_float32_matmul_precision('highest')"
    else:
        return
    if tolerance < 30 * resolution:
        warn(
            f"{name} resolves {resolution:.1g}, too coarse for rtol={solver.rtol:g} and "
            f"atol={solver.atol:g}: the solver takes many small steps for errors that it cannot "
            f"remove; {remedy}, or use fixed steps or tolerances above {30 * resolution:.2g}"
        )


def exportable(solver: Solver | TorchDiffEq, times: Iterable[float | Tensor]) -> Solver:
    """The solver for torch.export: of what it computes alone, not of how.

    Raises:
        ValueError: steps or rows that depend on values, or times that are tensors.
    """
    if (
        isinstance(solver, TorchDiffEq)
        or solver.adaptive
        or (solver.batch, solver.on_failure) != ("shared", "raise")
    ):
        raise ValueError(
            "torch.export needs a solve whose steps depend on no values: use "
            "solver=cnf.Solver('rk4', steps=20), with batch='shared' and on_failure='raise'; "
            f"got solver={solver}"
        )
    if any(isinstance(t, Tensor) for t in times):
        raise ValueError(
            "torch.export needs times that are numbers, got tensors; export a copy of the CNF "
            "built with times=(float(t0), float(t1))"
        )
    return dataclasses.replace(solver, compile=False, gradient="backprop")


def _tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"
