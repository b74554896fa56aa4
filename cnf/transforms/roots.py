"""The root of a + k h(a) = y, by which planar and Sylvester flows are inverted; k > -1 and the
activations h that make it unique.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "above_minus_one", "root"]

Activation = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""a -> h(a), h'(a) and 1 - h'(a), each free of cancellation, with 0 <= h' <= 1."""

FLOOR = 1e-3
"""The least value of 1 + k: the inverse magnifies rounding by its reciprocal at most."""

ITERATIONS = 14
"""Twelve reach machine precision for every activation, |y| <= 1e6 and 1e-6 <= 1 + k <= 1e6."""


def softplus(a: Tensor) -> Tensor:
    """log(1 + exp(a)), exact in float64 too, where torch's own threshold costs 2e-9."""
    return F.softplus(a, threshold=50.0)


def above_minus_one(a: Tensor) -> tuple[Tensor, Tensor]:
    """k > -1 as an increasing function of a real number a, and 1 + k.

        1 + k = FLOOR + softplus(a + log(exp(1 - FLOOR) - 1))

    k(0) = 0 exactly, k(a) ~ a for large a. Each of the two is computed without the rounding that
    subtracting one from the other would cost.
    """
    offset = math.log(math.expm1(1 - FLOOR))
    q = -math.expm1(FLOOR - 1)
    below = torch.log1p(q * torch.expm1(a.clamp(max=0)))
    above = a + torch.log1p((1 - q) * torch.expm1(-a.clamp(min=0)))
    return torch.where(a < 0, below, above), FLOOR + softplus(a + offset)


def root(activation: Activation, y: Tensor, p: Tensor) -> Tensor:
    """The a with a + k h(a) = y, elementwise, to machine precision.

    The left side increases with slopes between 1 and 1 + k, which bracket the root. Each iteration
    takes the better of a Newton step and the middle of the bracket, and narrows the bracket by
    both, so it converges from anywhere, and quadratically in the end. The middle is that of
    asinh(a), so that a bracket over many orders of magnitude narrows in few steps. The number of
    iterations is fixed, for torch.func.vmap and torch.compile.

    Two Newton steps that leave the value as it is then give the first and second derivatives with
    respect to y, p and whatever the activation depends on.

    Args:
        activation: h.
        y: right side.
        p: 1 + k > 0, which k itself would round off near -1; broadcasts against y.
    """
    a = _solve(activation, y.detach(), p.detach())
    for _ in range(2):  # each makes one more order of derivatives right
        residual, slope = _residual(activation, a, y, p)
        a = a - (residual - residual.detach()) / slope
    return a


def _residual(h: Activation, a: Tensor, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """a + k h(a) - y and its slope."""
    value, slope, rest = h(a)
    return (a - value) + p * value - y, rest + p * slope


@torch.no_grad()
def _solve(h: Activation, y: Tensor, p: Tensor) -> Tensor:
    """The root, by Newton's method and bisection."""
    reach = -_residual(h, torch.zeros_like(y), y, p)[0]  # slope times root
    ends = torch.stack((reach / p.clamp(min=1), reach / p.clamp(max=1)))
    low, high = ends.amin(0), ends.amax(0)
    best = _middle(low, high)
    residual, slope = _residual(h, best, y, p)
    for _ in range(ITERATIONS):
        newton = torch.clamp(best - residual / slope, low, high)
        points = torch.stack((newton, _middle(low, high)))
        residuals, slopes = _residual(h, points, y, p)
        low = torch.where(residuals <= 0, points, low).amax(0)
        high = torch.where(residuals >= 0, points, high).amin(0)
        closer = residuals[0].abs() <= residuals[1].abs()
        best, residual, slope = (
            torch.where(closer, pair[0], pair[1]) for pair in (points, residuals, slopes)
        )
    return best


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """The middle of a bracket on the scale of asinh: linear near 0, logarithmic far away."""
    return torch.sinh((torch.asinh(low) + torch.asinh(high)) / 2).clamp(low, high)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(a)
    return h, 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a), h * h


def _softplus(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return softplus(a), torch.sigmoid(a), torch.sigmoid(-a)


def _elu(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = a.clamp(max=0)
    fall = torch.expm1(below)
    return torch.where(a > 0, a, fall), torch.exp(below), -fall


def _leaky_relu(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = torch.where(a > 0, torch.ones_like(a), 0.01)
    return a * slope, slope, torch.where(a > 0, torch.zeros_like(a), 0.99)


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.sigmoid(a)
    slope = h * torch.sigmoid(-a)
    return h, slope, 1 - slope  # slope <= 1/4


def _arctan(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.atan(a)
    return h, 1 / (1 + a * a), torch.sin(h).square()


ACTIVATIONS: dict[str, Activation] = {
    "tanh": _tanh,
    "softplus": _softplus,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "arctan": _arctan,
}
"""Every activation, by name."""
