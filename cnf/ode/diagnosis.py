"""Fields and settings that no solver can be right with: found before the solve, and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnf.ode.rhs import Function
from cnf.ode.solver import Solver
from cnf.ode.torchdiffeq import TorchDiffEq
from cnf.user_modules import drew, random_states, refuse_unfit
from cnf.warn import warn

__all__ = [
    "check_modules",
    "check_precision",
    "exportable",
    "refuse_other_values",
    "refuse_randomness",
]

_TF32_RESOLUTION = 2.0**-10


def check_modules(f: Function) -> None:
    """Refuse a field with modules that are random, or mix samples, as they stand.

    Raises:
        ValueError: naming the module.
    """
    module = f if isinstance(f, nn.Module) else getattr(f, "field", None)
    if isinstance(module, nn.Module):
        refuse_unfit(module, "vector field", _REMEDY)


_REMEDY = (
    "the field is then no function of (t, x) alone: use field.eval(), leave the module out "
    "(nn.LayerNorm normalizes each sample by itself), or put Solver(check_field=False)"
)


@contextmanager
def refuse_randomness(x: Tensor) -> Iterator[None]:
    """Refuse an evaluation of the field that draws from torch's global random numbers.

    Raises:
        ValueError: if it did.
    """
    before = random_states(x)
    yield
    if drew(before, x):
        raise ValueError(
            "the vector field drew random numbers (dropout, noise), so it is not a function of "
            "(t, x) and the solve has no solution; draw them once outside and pass them as "
            "context, use field.eval(), or put Solver(check_field=False)"
        )


@torch.no_grad()
def refuse_other_values(
    again: Tensor, before: Tensor, choice: str, batch_dims: int, start: Tensor | None = None
) -> None:
    """Refuse a field that gave something else when it was evaluated once more, at the same point.

    Args:
        again: what the backward pass found, a derivative or the end of a step (*batch, *event).
        before: what the forward pass had found.
        choice: of the gradient, for the message.
        batch_dims: leading dimensions that index samples.
        start: of the step, (*batch, *event), where it is one.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if torch.equal(again, before) or before.numel() == 0:
        return

    def size(v: Tensor) -> Tensor:
        return v.abs().unsqueeze(-1).flatten(batch_dims).amax(-1)  # (*batch,)

    eps = torch.finfo(before.dtype).eps
    moved = before if start is None else before - start
    limit = max(1000 * eps, 30 * _resolution(before)) * size(moved) + 100 * eps * size(before)
    error = size(again - before)
    if bool((error > limit).any()):
        share = (error / size(moved)).nan_to_num(0.0, 0.0, 0.0).max().item()
        raise ValueError(
            f"gradient={choice!r} evaluated the vector field again at the same (t, x) and got "
            f"other values, by {share:.1g} of their size: it is not a function of (t, x) alone, "
            "and the gradient would not be that of the solve. Take out what changes between calls "
            "(a counter, the clock, NumPy's random numbers or a generator of its own, a buffer "
            "that forward updates, spectral_norm in train()), use field.eval() or "
            "gradient='backprop', or put Solver(check_field=False)"
        )


def _resolution(x: Tensor) -> float:
    """What a field computes in, where that may be coarser than the dtype of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    return _TF32_RESOLUTION if x.is_cuda and x.dtype == torch.float32 else 0.0


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
