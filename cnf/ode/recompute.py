"""gradient="checkpoint": keep one state a step, and compute each step once more in backward."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.ode.attention import differentiable_attention
from cnf.ode.diagnosis import refuse_other_values
from cnf.ode.gradient import BackwardContext, backward_stats, refuse_double_backward, vjp
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock, Time
from cnf.ode.stepper import Step, Stepper

__all__ = ["Recomputing"]


class Recomputing:
    """A stepper that keeps only the state: backward computes each accepted step once more.

    Its gradient is that of backpropagation, bit for bit the same steps.

    Args:
        stepper: computes a step, now and again in backward, with inputs of the right-hand side
            that are detached leaves.
        inputs: the right-hand side with the inputs that carry a graph.
        parameters: tensors that require grad, other than the inputs of the right-hand side.
        recorders: whom the backward pass tells its statistics.
        check: whether the recomputed end of a step must be the end that it had.
    """

    def __init__(
        self,
        stepper: Stepper,
        inputs: RightHandSide,
        parameters: Sequence[Tensor],
        recorders: Recorders,
        *,
        check: bool,
    ) -> None:
        self.stepper = stepper
        self.inputs = inputs
        self.f = stepper.f
        self.method = stepper.method
        self.parameters = parameters
        self.recorders = recorders
        self.check = check
        self.own_stats: list[SolveStats] = []

    def evaluate(self, t: Tensor, x: Tensor) -> Derivative:
        """f(t, x), without gradient."""
        with torch.no_grad():
            return self.stepper.evaluate(t, x)

    def start(
        self, clock: Clock, x: Tensor, order: int, first: Derivative | None
    ) -> tuple[Derivative, Tensor]:
        """f at the start, without gradient, and the size of a first step."""
        with torch.no_grad():
            return self.stepper.start(clock, x, order, first)

    def __call__(
        self,
        clock: Clock,
        t: Time,
        t_next: Time,
        x: Tensor,
        q: Tensor | None,
        first: Derivative | None,
    ) -> Step:
        """The step, whose x and dq carry a gradient while its last derivative does not."""
        task = _StepTask(self, clock.values, t, t_next)
        task.first, task.q = first, q
        given = (*self.parameters, *self.inputs.trainable)
        x, dq = _RecomputedStep.apply(task, x, clock.t0, clock.t1, *given)
        return task.release()._replace(x=x, dq=dq)

    def rows(self, index: Tensor) -> Recomputing:
        """The same stepper for some of the samples."""
        other = copy.copy(self)
        other.stepper, other.inputs = self.stepper.rows(index), self.inputs.rows(index)
        other.f = other.stepper.f
        return other

    def counting(self, stats: SolveStats) -> Stepper:
        """The stepper within, its evaluations counted elsewhere."""
        return self.stepper.counting(stats)

    def backward_stats(self) -> SolveStats:
        """The record of the backward pass, made when the first step of it runs."""
        if not self.own_stats:
            self.own_stats.append(backward_stats(self.f.stats, self.recorders))
            self.own_stats[0].status = "converged"
        return self.own_stats[0]


class _StepTask:
    """One step to take now and again in backward."""

    def __init__(self, stepper: Recomputing, clock: Clock, t: Time, t_next: Time) -> None:
        self.stepper = stepper
        self.start, self.end = clock.start, clock.end
        self.t, self.t_next = t, t_next
        self.first: Derivative | None = None
        self.q: Tensor | None = None
        self.done: list[Step] = []

    def release(self) -> Step:
        """The step just taken; nothing of it stays for backward."""
        self.first = self.q = None
        return self.done.pop()

    def check(self, again: Tensor, end: Tensor, x: Tensor) -> None:
        """Refuse another end than the step had."""
        f = self.stepper.f
        with f.in_precision(x):
            refuse_other_values(again, end, "checkpoint", f.batch_dims, x)

    def run(
        self,
        stepper: Stepper,
        x: Tensor,
        times: tuple[Tensor | None, Tensor | None],
        first: Derivative | None,
    ) -> Step:
        clock = Clock(self.start, self.end, *times)
        return stepper(clock, self.t, self.t_next, x, self.q, first)


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
        step = task.run(task.stepper.stepper, x, (t0, t1), task.first)
        end = step.x if task.stepper.check else None  # the start of the next step: no more memory
        ctx.save_for_backward(x, t0, t1, end, *parameters)
        task.done.append(step)
        return step.x, step.dq

    @staticmethod
    def backward(ctx: BackwardContext, gx: Tensor, gq: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward('gradient="checkpoint"')
        task: _StepTask = ctx.task
        x, t0, t1, end, *_ = ctx.saved_tensors
        stats = task.stepper.backward_stats()
        stats.accepted += 1
        stepper = task.stepper.counting(stats)
        with torch.enable_grad(), differentiable_attention():
            x, t0, t1 = (
                v if v is None else v.detach().requires_grad_(v is x or need)
                for v, need in zip((x, t0, t1), ctx.needs_input_grad[1:4], strict=True)
            )
            step = task.run(stepper, x, (t0, t1), None)
            if end is not None and stats.accepted & (stats.accepted - 1) == 0:
                task.check(step.x, end, x)  # the 1st, 2nd, 4th, ...: what changes does so at each
            leaves = task.stepper.f.trainable  # in the place of the inputs that carry a graph
            inputs = [x, t0, t1, *task.stepper.parameters, *leaves]
            needed = [v for v, need in zip(inputs, ctx.needs_input_grad[1:], strict=True) if need]
            grads = iter(vjp([step.x, step.dq], needed, [gx, gq]))
        return (None, *(next(grads) if need else None for need in ctx.needs_input_grad[1:]))
