"""The monotone rational-quadratic spline, elementwise, with the identity outside an interval."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.checks import check_positive
from cnf.transforms.elementwise import Elementwise

__all__ = ["RationalQuadraticSpline"]

_SMALLEST_BIN = 0.1  # of the mean width or height
_SMALLEST_SLOPE = 0.01  # at a knot
_ONE = math.log(math.expm1(1 - _SMALLEST_SLOPE))  # softplus of it, and the smallest slope, give 1


class _Bin(NamedTuple):
    """The bin that a number lies in: its corner, its size, and the slopes at its ends."""

    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    slope: Tensor
    next_slope: Tensor


@dataclasses.dataclass(frozen=True)
class RationalQuadraticSpline(Elementwise):
    """A monotone spline of K rational-quadratic bins on [-b, b], the identity outside.

        z = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_{k+1} - 2 s) t (1 - t))
        t = (x - x_k) / w,    s = h / w

    w, h are the sizes of the bin of x, d the slopes at its ends, which are 1 at -b and b. Bins
    are no smaller than a tenth of the mean one and slopes at knots no smaller than 0.01, which
    keeps the rounding of float32 in bounds.

    Args:
        bins: number of bins K.
        bound: half the length of the interval, b.

    Raises:
        TypeError: a bound that is not a number.
        ValueError: fewer than two bins, or a bound that is not positive.

    Reference: Durkan et al., arXiv 1906.04032.

    Example:
        >>> spline = RationalQuadraticSpline(bins=4, bound=3.0)
        >>> parameters = torch.randn(10, spline.parameters, 2)
        >>> x, log_slope = spline.forward(torch.randn(10, 2), parameters)
        >>> x.shape, log_slope.shape
        (torch.Size([10, 2]), torch.Size([10, 2]))
    """

    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 2:
            raise ValueError(f"bins={self.bins!r} must be an integer, 2 or more")
        check_positive("bound", self.bound)

    @property
    def parameters(self) -> int:  # type: ignore[override]
        """K widths, K heights, K - 1 slopes."""
        return 3 * self.bins - 1

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, both (B, *event)."""
        inside, x_in = self._inside(x)
        b = self._bin(x_in, parameters, 0)
        t = ((x_in - b.left) / b.width).clamp(0, 1)  # at a knot rounding may have the other bin
        y, slope = _height_and_slope(t, b)
        log_slope = (slope * (b.height / b.width)).log()
        return torch.where(inside, b.bottom + b.height * y, x), torch.where(inside, log_slope, 0.0)

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz, both (B, *event)."""
        inside, z_in = self._inside(z)
        b = self._bin(z_in, parameters, 1)
        t, slope = _position_and_slope(((z_in - b.bottom) / b.height).clamp(0, 1), b)
        log_slope = -(slope * (b.height / b.width)).log()
        return torch.where(inside, b.left + b.width * t, z), torch.where(inside, log_slope, 0.0)

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where x is within the bounds, and x clamped to them: a gradient must not meet numbers
        outside even where `where` discards them, for infinity times zero is NaN.
        """
        return x.abs() < self.bound, x.clamp(-self.bound, self.bound)

    def _bin(self, x: Tensor, parameters: Tensor, axis: int) -> _Bin:
        """The bin of x (B, *event), searched among the widths (axis 0) or the heights (axis 1)."""
        k = self.bins
        raw_widths, raw_heights, raw_slopes = parameters.split([k, k, k - 1], 1)
        sizes = [self._sizes(raw_widths), self._sizes(raw_heights)]  # (B, K, *event)
        slopes = _SMALLEST_SLOPE + F.softplus(raw_slopes + _ONE)
        end = torch.ones_like(slopes[:, :1])
        slopes = torch.cat([end, slopes, end], 1)  # (B, K + 1, *event)
        with torch.no_grad():
            knots = sizes[axis][:, :-1].cumsum(1) - self.bound  # between bins
            index = (x.unsqueeze(1) >= knots).sum(1, keepdim=True)  # (B, 1, *event)
            numbers = torch.arange(k, device=x.device).reshape(1, k, *[1] * (x.ndim - 1))
            before = (numbers < index).to(x.dtype)  # 1 for the bins to the left
        left, bottom = ((size * before).sum(1) - self.bound for size in sizes)
        width, height = (size.gather(1, index).squeeze(1) for size in sizes)
        slope, next_slope = (slopes.gather(1, index + i).squeeze(1) for i in (0, 1))
        return _Bin(left, bottom, width, height, slope, next_slope)

    def _sizes(self, raw: Tensor) -> Tensor:
        """Positive sizes that add up to the interval."""
        smallest = _SMALLEST_BIN * 2 * self.bound / self.bins
        return smallest + (1 - _SMALLEST_BIN) * 2 * self.bound * raw.softmax(1)


def _height_and_slope(t: Tensor, b: _Bin) -> tuple[Tensor, Tensor]:
    """The spline at the position t in a bin, and its slope there, both in units of the bin."""
    s = b.height / b.width
    rest = 1 - t
    u = t * rest
    below = s + (b.slope + b.next_slope - 2 * s) * u
    y = (s * t.square() + b.slope * u) / below
    above = b.next_slope * t.square() + 2 * s * u + b.slope * rest.square()
    return y, s / below.square() * above


def _position_and_slope(y: Tensor, b: _Bin) -> tuple[Tensor, Tensor]:
    """The t in [0, 1] of a height y in [0, 1], the root of a quadratic equation; the slope there.

    The coefficient q itself may have cancelled, so a Newton step follows; it is taken where it
    comes closer, for in a flat middle between steep ends it can overshoot.
    """
    s = b.height / b.width
    y_bent = y * (b.slope + b.next_slope - 2 * s)
    p, q, r = s - b.slope + y_bent, b.slope - y_bent, -s * y
    # Rounding can make the discriminant negative; in this form of the root nothing cancels.
    discriminant = (q.square() - 4 * p * r).clamp_min(torch.finfo(y.dtype).tiny)
    t = (-2 * r / (q + discriminant.sqrt())).clamp(0, 1)
    height, slope = _height_and_slope(t, b)
    t_next = (t - (height - y) / slope).clamp(0, 1)
    height_next, slope_next = _height_and_slope(t_next, b)
    closer = (height_next - y).abs() <= (height - y).abs()
    return torch.where(closer, t_next, t), torch.where(closer, slope_next, slope)
