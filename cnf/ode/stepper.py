"""How a step is computed: eagerly here, or by one that compiles or recomputes it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from cnf.ode.control import Evaluation, Tolerance, first_step
from cnf.ode.methods import Coefficients
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.stats import SolveStats
from cnf.ode.step import Clock, Stages, Time, combine, runge_kutta_step

__all__ = ["EagerStepper", "Step", "Stepper", "finish", "sized"]


class Step(NamedTuple):
    """The result of one step.

    Attributes:
        x: the new state.
        dq: the increments of the quadratures (*batch, n), or None.
        last: the derivative at the new state where the method has it (first same as last).
        error: the error per sample in units of the tolerance (*batch,), or None (fixed steps).
    """

    x: Tensor
    dq: Tensor | None
    last: Derivative | None
    error: Tensor | None


class Stepper(Protocol):
    """Evaluates a right-hand side and takes steps with it."""

    f: RightHandSide
    method: Coefficients

    def evaluate(self, t: Tensor, x: Tensor) -> Derivative:
        """f(t, x)."""

    def start(
        self, clock: Clock, x: Tensor, order: int, first: Derivative | None
    ) -> tuple[Derivative, Tensor]:
        """f at the start, and the size of a first step (), NaN where f is not finite."""

    def __call__(
        self,
        clock: Clock,
        t: Time,
        t_next: Time,
        x: Tensor,
        q: Tensor | None,
        first: Derivative | None,
    ) -> Step:
        """The step from t to t_next, with q the quadratures so far and first = f(t, x) if known."""

    def counting(self, stats: SolveStats) -> Stepper:
        """The same stepper, its evaluations counted elsewhere."""

    def rows(self, index: Tensor) -> Stepper:
        """The same stepper for some of the samples."""


class EagerStepper:
    """Steps as plain PyTorch operations; with a graph where one is asked."""

    def __init__(self, f: RightHandSide, method: Coefficients, tolerance: Tolerance | None) -> None:
        self.f = f
        self.method = method
        self.tolerance = tolerance

    def evaluate(self, t: Tensor, x: Tensor) -> Derivative:
        """f(t, x)."""
        return self.f(t, x)

    def start(
        self, clock: Clock, x: Tensor, order: int, first: Derivative | None
    ) -> tuple[Derivative, Tensor]:
        """f at the start, and the size of a first step."""
        if first is None:
            first = self.f(clock.times([clock.start], x)[0], x)
        return first, sized(self.f, order, clock, self.tolerance, x, first)

    def __call__(
        self,
        clock: Clock,
        t: Time,
        t_next: Time,
        x: Tensor,
        q: Tensor | None,
        first: Derivative | None,
    ) -> Step:
        """The step from t to t_next."""
        stages = runge_kutta_step(self.f, self.method, clock, t, t_next, x, first)
        return finish(self.method, self.tolerance, x, q, stages)

    def counting(self, stats: SolveStats) -> EagerStepper:
        """The same stepper, its evaluations counted elsewhere."""
        return EagerStepper(self.f.counting(stats), self.method, self.tolerance)

    def rows(self, index: Tensor) -> EagerStepper:
        """The same stepper for some of the samples."""
        return EagerStepper(self.f.rows(index), self.method, self.tolerance)


def finish(
    method: Coefficients, tolerance: Tolerance | None, x: Tensor, q: Tensor | None, stages: Stages
) -> Step:
    """The step that the stages make: quadratures, error, and what the next step can use."""
    dq = combine(method.b, stages.rates, stages.h)
    last: Derivative | None = None
    if method.first_same_as_last:
        last = (stages.slopes[-1], stages.rates[-1] if stages.rates else None)
    error = None if tolerance is None else tolerance.error(method, x, q, stages, dq)
    return Step(stages.x, dq, last, error)


def sized(
    f: Evaluation,
    order: int,
    clock: Clock,
    tolerance: Tolerance | None,
    x: Tensor,
    first: Derivative,
) -> Tensor:
    """The size of a first step ()."""
    if tolerance is None:
        raise ValueError("fixed steps have their size")
    return first_step(f, order, clock.start, clock.end, tolerance, x, first[0].detach())
