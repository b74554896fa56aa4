"""`odeint`: solve an ODE over a state and quadratures, with the gradient that the solver names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from cnf.ode.adjoint import AdjointSolve
from cnf.ode.failure import samples_of
from cnf.ode.gradient import first_derivative
from cnf.ode.recompute import Recomputing
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.solve import integrate
from cnf.ode.solver import Solver
from cnf.ode.stats import SolveStats, active_recorders
from cnf.ode.step import Clock
from cnf.ode.torchdiffeq import TorchDiffEq

__all__ = ["Solution", "odeint"]


@dataclass(frozen=True)
class Solution:
    """The end of a solve.

    Attributes:
        x: the state at t1 (*batch, *event).
        quadratures: the integrals (*batch, n), or None if the function gave no integrands.
        stats: what the solve did.
    """

    x: Tensor
    quadratures: Tensor | None
    stats: SolveStats


def odeint(
    f: Callable[[Tensor, Tensor], Tensor | Derivative],
    x: Tensor,
    t0: float | Tensor,
    t1: float | Tensor,
    solver: Solver | TorchDiffEq | None = None,
    *,
    batch_dims: int = 1,
    controlled: int | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> Solution:
    """Solve dx/dt = f(t, x) from t0 to t1, and integrate quadratures along the path.

        x(t1) = x(t0) + int f(t, x) dt,    q = int g(t, x) dt

    Args:
        f: function or module (t, x) -> dx, or (dx, dq) with the integrands dq (*batch, n) of
            quantities that do not feed back into the state.
        x: state at t0 (*batch, *event), float32 or float64.
        t0: start time, a number or a tensor ().
        t1: end time; may lie before t0.
        solver: the choices; None for `Solver()`.
        batch_dims: leading dimensions of x that index samples.
        controlled: how many quadratures, from the first, are in the error norm; None for all.
        parameters: tensors that f depends on, which "checkpoint" and "adjoint" need to know;
            None for the parameters of f where it is a module.

    Raises:
        SolverError: if the solve cannot end; it tells the cause.
        TypeError: x is not a float32 or float64 tensor, or f returns something else.
        ValueError: x or a time is not finite, or the span is below the resolution of the dtype.

    Example:
        >>> solution = odeint(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        >>> round(solution.x.item(), 4), solution.stats.status
        (0.3679, 'converged')
    """
    solver = as_solver(solver)
    check_state(x, batch_dims)
    clock = _clock(t0, t1, x)
    if parameters is None:
        parameters = f.parameters() if isinstance(f, nn.Module) else ()
    known = list({id(p): p for p in parameters if p.requires_grad}.values())
    stats = SolveStats("forward", solver.method, clock.start, clock.end)
    recorders = active_recorders()
    for recorder in recorders:
        recorder.append(stats)
    rhs = RightHandSide(f, batch_dims, stats)
    x = x.clone()  # a field that writes into its argument must not reach the caller's tensor
    if isinstance(solver, TorchDiffEq):
        end = solver.integrate(rhs, x, clock, batch_dims, controlled, known, recorders)
        return Solution(end.x, end.q, stats)
    gradient = solver.gradient if torch.is_grad_enabled() else "backprop"
    if clock.start == clock.end:
        gradient = "backprop"  # a single step of size zero
    first = None if gradient == "backprop" else first_derivative(rhs, clock, x, known)
    if first is not None and gradient == "adjoint":
        adjoint = AdjointSolve(
            rhs,
            clock,
            solver,
            batch_dims=batch_dims,
            controlled=controlled,
            recorders=recorders,
            first=first,
        )
        end = adjoint(x, known)
    else:
        stepper = None if first is None else Recomputing(rhs, solver, known, recorders)
        end = integrate(
            rhs,
            x,
            clock,
            solver,
            batch_dims=batch_dims,
            controlled=controlled,
            stepper=stepper,
            first=first,
        )
    return Solution(end.x, end.q, stats)


def as_solver(solver: Solver | TorchDiffEq | None) -> Solver | TorchDiffEq:
    """The solver, or the default one for None.

    Raises:
        TypeError: anything else.
    """
    if solver is None:
        return Solver()
    if not isinstance(solver, (Solver, TorchDiffEq)):
        hint = f"; use cnf.Solver({solver!r})" if isinstance(solver, str) else ""
        raise TypeError(
            f"solver must be a cnf.Solver or cnf.TorchDiffEq, got {type(solver).__name__}{hint}"
        )
    return solver


def check_state(x: Tensor, batch_dims: int = 1) -> None:
    """Refuse a state that is not a finite float32 or float64 tensor."""
    check_floating(x)
    if x.ndim < batch_dims:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {batch_dims} batch dimensions")
    check_finite(x, batch_dims)


def check_floating(x: Tensor, name: str = "x") -> None:
    """Refuse what is not a float32 or float64 tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; use torch.as_tensor")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {str(x.dtype).removeprefix('torch.')}; "
            f"use {name}.float()"
        )


def check_finite(x: Tensor, batch_dims: int, name: str = "x") -> None:
    """Refuse a tensor with NaN or infinite values, naming the first sample that has one."""
    rows = ~x.detach().isfinite().unsqueeze(-1).flatten(batch_dims).all(-1)
    if rows.any():
        raise ValueError(
            f"non-finite values in {name}: {int(rows.sum())} of {rows.numel()} rows "
            f"(first index {samples_of(rows)[0]}); remove or repair them"
        )


def _clock(t0: float | Tensor, t1: float | Tensor, x: Tensor) -> Clock:
    times = []
    for name, t in (("t0", t0), ("t1", t1)):
        if isinstance(t, Tensor) and t.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor (), got shape {tuple(t.shape)}")
        if not isinstance(t, (Real, Tensor)):
            raise TypeError(f"{name} must be a number or a tensor (), got {type(t).__name__}")
        times.append(float(t.detach() if isinstance(t, Tensor) else t))
        if not math.isfinite(times[-1]):
            raise ValueError(f"{name} is {times[-1]}; times must be finite")
    start, end = times
    resolution = torch.finfo(x.dtype).eps * max(abs(start), abs(end))
    if start != end and abs(end - start) < 100 * resolution:
        raise ValueError(
            f"the span from t0={start!r} to t1={end!r} is below the resolution of time in "
            f"{x.dtype}; shift the times towards zero or use float64"
        )
    if not (
        torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (t0, t1))
    ):
        return Clock(start, end)
    exact = [_as_tensor(t, x) for t in (t0, t1)]
    return Clock(start, end, *exact)


def _as_tensor(t: float | Tensor, x: Tensor) -> Tensor:
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.as_tensor(t, dtype=dtype, device=x.device).reshape(())
