"""One explicit Runge-Kutta step over a state and its quadratures, and the clock that times it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.methods import Tableau
from cnf.ode.rhs import Derivative

__all__ = ["Clock", "Step", "runge_kutta_step"]


@dataclass(frozen=True)
class Clock:
    """Time, kept in float64 on the host, and as tensors for the field.

    The steps are fixed fractions of the span, t = t0 + s (t1 - t0). So where `t0` or `t1` requires
    grad, every stage time and step size is differentiable in both, and the step sequence is not.

    Attributes:
        start: t0 as a number.
        end: t1 as a number.
        t0: t0 as a tensor (), or None if no gradient in time is asked.
        t1: likewise.
    """

    start: float
    end: float
    t0: Tensor | None = None
    t1: Tensor | None = None

    def times(self, ts: Sequence[float], like: Tensor) -> Sequence[Tensor]:
        """The times as tensors () of the dtype and device of `like`."""
        if self.t0 is None or self.t1 is None:
            return torch.tensor(ts, dtype=like.dtype, device=like.device).unbind()
        span = self.end - self.start
        return [
            torch.lerp(self.t0, self.t1, (t - self.start) / span if span else 0.0).to(like)
            for t in ts
        ]

    def step_size(self, h: float, like: Tensor) -> float | Tensor:
        """The step size: a number, or a tensor () if it carries a gradient."""
        if self.t0 is None or self.t1 is None:
            return h
        span = self.end - self.start
        return ((self.t1 - self.t0) * (h / span if span else 1.0)).to(like)


class Step(NamedTuple):
    """The result of one step.

    Attributes:
        x: the new state.
        dq: the increments of the quadratures, or None.
        slopes: k_i, the derivatives of the state at every stage.
        rates: the derivatives of the quadratures at every stage.
        last: the derivative at the new state where the method has it (first same as last).
    """

    x: Tensor
    dq: Tensor | None
    slopes: list[Tensor]
    rates: list[Tensor]
    last: Derivative | None


def combine(weights: Sequence[float], ks: Sequence[Tensor], h: float | Tensor) -> Tensor | None:
    """h sum_i w_i k_i, or None where every weight is zero."""
    total: Tensor | None = None
    for w, k in zip(weights, ks, strict=False):
        if w == 0.0:
            continue
        if isinstance(h, Tensor):
            term = (h * w) * k
            total = term if total is None else total + term
        else:
            total = k * (h * w) if total is None else torch.add(total, k, alpha=h * w)
    return total


def advance(x: Tensor, weights: Sequence[float], ks: Sequence[Tensor], h: float | Tensor) -> Tensor:
    """x + h sum_i w_i k_i."""
    for w, k in zip(weights, ks, strict=False):
        if w != 0.0:
            x = x + (h * w) * k if isinstance(h, Tensor) else torch.add(x, k, alpha=h * w)
    return x


def runge_kutta_step(
    f: Callable[[Tensor, Tensor], Derivative],
    method: Tableau,
    clock: Clock,
    t: float,
    t_next: float,
    x: Tensor,
    first: Derivative | None,
) -> Step:
    """One step from t to t_next: k_i = f(t + c_i h, x + h sum_j a_ij k_j).

    Args:
        f: right-hand side.
        method: the tableau.
        clock: makes tensors of times.
        t: time of x.
        t_next: time of the result, exactly.
        x: state.
        first: f(t, x) where it is known already.
    """
    ts = [t_next if c == 1.0 else t + c * (t_next - t) for c in method.c]  # never past t_next
    times = clock.times(ts, x)
    h = clock.step_size(t_next - t, x)
    dx, dq = f(times[0], x) if first is None else first
    slopes, rates = [dx], [] if dq is None else [dq]
    state = x
    for time, row in zip(times[1:], method.a[1:], strict=True):
        state = advance(x, row, slopes, h)
        dx, dq = f(time, state)
        slopes.append(dx)
        if dq is not None:
            rates.append(dq)
    last: Derivative | None = None
    if method.first_same_as_last:
        last = (dx, dq)  # the last stage was taken at the new state
    else:
        state = advance(x, method.b, slopes, h)
    return Step(state, combine(method.b, rates, h), slopes, rates, last)
