"""Step size control: the error norm, the first step, and the controller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.methods import Coefficients
from cnf.ode.rhs import Derivative
from cnf.ode.step import Stages, Time, combine, time_dtype

__all__ = ["MAX_REJECTIONS", "Controller", "Evaluation", "Tolerance", "first_step"]

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
    f: Evaluation,
    order: int,
    start: Time,
    end: Time,
    tolerance: Tolerance,
    x: Tensor,
    dx: Tensor,
    *,
    shared: bool = True,
) -> Tensor:
    """A first step size, not negative (Hairer, Norsett & Wanner, section II.4).

    It costs one evaluation, at the end of an Euler step inside the span. NaN where dx is not finite
    or overflows the norm.

    Args:
        f: right-hand side.
        order: of the method.
        start: time of x.
        end: time of the end.
        tolerance: the error norm.
        x: state.
        dx: f(start, x).
        shared: whether the smallest over the batch counts, for all; else each sample has its own,
            and x is (B, *event).

    Returns:
        () in the dtype of x, or (B,).
    """
    span = end - start
    span = span.to(x) if isinstance(span, Tensor) else x.new_full((), span)
    if x.numel() == 0:
        return span.abs().expand(() if shared else x.shape[:1])
    d0, d1 = tolerance.per_sample(x, x), tolerance.per_sample(dx, x)
    # A sample at zero or at rest says nothing about the step: it is left to the others.
    silent = (d0 < 1e-5) | (d1 < 1e-5)
    guess = torch.where(silent, torch.inf, 0.01 * d0 / d1)  # moves x by a hundredth
    guess = guess.min() if shared else guess
    h0 = torch.where(guess.isinf(), 0.01 * span.abs(), torch.minimum(guess, span.abs()))
    h = torch.where(h0 > 0, h0, 0) * span.sign()
    moved = combine((1.0,), (dx,), h, x)
    slope, _ = f((start + h.to(time_dtype(x))).to(x), x if moved is None else moved)
    # The step at which the first neglected term of an Euler step is a hundredth.
    steepest = torch.maximum(d1, tolerance.per_sample(slope - dx, x) / h0)
    h1 = torch.where(steepest <= 1e-15, torch.inf, (0.01 / steepest) ** (1.0 / order))
    h1 = torch.where(h1.isnan(), h0, h1)
    h1 = h1.min() if shared else h1
    h = torch.minimum(torch.minimum(100 * h0, h1), span.abs())
    return torch.where(h > 0, h, torch.nan)
