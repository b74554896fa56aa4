"""batch="independent": every sample has its own time, step size and accept decision.

The rows stay in whole blocks, in which the kernels of float32 round a row alike whatever the batch:
a sample's result depends on no other sample, to the last bit (in float64 some matrix products
round by the position of a row). A sample that is done stays as padding, with steps of size zero,
until whole blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.errors import SolverError
from cnf.functional import plain
from cnf.ode.control import MAX_REJECTIONS, Tolerance, first_step
from cnf.ode.failure import Failure, largest
from cnf.ode.rhs import Derivative
from cnf.ode.solve import Integral, slopes_of
from cnf.ode.solver import Solver
from cnf.ode.stats import SolveStats
from cnf.ode.step import Clock, runge_kutta_step, time_dtype
from cnf.ode.stepper import Step, Stepper

__all__ = ["block_rows", "integrate_independently"]

_BLOCK = 32  # two vectors of 16, the most that a kernel takes at a time


def block_rows(n: int, device: torch.device) -> Tensor:
    """The rows of a batch of n, the last one repeated to whole blocks: indices (N,)."""
    return torch.arange(-(-n // _BLOCK) * _BLOCK, device=device).clamp(max=n - 1)


@dataclass
class _Rows:
    """The samples under way, one row each.

    Attributes:
        stepper: takes their steps.
        number: which sample each row is (N,).
        live: whether it still moves (N,).
        t: its time (N,), float64.
        h: the size of its next step (N,), float64.
        x: its state (N, *event).
        q: its quadratures (N, n), or None.
        first: the derivative at t, or None where it has to be evaluated.
        error: the error of its last accepted step (N,), for the controller.
        tried: the error of its last try (N,).
        rejections: refused steps in a row (N,).
    """

    stepper: Stepper
    number: Tensor
    live: Tensor
    t: Tensor
    h: Tensor
    x: Tensor
    q: Tensor | None
    first: Derivative | None
    error: Tensor
    tried: Tensor
    rejections: Tensor

    def keep(self, index: Tensor) -> None:
        """Only the rows of an index (N,)."""
        self.stepper = self.stepper.rows(index)
        for name in ("number", "live", "t", "h", "x", "error", "tried", "rejections"):
            setattr(self, name, getattr(self, name)[index])
        self.q = None if self.q is None else self.q[index]
        if self.first is not None:
            dx, dq = self.first
            self.first = (dx[index], None if dq is None else dq[index])


def integrate_independently(
    stepper: Stepper,
    x: Tensor,
    clock: Clock,
    solver: Solver,
    tolerance: Tolerance,
    samples: int,
) -> Integral:
    """Integrate each row of x (N, *event) by steps of its own.

    Args:
        stepper: takes the steps.
        x: initial states, in whole blocks (see `block_rows`).
        clock: the span.
        solver: the choices.
        tolerance: the error norm.
        samples: number of rows that are samples; the others are padding.

    Returns:
        The ends; NaN for a sample that failed, with solver.on_failure "nan".

    Raises:
        SolverError: with the cause, with solver.on_failure "raise".
    """
    solve = _IndependentSolve(stepper, clock, solver, tolerance, samples)
    return solve.run(x)


class _IndependentSolve:
    def __init__(
        self, stepper: Stepper, clock: Clock, solver: Solver, tolerance: Tolerance, samples: int
    ) -> None:
        self.stepper = stepper
        self.clock = clock
        self.solver = solver
        self.tolerance = tolerance
        self.samples = samples
        self.order = solver.tableau.order
        self.done: list[tuple[Tensor, Tensor, Tensor | None]] = []  # number, x, q
        self.steps: list[Tensor] = []  # whether each round accepted and refused any

    def run(self, x: Tensor) -> Integral:
        f = self.stepper.f
        rows = self._start(x)
        self._failure = Failure(
            "max_steps", self.solver.max_steps, f.stats, largest(x), f.batch_dims, self.tolerance
        )
        for _ in range(self.solver.max_steps):
            self._round(rows)
            if not bool(rows.live.any()):
                break
            self._drop(rows)
        else:
            t_next = rows.t + self._signed(rows.h)
            self._fail(rows, rows.live, "too_many_steps", t_next, rows.tried)
        f.stats.status = "converged"
        return self._gathered(x)

    def _signed(self, h: Tensor) -> Tensor:
        return h if self.clock.end > self.clock.start else -h

    def _start(self, x: Tensor) -> _Rows:
        n = len(x)
        t = torch.full((n,), self.clock.start, dtype=time_dtype(x), device=x.device)
        first = self.stepper.evaluate(self.clock.times([t], x)[0], x)
        span = abs(self.clock.end - self.clock.start)
        if self.solver.first_step is not None:
            h = torch.full_like(t, min(self.solver.first_step, span))
        else:
            f, start, end = self.stepper.evaluate, self.clock.start, self.clock.end
            dx = first[0].detach()
            h = first_step(f, self.order, start, end, self.tolerance, x, dx, shared=False)
            h = h.detach().to(t).nan_to_num(1e-6 * span)  # not finite: the first step will tell why
        return _Rows(
            stepper=self.stepper,
            number=torch.arange(n, device=x.device),
            live=torch.ones_like(t, dtype=torch.bool),
            t=t,
            h=h,
            x=x,
            q=None,
            first=first,
            error=torch.ones_like(t),
            tried=torch.zeros_like(t),
            rejections=torch.zeros_like(t, dtype=torch.long),
        )

    def _round(self, rows: _Rows) -> None:
        """One step of every live row, taken back where its error is too large."""
        end = self.clock.end
        landing = rows.h >= (end - rows.t).abs() * (1 - 1e-10)
        t_next = torch.where(landing, end, rows.t + self._signed(rows.h))
        t_next = torch.where(rows.live, t_next, rows.t)
        if rows.first is None:
            times = self.clock.times([rows.t], rows.x)
            rows.first = rows.stepper.evaluate(times[0], rows.x)
        step = rows.stepper(self.clock, rows.t, t_next, rows.x, rows.q, rows.first)
        error = (rows.t if step.error is None else step.error.detach()).to(rows.t)
        good = rows.live & (error <= 1.0)
        refused = rows.live & ~good
        if bool(refused.any()):
            step = self._only_good(rows, t_next, good, refused, step)
        finished = good & landing
        self._control(rows, t_next, error, good, refused, step)
        if bool(finished.any()):
            self._finish(rows, finished)
        tiny = 4 * torch.finfo(rows.t.dtype).eps * max(abs(self.clock.start), abs(end))
        stuck = refused & ((rows.rejections >= MAX_REJECTIONS) | (rows.h < tiny))
        if bool(stuck.any()):
            self._fail(rows, stuck, "step_underflow", t_next, error)

    def _only_good(
        self, rows: _Rows, t_next: Tensor, good: Tensor, refused: Tensor, step: Step
    ) -> Step:
        """The step with refused rows left where they were."""
        if torch.is_grad_enabled():
            # A refused try may hold infinite derivatives, and even zero times those is NaN.
            t_next = torch.where(good, t_next, rows.t)
            step = rows.stepper(self.clock, rows.t, t_next, rows.x, rows.q, rows.first)
        last = step.last
        if last is not None and rows.first is not None:
            last = (
                _where(refused, rows.first[0], last[0]),
                None if last[1] is None else _where(refused, rows.first[1], last[1]),
            )
        dq = None if step.dq is None else _where(refused, torch.zeros_like(step.dq), step.dq)
        if last is None and not bool(good.any()):
            last = rows.first
        return Step(_where(refused, rows.x, step.x), dq, last, step.error)

    def _control(
        self,
        rows: _Rows,
        t_next: Tensor,
        error: Tensor,
        good: Tensor,
        refused: Tensor,
        step: Step,
    ) -> None:
        """The state after the round, and each row's next step size (see `Controller`)."""
        p = self.order
        clamped = error.clamp(min=1e-10)
        grow = 0.9 * clamped ** (-0.85 / p) * rows.error ** (0.2 / p)
        limit = torch.where(rows.rejections > 0, 1.0, 10.0)
        grow = torch.minimum(grow.clamp(min=0.2), limit)
        shrink = (0.9 * clamped ** (-1.0 / p)).nan_to_num(0.2).clamp(0.2, 0.9)
        h = (t_next - rows.t).abs() * torch.where(good, grow, shrink)
        rows.h = torch.where(rows.live, h, rows.h)
        rows.error = torch.where(good, error.clamp(min=1e-4), rows.error)
        rows.tried = error
        rows.rejections = torch.where(refused, rows.rejections + 1, 0)
        rows.t = torch.where(good, t_next, rows.t)
        rows.x, rows.first = step.x, step.last
        rows.q = step.dq if rows.q is None or step.dq is None else rows.q + step.dq
        self.steps.append(torch.stack((good, refused)).any(-1))

    def _finish(self, rows: _Rows, finished: Tensor) -> None:
        """Put the finished rows aside, checked."""
        x, q = rows.x[finished], None if rows.q is None else rows.q[finished]
        bad = ~x.detach().isfinite().unsqueeze(-1).flatten(1).all(-1)
        if q is not None:
            bad |= ~q.detach().isfinite().all(-1)
        if bool(bad.any()):
            failed = finished.clone()
            failed[finished] = bad
            self._fail(rows, failed, "blow_up", rows.t, None)
            finished = finished & ~failed
            x, q = x[~bad], None if q is None else q[~bad]
        self.done.append((rows.number[finished], x, q))
        rows.live = rows.live & ~finished

    def _drop(self, rows: _Rows) -> None:
        """Leave out rows that are done, where whole blocks of them can go."""
        live = rows.live.nonzero().squeeze(-1)
        blocks = -(-len(live) // _BLOCK) * _BLOCK
        if blocks < len(rows.live):
            idle = (~rows.live).nonzero().squeeze(-1)
            rows.keep(torch.cat((live, idle[: blocks - len(live)])))

    def _fail(
        self, rows: _Rows, failed: Tensor, status: str, t_next: Tensor, error: Tensor | None
    ) -> None:
        """Raise for the rows that failed, or leave them out as NaN."""
        index = failed.nonzero().squeeze(-1)
        rows.live = rows.live & ~failed
        real = index[rows.number[index] < self.samples]
        if len(real) == 0:
            return
        if self.solver.on_failure == "raise":
            raise self._explained(rows, real, status, t_next, error)

    @torch.no_grad()
    def _explained(
        self, rows: _Rows, index: Tensor, status: str, t_next: Tensor, error: Tensor | None
    ) -> SolverError:
        """The error of some rows, from their steps repeated uncounted."""
        block = index[block_rows(len(index), index.device)]
        f = rows.stepper.f.rows(block).counting(SolveStats("scratch", "", 0.0, 0.0))
        x, t, after = rows.x[block].detach(), rows.t[block], t_next[block]
        stages = runge_kutta_step(f, rows.stepper.method, self.clock.values, t, after, x, None)
        n = len(index)
        return self._failure.error(
            status,
            float(t[0]),
            float(after[0] - t[0]),
            x[:n],
            [k[:n] for k in slopes_of(rows.stepper, stages)],
            None if error is None else error[index],
            rows.number[index],
            self.samples,
        )

    def _gathered(self, x: Tensor) -> Integral:
        """The ends in the order of the samples, NaN where one failed."""
        f = self.stepper.f
        accepted, rejected = plain(torch.stack(self.steps).sum(0)).tolist()
        f.stats.accepted, f.stats.rejected = accepted, rejected
        if not self.done:
            return Integral(torch.full_like(x, torch.nan), None)
        number = torch.cat([n for n, _, _ in self.done])
        end = torch.full_like(x, torch.nan).index_copy(
            0, number, torch.cat([x for _, x, _ in self.done])
        )
        parts = [q for _, _, q in self.done if q is not None]
        if not parts:
            return Integral(end, None)
        q = parts[0].new_full((len(x), parts[0].shape[-1]), torch.nan)
        return Integral(end, q.index_copy(0, number, torch.cat(parts)))


def _where(mask: Tensor, yes: Tensor | None, no: Tensor) -> Tensor:
    """torch.where by rows."""
    if yes is None:
        return no
    return torch.where(mask.reshape(-1, *[1] * (no.ndim - 1)), yes, no)
