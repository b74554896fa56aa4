"""Gradients of a solve that do not keep its graph: recomputed steps, and the continuous adjoint."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.errors import SolverError
from cnf.graph import unknown_leaves
from cnf.ode.control import Tolerance
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.solve import Integral, integrate
from cnf.ode.solver import Solver
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock, Step, runge_kutta_step

__all__ = ["AdjointSolve", "Recomputing", "first_derivative"]


class _Context(Protocol):
    """What autograd hands to forward and backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    task: Any

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def first_derivative(
    f: RightHandSide, clock: Clock, x: Tensor, parameters: Sequence[Tensor]
) -> Derivative:
    """f at the start, detached, after a check that it depends on nothing undeclared.

    Raises:
        ValueError: if the field uses a tensor that requires grad and is not among the parameters:
            its gradient would silently be lost; or if one of the parameters is computed from
            another: the gradient on that way would be counted twice.
    """
    computed = [p for p in parameters if p.grad_fn is not None]
    for leaf in unknown_leaves(computed, []):
        if any(leaf is p for p in parameters):
            raise ValueError(
                f"the context is computed from a parameter of shape {tuple(leaf.shape)} that the "
                "vector field uses too, which gradient='checkpoint' and 'adjoint' cannot tell "
                "apart; use gradient='backprop'"
            )
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        dx, dq = f(Clock(clock.start, clock.end).times([clock.start], x)[0], leaf)
        outputs = [dx] if dq is None else [dx, dq]
        for captured in unknown_leaves(outputs, [leaf, *parameters]):
            raise ValueError(
                f"the vector field depends on a tensor of shape {tuple(captured.shape)} that "
                "requires grad and is not declared, so gradient='checkpoint' and 'adjoint' would "
                "lose its gradient; make it a parameter of the field's module, pass it as context "
                "(or in parameters= of odeint), or use gradient='backprop'"
            )
    return dx.detach(), None if dq is None else dq.detach()


def _refuse_double_backward(gradient: str) -> None:
    if torch.is_grad_enabled():  # autograd enables it in backward exactly for create_graph=True
        raise RuntimeError(
            f"gradient={gradient!r} has no second derivatives; they need gradient='backprop'"
        )


def _backward_stats(stats: SolveStats, recorders: Recorders) -> SolveStats:
    """The record of a backward solve, shown to the recorders of its forward solve."""
    own = SolveStats("backward", stats.method, stats.t1, stats.t0)
    for recorder in recorders:
        recorder.append(own)
    return own


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
        self.backward_stats: SolveStats | None = None

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
        if self.backward_stats is None:
            self.backward_stats = _backward_stats(self.f.stats, self.recorders)
            self.backward_stats.status = "converged"
        return self.backward_stats


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
        ctx: _Context,
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
    def backward(ctx: _Context, gx: Tensor, gq: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("checkpoint")
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
            grads = iter(_vjp([step.x, step.dq], needed, [gx, gq]))
        return (None, *(next(grads) if need else None for need in ctx.needs_input_grad[1:]))


def _vjp(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor]:
    """Vector-Jacobian products, zero for inputs that the outputs do not depend on."""
    pairs = [
        (y, v)
        for y, v in zip(outputs, cotangents, strict=True)
        if y is not None and v is not None and y.requires_grad
    ]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    ys, vs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, inputs, vs, allow_unused=True, materialize_grads=True))


