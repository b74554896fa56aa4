"""gradient="adjoint": the continuous adjoint equation, integrated backwards by the same engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.errors import SolverError
from cnf.ode.attention import differentiable_attention
from cnf.ode.diagnosis import refuse_other_values
from cnf.ode.gradient import BackwardContext, backward_stats, refuse_double_backward, vjp
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.solve import Integral, integrate, tolerance_of
from cnf.ode.solver import Solver
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock
from cnf.ode.stepper import EagerStepper, Stepper
from cnf.warn import warn

__all__ = ["AdjointSolve"]


class AdjointSolve:
    """A solve whose gradient is the continuous adjoint, integrated backwards in time.

        da/dt = -a^T df/dx - a_q^T dg/dx,    dL/dtheta = int a^T df/dtheta + a_q^T dg/dtheta dt

    with x recomputed backwards beside a = dL/dx(t), and g the integrands of the quadratures, whose
    own adjoint a_q is constant. The parameters' part is a quadrature, so that it stays out of the
    error norm. The equation is linear in (a, a_q), which are scaled to about one first: tolerances
    are relative to the gradient's size and not to how the loss was averaged.

    Args:
        stepper: evaluates the right-hand side, whose inputs are detached leaves.
        variables: the parameters and those of the leaves that require grad.
        clock: the span.
        solver: the choices.
        solve: the forward solve, from x.
        recorders: whom the backward solve tells its statistics.
        first: the right-hand side at the start, to which backward comes back.

    Reference: Chen et al., arXiv 1806.07366; Kidger, Chen & Lyons, arXiv 2009.09457.
    """

    def __init__(
        self,
        stepper: Stepper,
        variables: Sequence[Tensor],
        clock: Clock,
        solver: Solver,
        solve: Callable[[Tensor], Integral],
        recorders: Recorders,
        first: Derivative | None,
    ) -> None:
        self.stepper = stepper
        self.variables = variables
        self.clock = clock
        self.solver = solver
        self.solve: Callable[[Tensor], Integral] | None = solve
        self.recorders = recorders
        self.first = first if solver.check_field else None

    def __call__(self, x: Tensor, given: Sequence[Tensor]) -> Integral:
        """The solve, from x; the gradient in the variables is that in `given`, one by one."""
        return Integral(*_Adjoint.apply(self, x, self.clock.t0, self.clock.t1, *given))

    def forward(self, x: Tensor) -> Integral:
        """Values only."""
        if self.solve is None:
            raise RuntimeError("this solve has been done")
        solve, self.solve = self.solve, None
        return solve(x)

    def evaluate(self, stats: SolveStats) -> Callable[[Tensor, Tensor], Derivative]:
        """The right-hand side, counted in other statistics."""
        return self.stepper.counting(stats).evaluate

    def backward(
        self, start: Tensor, x: Tensor, a: Tensor, a_q: Tensor | None, wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """a at the start time, and the parameters' gradients in one vector."""
        n = self.stepper.f.batch_dims
        stats = backward_stats(self.stepper.f.stats, self.recorders)
        self._check_start(start, stats)
        inner = self.evaluate(SolveStats("scratch", stats.method, stats.t0, stats.t1))

        def augmented(t: Tensor, y: Tensor) -> Derivative:
            state, adjoint = y.select(n, 0), y.select(n, 1)
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                dx, dq = inner(t, state)
                cotangents = [-adjoint, None if a_q is None else -a_q]
                da, *dp = vjp([dx, dq], [state, *wanted], cotangents)
            flat = [g.reshape(-1) for g in dp]
            return torch.stack((dx.detach(), da), n), torch.cat(flat) if flat else None

        solver = dataclasses.replace(self.solver, first_step=None)
        y0 = torch.stack((x, a), n)
        tolerance = tolerance_of(solver, y0, n, 0, quiet=True)
        rhs = RightHandSide(augmented, n, stats, per_sample=False)
        stepper = EagerStepper(rhs, solver.tableau.coefficients, tolerance)
        clock = Clock(self.clock.end, self.clock.start)
        try:
            with differentiable_attention():
                y = integrate(stepper, y0, clock, solver, tolerance)
        except SolverError as error:
            raise error.explained(
                "In the backward solve of the adjoint, which a field can make unstable where the "
                "forward one is not; use gradient='backprop' or 'checkpoint'."
            ) from None
        self._check_drift(start, y.x.select(n, 0))
        return y.x.select(n, 1), x.new_zeros(0) if y.q is None else y.q

    def _check_start(self, start: Tensor, stats: SolveStats) -> None:
        """Refuse a field that is not there what it was, by one evaluation more."""
        if self.first is None:
            return
        f = self.stepper.f.counting(stats)
        with torch.no_grad():
            t = Clock(self.clock.start, self.clock.end).times([self.clock.start], start)[0]
            dx, _ = f(t, start)
        with f.in_precision(start):
            refuse_other_values(dx, self.first[0], "adjoint", f.batch_dims)

    def _check_drift(self, start: Tensor, returned: Tensor) -> None:
        """Warn where the backward trajectory missed the state that forward started from."""
        n = self.stepper.f.batch_dims
        tolerance = tolerance_of(self.solver, start, n, 0, quiet=True)
        if tolerance is None or start.numel() == 0:
            return
        worst = tolerance.per_sample(returned - start, start).max().item()
        if worst > 1000:
            warn(
                f"the adjoint's backward trajectory missed the start of the forward one by "
                f"{worst:.3g} times the tolerance, so this gradient is not to be trusted; use "
                "gradient='backprop' or 'checkpoint'"
            )


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: BackwardContext,
        task: AdjointSolve,
        x: Tensor,
        t0: Tensor | None,
        t1: Tensor | None,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.task = task
        end = task.forward(x)
        ctx.save_for_backward(x, end.x, *given)
        return end.x, end.q

    @staticmethod
    def backward(ctx: BackwardContext, gx: Tensor, gq: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward('gradient="adjoint"')
        task: AdjointSolve = ctx.task
        start, x, *_ = ctx.saved_tensors
        variables = task.variables
        _, _, need_t0, need_t1, *need = ctx.needs_input_grad
        wanted = [p for p, n in zip(variables, need, strict=True) if n]
        scale = _scale(gx, gq)
        a_q = None if gq is None else gq / scale
        a, flat = task.backward(start, x, gx / scale, a_q, wanted)
        pieces = iter(flat.split([p.numel() for p in wanted]) if flat.numel() else [])
        grads = [
            (next(pieces).reshape(p.shape) * scale if flat.numel() else torch.zeros_like(p))
            if n
            else None
            for p, n in zip(variables, need, strict=True)
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
    dx, dq = task.evaluate(SolveStats("scratch", "", t, t))(Clock(t, t).times([t], x)[0], x)
    power = (a * dx).sum()
    if dq is not None and a_q is not None:
        power = power + (a_q * dq).sum()
    return power
