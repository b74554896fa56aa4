"""Step size control: the error norm, the first step, and the controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.methods import Coefficients
from cnf.ode.rhs import Derivative
from cnf.ode.step import Clock, Stages, combine

__all__ = ["MAX_REJECTIONS", "Controller", "Tolerance", "first_step", "first_steps"]

MAX_REJECTIONS = 20  # in a row: at the smallest factor, a step 1e-14 of the first try


class Tolerance(NamedTuple):
    """The error norm of a solve: how large an error is, in units of what is tolerated.

    A sample's error is the root mean square over its event of error / (atol + rtol |x|), or the
    same of its controlled quadratures where that is larger. The norm is the largest over the
    batch, so that one hard sample is not diluted by easy ones.

    Attributes:
        rtol: relative tolerance, a number or a tensor ().
        atol: absolute tolerance, positive.
        batch_dims: leading dimensions that index samples.
        controlled: how many quadratures, counted from the first, are held to the tolerance; None
            for all of them.
    """

    rtol: float | Tensor
    atol: float | Tensor
    batch_dims: int
    controlled: int | None

    def per_sample(self, value: Tensor, *scales: Tensor) -> Tensor:
        """Root mean square over the event of value / (atol + rtol max |scale|), (*batch,)."""
        magnitude = scales[0].abs()
        for other in scales[1:]:
            magnitude = torch.maximum(magnitude, other.abs())
        ratio = value / (magnitude * self.rtol + self.atol)
        if ratio.ndim != self.batch_dims + 1:
            ratio = ratio.unsqueeze(-1).flatten(self.batch_dims)  # (*batch, *event) -> (*batch, D)
        if ratio.shape[-1] == 0:
            return ratio.new_zeros(ratio.shape[:-1])
        if ratio.shape[-1] == 1:
            return ratio.squeeze(-1).abs()
        return ratio.square().mean(-1).sqrt()

    def error(
        self, method: Coefficients, x: Tensor, q: Tensor | None, stages: Stages, dq: Tensor | None
    ) -> Tensor:
        """The error estimate of a step, per sample (*batch,), without gradient."""
        with torch.no_grad():
            estimate = combine(method.e, stages.slopes, stages.h)
            if estimate is None:  # a tableau whose two solutions agree has no error to control
                return x.new_zeros(x.shape[: self.batch_dims])
            error = self.per_sample(estimate, x, stages.x)
            if self.controlled == 0 or dq is None:
                return error
            estimate = combine(method.e, stages.rates, stages.h)
            if estimate is None:
                return error
            before = torch.zeros_like(dq) if q is None else q
            parts = (estimate, before, before + dq)
            for i in range(estimate.shape[-1] if self.controlled is None else self.controlled):
                own = self.per_sample(*(part[..., i : i + 1] for part in parts))
                error = torch.maximum(error, own)  # each for itself: none dilutes another
            return error


@dataclass
class Controller:
    """A PI controller for the step size (Gustafsson 1991; Hairer & Wanner, section IV.2).

    factor = 0.9 error^(-0.85 / p) previous_error^(0.2 / p), within [0.2, 10], and at most 1 in the
    step after a rejection (the exponents of Hairer's DOPRI5).
    """

    order: int
    previous_error: float = 1.0
    rejections: int = 0

    def after_acceptance(self, error: float) -> float:
        """The factor from this step's size to the next one's."""
        error = max(error, 1e-10)
        factor = 0.9 * error ** (-0.85 / self.order) * self.previous_error ** (0.2 / self.order)
        limit = 1.0 if self.rejections else 10.0
        self.previous_error, self.rejections = max(error, 1e-4), 0
        return min(limit, max(0.2, factor))

    def after_rejection(self, error: float) -> float:
        """The factor from the refused step's size to the next try's."""
        self.rejections += 1
        if not error < float("inf"):  # NaN or infinite: no information but 'too far'
            return 0.2
        return min(0.9, max(0.2, 0.9 * error ** (-1.0 / self.order)))


Evaluation = Callable[[Tensor, Tensor], Derivative]


@torch.no_grad()
def first_step(
    f: Evaluation, order: int, clock: Clock, tolerance: Tolerance, x: Tensor, dx: Tensor
) -> float:
    """A first step size, not negative (Hairer, Norsett & Wanner, section II.4).

    It costs one evaluation, at the end of an Euler step inside the span. The smallest over the
    batch counts. NaN where dx is not finite or overflows the norm.
    """
    span = clock.end - clock.start
    if x.numel() == 0:
        return abs(span)
    d1, guesses = _euler_steps(tolerance, x, dx)
    guess = guesses.min().item()
    h0 = min(guess, 0.01 * abs(span)) if guess == math.inf else min(guess, abs(span))
    if not h0 > 0:
        return math.nan
    h = h0 if span > 0 else -h0
    moved, _ = f(clock.times([clock.start + h], x)[0], torch.add(x, dx, alpha=h))
    h1 = _second_steps(tolerance, order, d1, moved - dx, x, h0)
    best = h1.nan_to_num(h0, math.inf, h0).min().item()
    h = min(100 * h0, best, abs(span))
    return h if h > 0 else math.nan


@torch.no_grad()
def first_steps(
    f: Evaluation, order: int, clock: Clock, tolerance: Tolerance, x: Tensor, dx: Tensor
) -> Tensor:
    """`first_step` for each sample of x (B, *event): (B,) in the dtype of x, NaN as there."""
    span = clock.end - clock.start
    d1, guesses = _euler_steps(tolerance, x, dx)
    h0 = guesses.clamp(max=abs(span))
    h0 = torch.where(guesses.isinf(), 0.01 * abs(span), h0)
    h = h0 if span > 0 else -h0
    t = clock.start + h.double()
    moved = combine((1.0,), (dx,), h, x)
    moved = x if moved is None else moved
    slope, _ = f(t.to(x), moved)
    h1 = _second_steps(tolerance, order, d1, slope - dx, x, h0)
    h1 = torch.where(h1.isnan(), h0, h1)
    h = torch.minimum(100 * h0, h1).clamp(max=abs(span))
    return torch.where(h > 0, h, math.nan)


def _euler_steps(tolerance: Tolerance, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """The size of dx, and a step that moves x by a hundredth; infinite where neither tells.

    A sample at zero or at rest says nothing about the step: it is left to the others.
    """
    d0, d1 = tolerance.per_sample(x, x), tolerance.per_sample(dx, x)
    silent = (d0 < 1e-5) | (d1 < 1e-5)
    return d1, torch.where(silent, torch.inf, 0.01 * d0 / d1)


def _second_steps(
    tolerance: Tolerance, order: int, d1: Tensor, change: Tensor, x: Tensor, h0: float | Tensor
) -> Tensor:
    """The step at which the first neglected term of an Euler step is a hundredth."""
    steepest = torch.maximum(d1, tolerance.per_sample(change, x) / h0)
    return torch.where(steepest <= 1e-15, torch.inf, (0.01 / steepest) ** (1.0 / order))
