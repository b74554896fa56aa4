"""`Interval`: the real line to an interval, so that a flow has the support of its target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.checks import check_number, tracing
from cnf.ode.inputs import check_floating
from cnf.transforms.base import Choices, Transform, check_choices, check_no_context
from cnf.transforms.columns import check_columns, chosen_columns

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Interval"]


class Interval(Transform):
    """The real line to the interval from low to high, number by number.

        x = low + w sigmoid(z),    z = log(x - low) - log(high - x),    w = high - low
        log dx/dz = log sigmoid(z) + log sigmoid(-z) + log w

    Behind other transforms it makes a flow whose support is bounded, in some columns or in all.

    Args:
        low: lower end.
        high: upper end.
        columns: which entries of the last dimension it is for, by index; the others stay as they
            are. None for all.

    Shapes:
        z, x of any shape. The log-determinant is that of each number, and has the shape of x; a
        `Compose` or `Flow` sums it over samples.

    Raises:
        TypeError: ends that are no numbers; x of another dtype than float32 and float64.
        ValueError: ends that are not finite, or not in order; columns that are not different, or
            beyond x; x outside of the interval. The ends themselves, to which `forward` rounds far
            out, are read as a fraction of a rounding error inside.

    Example:
        >>> f = Interval(-4, 4)
        >>> f.forward(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([-4.,  0.,  4.])
        >>> f.inverse(torch.tensor([0.0, 2.0]))
        tensor([0.0000, 1.0986])
    """

    takes_context = False

    def __init__(self, low: float, high: float, columns: Sequence[int] | None = None) -> None:
        super().__init__()
        for name, end in (("low", low), ("high", high)):
            check_number(name, end)
            if not math.isfinite(end):
                raise ValueError(f"{name}={end!r} must be finite")
        if not low < high:
            raise ValueError(f"low={low!r} must be less than high={high!r}; swap them")
        self.low, self.high = float(low), float(high)
        self.columns = None if columns is None else check_columns(columns)

    @property
    def width(self) -> float:
        """high - low."""
        return self.high - self.low

    def extra_repr(self) -> str:
        """The ends, and the columns."""
        of = "" if self.columns is None else f", columns={self.columns}"
        return f"{self.low}, {self.high}{of}"

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x in the interval and log dx/dz, of every number."""
        chosen = self._check(z, context, choices)
        x = self.low + self.width * torch.sigmoid(z)
        # Where sigmoid(z) is 1, low + width may round to a number beyond high.
        x = x.clamp(self.low, self.high)
        log_det = F.logsigmoid(z) + F.logsigmoid(-z) + math.log(self.width)
        return torch.where(chosen, x, z), torch.where(chosen, log_det, 0.0)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z on the real line and log dz/dx, of every number."""
        chosen = self._check(x, context, choices)
        inside = torch.where(chosen, x, (self.low + self.high) / 2)
        self._check_inside(inside)
        # Each from its own end: 1 - s would lose the digits of an s near 1.
        log_below = self._distance(inside - self.low, self.low).log()
        log_above = self._distance(self.high - inside, self.high).log()
        z, log_det = log_below - log_above, math.log(self.width) - log_below - log_above
        return torch.where(chosen, z, x), torch.where(chosen, log_det, 0.0)

    def _distance(self, distance: Tensor, end: float) -> Tensor:
        """A distance from an end, above zero: less than the least that is not rounded to zero."""
        numbers = torch.finfo(distance.dtype)
        return distance.clamp(min=max(numbers.eps * abs(end) / 4, numbers.tiny))

    def _check(self, x: Tensor, context: Tensor | None, choices: Choices) -> Tensor:
        """Refuse wrong input; which columns are meant."""
        check_choices(choices)
        check_no_context(self, context)
        check_floating(x)
        return chosen_columns(self.columns, x)

    def _check_inside(self, x: Tensor) -> None:
        """Refuse what no z is mapped to; NaN stays NaN."""
        if x.is_meta or tracing():
            return
        outside = (x < self.low) | (x > self.high)
        if bool(outside.any()):
            known = x.detach().nan_to_num(self.low)
            raise ValueError(
                f"x has {int(outside.sum())} values outside of the interval from {self.low:g} to "
                f"{self.high:g}: they lie from {known.min().item():.6g} to "
                f"{known.max().item():.6g}; the flow has no density there, remove such samples"
            )
