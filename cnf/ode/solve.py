"""`odeint`: the solve itself, over a state and quadratures, by fixed or adaptive steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.ode.control import Controller, Tolerance, first_step
from cnf.ode.failure import Failure, largest
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.solver import Solver
from cnf.ode.step import Clock, Step, runge_kutta_step

__all__ = ["Integral", "Stepper", "integrate"]

_MAX_REJECTIONS = 20  # in a row: at the smallest factor, a step 1e-14 of the first try

Stepper = Callable[[Clock, float, float, Tensor, "Derivative | None"], Step]
"""(clock, t, t_next, x, f(t, x) if known) -> the step; plain, or one that recomputes."""


@dataclass(frozen=True)
class Integral:
    """The end of a solve: the state and the quadratures, (*batch, n) or None."""

    x: Tensor
    q: Tensor | None


def integrate(
    f: RightHandSide,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    *,
    batch_dims: int,
    controlled: int | None,
    stepper: Stepper | None = None,
    first: Derivative | None = None,
) -> Integral:
    """Integrate dx/dt = f(t, x) and its quadratures from clock.start to clock.end.

    Args:
        f: right-hand side, which counts and checks.
        x: initial state (*batch, *event).
        clock: the span.
        solver: the choices.
        batch_dims: leading dimensions of x that index samples.
        controlled: number of quadratures in the error norm; None for all of them.
        stepper: how a step is computed; None keeps the graph.
        first: f at the start, where it is known already.

    Raises:
        SolverError: with the cause.
    """
    if stepper is None:

        def stepper(
            clock: Clock, t: float, t_next: float, x: Tensor, first: Derivative | None
        ) -> Step:
            return runge_kutta_step(f, solver.tableau, clock, t, t_next, x, first)

    failure = Failure("max_steps", solver.max_steps, f.stats, largest(x), batch_dims)
    if clock.start == clock.end or not solver.tableau.adaptive:
        result = _fixed(f, x, clock, solver, failure, stepper, first)
    else:
        tolerance = _tolerance(solver, x, batch_dims, controlled)
        result = _adaptive(f, x, clock, solver, failure, stepper, tolerance, first)
    f.stats.status = "converged"
    return result


def _add(q: Tensor | None, dq: Tensor | None) -> Tensor | None:
    return dq if q is None or dq is None else q + dq


def _fixed(
    f: RightHandSide,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    stepper: Stepper,
    first: Derivative | None,
) -> Integral:
    """Equal steps. Where start and end agree, one step of size 0: the identity, with gradients."""
    steps = 1 if clock.start == clock.end else solver.steps
    grid = [clock.start + (clock.end - clock.start) * i / steps for i in range(steps)]
    begin, q, last = x, None, first
    for t, t_next in zip(grid, [*grid[1:], clock.end], strict=True):
        step = stepper(clock, t, t_next, x, last)
        x, q, last = step.x, _add(q, step.dq), step.last
        f.stats.accepted += 1
    if not _finite(x, q):
        _locate(f, begin, clock, solver, failure)
    return Integral(x, q)


def _finite(x: Tensor, q: Tensor | None) -> bool:
    finite = x.detach().isfinite().all()
    return bool(finite if q is None else finite & q.detach().isfinite().all())


def _slopes(f: RightHandSide, step: Step) -> list[Tensor]:
    """What the field returned at every stage, where it belongs to samples."""
    return step.slopes + step.rates if f.per_sample else step.slopes


@torch.no_grad()
def _locate(f: RightHandSide, x: Tensor, clock: Clock, solver: Solver, failure: Failure) -> None:
    """Repeat a failed solve with fixed steps, to name the step at which it failed, and raise."""
    steps = 1 if clock.start == clock.end else solver.steps
    t = clock.start
    for i in range(1, steps + 1):
        t_next = clock.start + (clock.end - clock.start) * i / steps
        step = runge_kutta_step(f, solver.tableau, clock, t, t_next, x, None)
        if not _finite(step.x, step.dq):
            break
        t, x = t_next, step.x
    slopes = _slopes(f, step)
    where = step.x if all(bool(k.isfinite().all()) for k in slopes) else x
    raise failure.error("step_underflow", t, t_next - t, where, slopes)


def _tolerance(solver: Solver, x: Tensor, batch_dims: int, controlled: int | None) -> Tolerance:
    """The tolerances, not below what the dtype resolves."""
    floor = 4 * torch.finfo(x.dtype).eps
    rtol = solver.rtol
    if 0 < rtol < floor:
        warnings.warn(
            f"rtol={rtol:g} is below the resolution of {x.dtype}; {floor:.2g} is used. "
            "Use float64 for a tighter solve.",
            RuntimeWarning,
            stacklevel=2,
        )
        rtol = floor
    if solver.error_control == "state":
        controlled = 0
    return Tolerance(rtol, solver.atol, batch_dims, controlled)


def _adaptive(
    f: RightHandSide,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    stepper: Stepper,
    tolerance: Tolerance,
    first: Derivative | None,
) -> Integral:
    """Steps as large as the tolerance allows; the last one lands on the end exactly."""
    method, stats = solver.tableau, f.stats
    t, end, q = clock.start, clock.end, None
    sign = 1.0 if end > t else -1.0
    first = f(clock.times([t], x)[0], x) if first is None else first
    h = _first_step(f, x, clock, solver, failure, tolerance, first[0])
    control = Controller(method.order)
    for _ in range(solver.max_steps):
        landing = h >= abs(end - t) * (1 - 1e-10)
        t_next = end if landing else t + sign * h
        if t_next == t:
            raise failure.error("step_underflow", t, h, x, [])
        step = stepper(clock, t, t_next, x, first)
        errors = tolerance.error(method, x, q, step, t_next - t)
        error = errors.max().item() if errors.numel() else 0.0
        if error <= 1.0:
            stats.accepted += 1
            h = abs(t_next - t) * control.after_acceptance(error)
            t, x, q, first = t_next, step.x, _add(q, step.dq), step.last
            if landing:
                break
            continue
        stats.rejected += 1
        h = abs(t_next - t) * control.after_rejection(error)
        first = (step.slopes[0], step.rates[0] if step.rates else None)
        tiny = 4 * math.ulp(max(abs(t), abs(end)))
        if control.rejections >= _MAX_REJECTIONS or h < tiny:
            raise failure.error("step_underflow", t, t_next - t, x, _slopes(f, step), errors)
    else:
        raise failure.error("too_many_steps", t, h, x, _slopes(f, step), errors)
    if not _finite(x, q):
        raise failure.error("blow_up", t, h, x, [q] if q is not None and f.per_sample else [])
    return Integral(x, q)


def _first_step(
    f: RightHandSide,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    tolerance: Tolerance,
    dx: Tensor,
) -> float:
    span = abs(clock.end - clock.start)
    if solver.first_step is not None:
        return min(solver.first_step, span)
    h = first_step(f, solver.tableau.order, clock, tolerance, x, dx)
    if not math.isnan(h):
        return h
    if not bool(dx.isfinite().all()):
        raise failure.error("non_finite_field", clock.start, 0.0, x, [dx])
    return 1e-6 * span  # a field so large that its norm overflows