class AdjointSolve:
    """A solve whose gradient is the continuous adjoint, integrated backwards in time.

        da/dt = -a^T df/dx - a_q^T dg/dx,    dL/dtheta = int a^T df/dtheta + a_q^T dg/dtheta dt

    with x recomputed backwards beside a = dL/dx(t), and g the integrands of the quadratures, whose
    own adjoint a_q is constant. The parameters' part is a quadrature, so that it stays out of the
    error norm. The equation is linear in (a, a_q), which are scaled to about one first: tolerances
    are relative to the gradient's size and not to how the loss was averaged.

    Reference: Chen et al., arXiv 1806.07366; Kidger, Chen & Lyons, arXiv 2009.09457.
    """

    def __init__(
        self,
        f: RightHandSide,
        clock: Clock,
        solver: Solver,
        *,
        batch_dims: int,
        controlled: int | None,
        recorders: Recorders,
        first: Derivative,
    ) -> None:
        self.f = f
        self.clock = clock
        self.solver = solver
        self.batch_dims = batch_dims
        self.controlled = controlled
        self.recorders = recorders
        self.first: Derivative | None = first

    def __call__(self, x: Tensor, parameters: Sequence[Tensor]) -> Integral:
        """The solve, from x."""
        return Integral(*_Adjoint.apply(self, x, self.clock.t0, self.clock.t1, *parameters))

    def forward(self, x: Tensor) -> Integral:
        """Values only."""
        first, self.first = self.first, None
        clock = Clock(self.clock.start, self.clock.end)
        return integrate(
            self.f,
            x,
            clock,
            self.solver,
            batch_dims=self.batch_dims,
            controlled=self.controlled,
            first=first,
        )

    def backward(
        self, start: Tensor, x: Tensor, a: Tensor, a_q: Tensor | None, wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """a at the start time, and the parameters' gradients in one vector."""
        n = self.batch_dims
        stats = _backward_stats(self.f.stats, self.recorders)
        inner = self.f.counting(SolveStats("scratch", stats.method, stats.t0, stats.t1))

        def augmented(t: Tensor, y: Tensor) -> Derivative:
            state, adjoint = y.select(n, 0), y.select(n, 1)
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                dx, dq = inner(t, state)
                cotangents = [-adjoint, None if a_q is None else -a_q]
                da, *dp = _vjp([dx, dq], [state, *wanted], cotangents)
            flat = [g.reshape(-1) for g in dp]
            return torch.stack((dx.detach(), da), n), torch.cat(flat) if flat else None

        try:
            y = integrate(
                RightHandSide(augmented, n, stats, per_sample=False),
                torch.stack((x, a), n),
                Clock(self.clock.end, self.clock.start),
                dataclasses.replace(self.solver, first_step=None),
                batch_dims=n,
                controlled=0,
            )
        except SolverError as error:
            raise error.explained(
                "In the backward solve of the adjoint, which a field can make unstable where the "
                "forward one is not; use gradient='backprop' or 'checkpoint'."
            ) from None
        self._check_drift(start, y.x.select(n, 0))
        return y.x.select(n, 1), x.new_zeros(0) if y.q is None else y.q

    def _check_drift(self, start: Tensor, returned: Tensor) -> None:
        """Warn where the backward trajectory missed the state that forward started from."""
        tolerance = Tolerance(self.solver.rtol, self.solver.atol, self.batch_dims, 0)
        drift = tolerance.per_sample(returned - start, start)
        worst = drift.max().item() if drift.numel() else 0.0
        if self.solver.tableau.adaptive and worst > 1000:
            warnings.warn(
                f"the adjoint's backward trajectory missed the start of the forward one by "
                f"{worst:.3g} times the tolerance, so this gradient is not to be trusted; use "
                "gradient='backprop' or 'checkpoint'",
                RuntimeWarning,
                stacklevel=2,
            )


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        task: AdjointSolve,
        x: Tensor,
        t0: Tensor | None,
        t1: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.task = task
        end = task.forward(x)
        ctx.save_for_backward(x, end.x, *parameters)
        return end.x, end.q

    @staticmethod
    def backward(ctx: _Context, gx: Tensor, gq: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward("adjoint")
        task: AdjointSolve = ctx.task
        start, x, *parameters = ctx.saved_tensors
        _, _, need_t0, need_t1, *need = ctx.needs_input_grad
        wanted = [p for p, n in zip(parameters, need, strict=True) if n]
        scale = _scale(gx, gq)
        a_q = None if gq is None else gq / scale
        a, flat = task.backward(start, x, gx / scale, a_q, wanted)
        pieces = iter(flat.split([p.numel() for p in wanted]) if flat.numel() else [])
        grads = [
            (next(pieces).reshape(p.shape) * scale if flat.numel() else torch.zeros_like(p))
            if n
            else None
            for p, n in zip(parameters, need, strict=True)
        ]
        a = a * scale
        t_grads = [
            sign * _power(task, t, state, adjoint, gq) if needed else None
            for needed, t, state, adjoint, sign in (
                (need_t0, task.clock.start, start, a, -1.0),
                (need_t1, task.clock.end, x, gx, 1.0),
            )
        ]
        return (None, a, *t_grads, *grads)


def _scale(gx: Tensor, gq: Tensor | None) -> Tensor:
    """The size of the incoming gradient, a tensor (); 1 where it is zero."""
    parts = [g.abs().max() for g in (gx, gq) if g is not None and g.numel()]
    if not parts:
        return gx.new_ones(())
    largest = torch.stack(parts).max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _power(task: AdjointSolve, t: float, x: Tensor, a: Tensor, a_q: Tensor | None) -> Tensor:
    """a^T f + a_q^T g at one end of the span: the derivative of the loss in that time."""
    dx, dq = task.f.counting(SolveStats("scratch", "", t, t))(Clock(t, t).times([t], x)[0], x)
    power = (a * dx).sum()
    if dq is not None and a_q is not None:
        power = power + (a_q * dq).sum()
    return power
