"""The solve itself, over a state and quadratures, by fixed or adaptive steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cnf.checks import exporting
from cnf.functional import plain
from cnf.ode.control import MAX_REJECTIONS, Controller, Tolerance
from cnf.ode.failure import Failure, largest
from cnf.ode.rhs import Derivative
from cnf.ode.solver import Solver
from cnf.ode.stats import SolveStats
from cnf.ode.step import Clock, Stages, runge_kutta_step
from cnf.ode.stepper import Stepper
from cnf.warn import warn

__all__ = ["Integral", "all_finite", "integrate", "slopes_of", "tolerance_of"]


@dataclass(frozen=True)
class Integral:
    """The end of a solve: the state and the quadratures, (*batch, n) or None."""

    x: Tensor
    q: Tensor | None


def integrate(
    stepper: Stepper,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    tolerance: Tolerance | None,
    first: Derivative | None = None,
) -> Integral:
    """Integrate dx/dt = f(t, x) and its quadratures from clock.start to clock.end.

    Args:
        stepper: takes the steps, with the right-hand side that it holds.
        x: initial state (*batch, *event).
        clock: the span.
        solver: the choices.
        tolerance: the error norm; None for fixed steps.
        first: f at the start, where it is known already.

    Raises:
        SolverError: with the cause.
    """
    f = stepper.f
    failure = Failure("max_steps", solver.max_steps, f.stats, largest(x), f.batch_dims, tolerance)
    if tolerance is None:
        result = _fixed(stepper, x, clock, solver, failure, first)
    else:
        result = _adaptive(stepper, x, clock, solver, failure, first)
    f.stats.status = "converged"
    return result


def tolerance_of(
    solver: Solver, x: Tensor, batch_dims: int, controlled: int | None, *, quiet: bool = False
) -> Tolerance | None:
    """The error norm, not below what the dtype resolves; None for a method of fixed steps."""
    if not solver.adaptive:
        return None
    info = torch.finfo(x.dtype)
    floor = 4 * info.eps
    rtol = solver.rtol
    if 0 < rtol < floor:
        if not quiet:
            warn(
                f"rtol={rtol:g} is below the resolution of {x.dtype}; {floor:.2g} is used. "
                "Use float64 for a tighter solve."
            )
        rtol = floor
    if solver.error_control == "state":
        controlled = 0
    return Tolerance(rtol, max(solver.atol, info.tiny), batch_dims, controlled)


def all_finite(x: Tensor, q: Tensor | None) -> bool:
    """Whether a state and its quadratures are finite."""
    finite = x.detach().isfinite().all()
    return bool(plain(finite if q is None else finite & q.detach().isfinite().all()).all())


def slopes_of(stepper: Stepper, stages: Stages) -> list[Tensor]:
    """What the field returned at every stage, where it belongs to samples."""
    return stages.slopes + stages.rates if stepper.f.per_sample else stages.slopes


def _add(q: Tensor | None, dq: Tensor | None) -> Tensor | None:
    return dq if q is None or dq is None else q + dq


def _fixed(
    stepper: Stepper,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    first: Derivative | None,
) -> Integral:
    """Equal steps. Where start and end agree, one step of size 0: the identity, with gradients."""
    grid = _grid(clock, solver)
    begin, q, last = x, None, first
    for t, t_next in pairwise(grid):
        step = stepper(clock, t, t_next, x, q, last)
        x, q, last = step.x, _add(q, step.dq), step.last
        stepper.f.stats.accepted += 1
    if not exporting() and not all_finite(x, q):
        if solver.on_failure == "nan":
            return _spoiled(x, q)
        _locate(stepper, begin, clock, grid, failure)
    return Integral(x, q)


def _spoiled(x: Tensor, q: Tensor | None) -> Integral:
    """The ends, all NaN for a sample of which a part is not finite; x (B, *event), q (B, n)."""
    bad = ~x.detach().isfinite().unsqueeze(-1).flatten(1).all(-1)
    if q is not None:
        bad |= ~q.detach().isfinite().all(-1)
        q = q.masked_fill(bad.unsqueeze(-1), torch.nan)
    return Integral(x.masked_fill(bad.reshape(-1, *[1] * (x.ndim - 1)), torch.nan), q)


def _grid(clock: Clock, solver: Solver) -> list[float]:
    steps = 1 if clock.start == clock.end else solver.steps
    span = clock.end - clock.start
    return [*(clock.start + span * i / steps for i in range(steps)), clock.end]


def _locate(stepper: Stepper, x: Tensor, clock: Clock, grid: list[float], failure: Failure) -> None:
    """Repeat a failed solve with fixed steps, to name the step at which it failed, and raise."""
    for t, t_next in pairwise(grid):
        stages = _repeat(stepper, clock, t, t_next, x)
        slopes = slopes_of(stepper, stages)
        good = all(all_finite(k, None) for k in slopes)
        if not good or not all_finite(stages.x, None):
            raise failure.error("step_underflow", t, t_next - t, stages.x if good else x, slopes)
        x = stages.x
    raise failure.error("blow_up", t, t_next - t, x, slopes)  # quadratures that overflow in sum


@torch.no_grad()
def _repeat(stepper: Stepper, clock: Clock, t: float, t_next: float, x: Tensor) -> Stages:
    """A step once more, eagerly and uncounted, for what its stages show."""
    f = stepper.f.counting(SolveStats("scratch", "", t, t_next))
    return runge_kutta_step(f, stepper.method, clock, t, t_next, x.detach(), None)


def _adaptive(
    stepper: Stepper,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    first: Derivative | None,
) -> Integral:
    """Steps as large as the tolerance allows; the last one lands on the end exactly.

    Under `torch.func.vmap` all samples take the steps that the worst of them needs, as in a batch.
    """
    stats = stepper.f.stats
    t, end, q = clock.start, clock.end, None
    sign = 1.0 if end > t else -1.0
    control = Controller(solver.tableau.order)

    def explained(status: str, t_next: float, errors: Tensor | None = None) -> Exception:
        slopes = slopes_of(stepper, _repeat(stepper, clock, t, t_next, x))
        return failure.error(status, t, t_next - t, x, slopes, errors)

    first, h = _started(stepper, x, clock, solver, failure, first)
    for _ in range(solver.max_steps):
        landing = h >= abs(end - t) * (1 - 1e-10)
        t_next = end if landing else t + sign * h
        if t_next == t:
            raise explained("step_underflow", t_next)
        if first is None:
            first = stepper.evaluate(clock.times([t], x)[0], x)
        step = stepper(clock, t, t_next, x, q, first)
        errors = step.error
        error = plain(errors).max().item() if errors is not None and errors.numel() else 0.0
        if error <= 1.0:
            stats.accepted += 1
            h = abs(t_next - t) * control.after_acceptance(error)
            t, x, q, first = t_next, step.x, _add(q, step.dq), step.last
            if landing:
                stats.next_step = h
                break
            continue
        stats.rejected += 1
        h = abs(t_next - t) * control.after_rejection(error)
        tiny = 4 * math.ulp(max(abs(t), abs(end)))
        if control.rejections >= MAX_REJECTIONS or h < tiny:
            raise explained("step_underflow", t_next, errors)
    else:
        raise explained("too_many_steps", t_next, errors)
    if not all_finite(x, q):
        slopes = [q] if q is not None and stepper.f.per_sample else []
        raise failure.error("blow_up", t, h, x, slopes)
    return Integral(x, q)


def _started(
    stepper: Stepper,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    failure: Failure,
    first: Derivative | None,
) -> tuple[Derivative, float]:
    """f at the start, and the size of the first step."""
    span = abs(clock.end - clock.start)
    if solver.first_step is not None:
        if first is None:
            first = stepper.evaluate(clock.times([clock.start], x)[0], x)
        return first, min(solver.first_step, span)
    first, size = stepper.start(clock, x, solver.tableau.order, first)
    h = plain(size).min().item()
    if not math.isnan(h):
        return first, min(h, span)
    if not all_finite(first[0], None):
        raise failure.error("non_finite_field", clock.start, 0.0, x, [first[0]])
    return first, 1e-6 * span  # a field so large that its norm overflows
