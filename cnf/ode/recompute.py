"""gradient="checkpoint": keep one state a step, and compute each step once more in backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.ode.gradient import BackwardContext, backward_stats, refuse_double_backward, vjp
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.solver import Solver
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock, Step, runge_kutta_step

__all__ = ["Recomputing"]


class Recomputing:
    """A stepper that keeps only the state: backward computes each accepted step once more.

    Its gradient is that of backpropagation, bit for bit the same steps.
    """

    def __init__(
        self, f: RightHandSide, solver: Solver, parameters: Sequence[Tensor], recorders: Recorders
    ) -> None:
        self.f = f
        self.solver = solver
        self.parameters = parameters
        self.recorders = recorders
        self.own_stats: SolveStats | None = None

    def __call__(
        self, clock: Clock, t: float, t_next: float, x: Tensor, first: Derivative | None
    ) -> Step:
        """The step, whose x and dq carry a gradient while its stages do not."""
        task = _StepTask(self, clock.start, clock.end, t, t_next)
        task.first = first
        x, dq = _RecomputedStep.apply(task, x, clock.t0, clock.t1, *self.parameters)
        return task.release()._replace(x=x, dq=dq)

    def count(self) -> SolveStats:
        """The record of the backward pass, made when the first step of it runs."""
        if self.own_stats is None:
            self.own_stats = backward_stats(self.f.stats, self.recorders)
            self.own_stats.status = "converged"
        return self.own_stats


class _StepTask:
    """One step to take now and again in backward."""

    def __init__(
        self, stepper: Recomputing, start: float, end: float, t: float, t_next: float
    ) -> None:
        self.stepper = stepper
        self.start, self.end = start, end
        self.t, self.t_next = t, t_next
        self.first: Derivative | None = None
        self.done: list[Step] = []

    def release(self) -> Step:
        """The step just taken; nothing of it stays for backward."""
        self.first = None
        return self.done.pop()

    def run(
        self,
        f: RightHandSide,
        x: Tensor,
        times: tuple[Tensor | None, Tensor | None],
        first: Derivative | None,
    ) -> Step:
        clock = Clock(self.start, self.end, *times)
        method = self.stepper.solver.tableau
        return runge_kutta_step(f, method, clock, self.t, self.t_next, x, first)


class _RecomputedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: BackwardContext,
        task: _StepTask,
        x: Tensor,
        t0: Tensor | None,
        t1: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.task = task
        ctx.save_for_backward(x, t0, t1, *parameters)
        step = task.run(task.stepper.f, x, (t0, t1), task.first)
        task.done.append(step)
        return step.x, step.dq

    @staticmethod
    def backward(ctx: BackwardContext, gx: Tensor, gq: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("checkpoint")
        task: _StepTask = ctx.task
        x, t0, t1, *parameters = ctx.saved_tensors
        stats = task.stepper.count()
        stats.accepted += 1
        f = task.stepper.f.counting(stats)
        with torch.enable_grad():
            x, t0, t1 = (
                v if v is None else v.detach().requires_grad_(v is x or need)
                for v, need in zip((x, t0, t1), ctx.needs_input_grad[1:4], strict=True)
            )
            step = task.run(f, x, (t0, t1), None)
            inputs = [x, t0, t1, *parameters]
            needed = [v for v, need in zip(inputs, ctx.needs_input_grad[1:], strict=True) if need]
            grads = iter(vjp([step.x, step.dq], needed, [gx, gq]))
        return (None, *(next(grads) if need else None for need in ctx.needs_input_grad[1:]))
