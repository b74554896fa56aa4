"""One explicit Runge-Kutta step over a state and its quadratures, and the clock that times it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.methods import Coefficients
from cnf.ode.rhs import Derivative

__all__ = ["Clock", "Stages", "Time", "combine", "runge_kutta_step", "time_dtype"]

Time = float | Tensor
"""A time on the host, or a tensor in float64: () in a compiled step, (B,) with one per sample."""


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

    @property
    def values(self) -> Clock:
        """The same times, without gradient."""
        return self if self.t0 is None else Clock(self.start, self.end)

    def times(self, ts: Sequence[Time], like: Tensor) -> Sequence[Tensor]:
        """The times as tensors, () or (B,), of the dtype and device of `like`."""
        if self.t0 is not None and self.t1 is not None:
            return [torch.lerp(self.t0, self.t1, self._fraction(t)).to(like) for t in ts]
        if like.is_cuda or any(isinstance(t, Tensor) for t in ts):
            return [_tensor(t, like) for t in ts]
        return torch.tensor(ts, dtype=like.dtype, device=like.device).unbind()

    def at(self, t: float, like: Tensor) -> Tensor:
        """One time as a tensor () in the precision of times, on the device of `like`."""
        dtype = time_dtype(like)
        if self.t0 is not None and self.t1 is not None:
            return torch.lerp(self.t0, self.t1, self._fraction(t)).to(dtype)
        return torch.full((), t, dtype=dtype, device=like.device)

    def step_size(self, h: Time, like: Tensor) -> float | Tensor:
        """The step size: a number, or a tensor if it carries a gradient or is one per sample."""
        if self.t0 is not None and self.t1 is not None:
            span = self.end - self.start
            return ((self.t1 - self.t0) * (h / span if span else 1.0)).to(like)
        return h.to(like) if isinstance(h, Tensor) else h

    def _fraction(self, t: Time) -> Time:
        span = self.end - self.start
        return (t - self.start) / span if span else 0.0


def _tensor(t: Time, like: Tensor) -> Tensor:
    if isinstance(t, Tensor):
        return t.to(like)
    # A kernel that takes the number along: no copy for the host to wait for.
    return torch.full((), t, dtype=like.dtype, device=like.device)


def time_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which tensors hold times: float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


class Stages(NamedTuple):
    """What the stages of one step give.

    Attributes:
        x: the new state.
        slopes: k_i, the derivatives of the state at every stage.
        rates: the derivatives of the quadratures at every stage, empty if there are none.
        h: the step size.
    """

    x: Tensor
    slopes: list[Tensor]
    rates: list[Tensor]
    h: float | Tensor


def combine(
    weights: Sequence[float], ks: Sequence[Tensor], h: float | Tensor, x: Tensor | None = None
) -> Tensor | None:
    """x + h sum_i w_i k_i; without x the sum alone, or None where every weight is zero.

    A chain of additions with a factor: fewer kernels than stacking the slopes, and faster for small
    and large states alike; `torch.compile` makes one kernel of it.
    """
    terms = [(weights[i], k) for i, k in enumerate(ks) if weights[i] != 0.0]
    if isinstance(h, Tensor):
        total: Tensor | None = None
        for w, k in terms:
            total = w * k if total is None else total + w * k
        if total is None:
            return x
        total = h.reshape(-1, *[1] * (total.ndim - 1)) * total if h.ndim else h * total
        return total if x is None else x + total
    for w, k in terms:
        x = k * (h * w) if x is None else torch.add(x, k, alpha=h * w)
    return x


def runge_kutta_step(
    f: Callable[[Tensor, Tensor], Derivative],
    method: Coefficients,
    clock: Clock,
    t: Time,
    t_next: Time,
    x: Tensor,
    first: Derivative | None,
) -> Stages:
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
        state = _moved(row, slopes, h, x)
        dx, dq = f(time, state)
        slopes.append(dx)
        if dq is not None:
            rates.append(dq)
    if not method.first_same_as_last:  # else the last stage was taken at the new state
        state = _moved(method.b, slopes, h, x)
    return Stages(state, slopes, rates, h)


def _moved(weights: Sequence[float], ks: Sequence[Tensor], h: float | Tensor, x: Tensor) -> Tensor:
    moved = combine(weights, ks, h, x)
    return x if moved is None else moved
