"""`Interval`: the real line to an interval or a half-line, for targets of bounded support."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from cnf.checks import check_number
from cnf.ode.inputs import check_floating
from cnf.transforms.base import Choices, Transform, check_choices, check_no_context
from cnf.transforms.columns import Columns, LessThanEq, check_columns, chosen_columns, of_columns
from cnf.transforms.inputs import check_like, check_shape
from cnf.transforms.roots import softplus

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Interval"]


class Interval(Transform):
    """The real line to the interval from low to high, number by number.

        x = low + w sigmoid(z),    z = log(x - low) - log(high - x),    w = high - low
        log dx/dz = log sigmoid(z) + log sigmoid(-z) + log w

    An infinite end makes it a half-line, two make it the identity:

        x = low + softplus(z),     log dx/dz = log sigmoid(z),     where high is infinite
        x = high - softplus(-z),   log dx/dz = log sigmoid(-z),    where low is infinite

    Behind other transforms it makes a flow whose support is bounded, in some columns or in all.
    Outside the support log_prob is -inf.

    Args:
        low: lower end, a number or a tensor that broadcasts against a sample: 21 bounded
            parameters are one transform. Tensors become buffers.
        high: upper end, likewise.
        columns: which entries of the last dimension it is for, by index; the others stay as they
            are. None for all. With tensors, give those entries the ends -inf and inf instead.

    Shapes:
        z, x of any shape. The log-determinant is that of each number, and has the shape of x; a
        `Compose` or `Flow` sums it over samples.

    Raises:
        TypeError: ends that are neither numbers nor tensors; x of another dtype than float32 and
            float64.
        ValueError: ends that are NaN, or not in order; columns that are not different, or beyond
            x; x outside in `inverse`, which has no log-determinant to say so. The ends themselves,
            to which `forward` rounds far out, are read as a fraction of a rounding error inside.

    Example:
        >>> f = Interval(-4, 4)
        >>> f.forward(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([-4.,  0.,  4.])
        >>> f.inverse(torch.tensor([0.0, 2.0]))
        tensor([0.0000, 1.0986])
        >>> positive = Interval(torch.tensor([0.0, -1.0]), torch.tensor([math.inf, 1.0]))
        >>> positive.forward(torch.tensor([[-100.0, 100.0]]))
        tensor([[3.7835e-44, 1.0000e+00]])
    """

    takes_context = False
    bounded = True
    low: float | Tensor
    high: float | Tensor

    def __init__(
        self, low: float | Tensor, high: float | Tensor, columns: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.columns = None if columns is None else check_columns(columns)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            if columns is not None:
                raise ValueError(
                    f"columns={self.columns} are for ends that are numbers; in tensors, give the "
                    "columns that stay as they are the ends -inf and inf"
                )
            for name, end in zip(("low", "high"), _as_tensors(low, high), strict=True):
                self.register_buffer(name, end)
        else:
            _check_numbers(low, high)
            self.low, self.high = float(low), float(high)
        self._find_kinds()

    def _find_kinds(self) -> None:
        """Which of its ends are finite, low and high, in any of its numbers."""
        if not isinstance(self.low, Tensor) or not isinstance(self.high, Tensor):
            self.kinds = [(math.isfinite(self.low), math.isfinite(self.high))]
        elif not self.low.is_meta:
            finite = torch.stack((self.low.isfinite(), self.high.isfinite()), -1).flatten(0, -2)
            self.kinds = [(bool(low), bool(high)) for low, high in finite.unique(dim=0)]
        else:
            self.kinds = list(FORMULAS)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_kinds()

    @property
    def _ends(self) -> tuple[Any, Any]:
        """Two numbers or two tensors."""
        return self.low, self.high

    def codomain(self, event_shape: tuple[int, ...]) -> constraints.Constraint:
        """The interval or half-line, of each number."""
        if not isinstance(self.low, Tensor) or not isinstance(self.high, Tensor):
            return of_columns(_constraint(*self._ends), self.columns, event_shape)
        n = len(event_shape)
        if n != 1 or self.kinds == [(True, True)]:
            return constraints.independent(constraints.interval(self.low, self.high), n)
        ends = zip(*(e.expand(event_shape).tolist() for e in (self.low, self.high)), strict=True)
        return Columns([_constraint(*e) for e in ends])

    def extra_repr(self) -> str:
        """The ends, and the columns."""
        if isinstance(self.low, Tensor):
            return f"low and high of shape {tuple(self.low.shape)}"
        of = "" if self.columns is None else f", columns={self.columns}"
        return f"{self.low}, {self.high}{of}"

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x in the interval and log dx/dz, of every number."""
        chosen = self._check(z, context, choices)
        x, log_det = self._by_kind(0, z)
        x = x.clamp(*self._ends)  # where sigmoid(z) is 1, low + w may round beyond high
        return torch.where(chosen, x, z), torch.where(chosen, log_det, 0.0)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z on the real line and log dz/dx, of every number; outside they are 0 and -inf."""
        chosen = self._check(x, context, choices)
        z, log_det = self._by_kind(1, x)
        outside = self._outside(x)
        z, log_det = z.masked_fill(outside, 0.0), log_det.masked_fill(outside, -torch.inf)
        return torch.where(chosen, z, x), torch.where(chosen, log_det, 0.0)

    def _by_kind(self, direction: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The formulas of a direction, each where its ends are."""
        if len(self.kinds) == 1:
            return FORMULAS[self.kinds[0]][direction](x, self.low, self.high)
        low, high = (torch.as_tensor(end, device=x.device) for end in (self.low, self.high))
        finite = low.isfinite(), high.isfinite()
        value, log_det = x, torch.zeros_like(x)
        for kind in self.kinds:
            own = (finite[0] == kind[0]) & (finite[1] == kind[1])
            ends = torch.where(own, low, 0.0), torch.where(own, high, 1.0)
            found, slope = FORMULAS[kind][direction](x, *ends)
            value, log_det = torch.where(own, found, value), torch.where(own, slope, log_det)
        return value, log_det

    def _outside(self, x: Tensor) -> Tensor:
        """Which numbers no z is mapped to; NaN is not one of them."""
        return (x < self.low) | (x > self.high)

    def _check(self, x: Tensor, context: Tensor | None, choices: Choices) -> Tensor:
        """Refuse wrong input; which columns are meant."""
        check_choices(choices)
        check_no_context(self, context)
        check_floating(x)
        if isinstance(self.low, Tensor):
            check_like(x, self)
            shape = self.low.shape
            sizes = zip(reversed(x.shape), reversed(shape), strict=False)
            if x.ndim < len(shape) or not all(n in (1, m) for m, n in sizes):
                check_shape(x, shape)
        return chosen_columns(self.columns, x)


def _interval_forward(z: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    width = high - low
    return low + width * torch.sigmoid(z), F.logsigmoid(z) + F.logsigmoid(-z) + _log(width)


def _interval_inverse(x: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    # Each from its own end: 1 - s would lose the digits of an s near 1.
    log_below, log_above = _distance(x - low, low).log(), _distance(high - x, high).log()
    return log_below - log_above, _log(high - low) - log_below - log_above


def _above_forward(z: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    return low + softplus(z), F.logsigmoid(z)


def _above_inverse(x: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    distance = _distance(x - low, low)
    log_share = (-torch.expm1(-distance)).log()  # of sigmoid(z) = 1 - exp(-distance)
    return distance + log_share, -log_share


def _below_forward(z: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    x, log_det = _above_forward(-z, -high, None)
    return -x, log_det


def _below_inverse(x: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    z, log_det = _above_inverse(-x, -high, None)
    return -z, log_det


def _identity(x: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    return x, torch.zeros_like(x)


Formula = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor]]

FORMULAS: dict[tuple[bool, bool], tuple[Formula, Formula]] = {
    (True, True): (_interval_forward, _interval_inverse),
    (True, False): (_above_forward, _above_inverse),
    (False, True): (_below_forward, _below_inverse),
    (False, False): (_identity, _identity),
}
"""Whether low and high are finite -> z to x, and x to z, with the logarithms of their slopes."""


def _distance(distance: Tensor, end: Any) -> Tensor:
    """A distance from an end, above zero: less than the least that is not rounded to zero."""
    numbers = torch.finfo(distance.dtype)
    return distance.clamp(min=abs(end) * (numbers.eps / 4) + numbers.tiny)


def _log(width: Any) -> Any:
    return width.log() if isinstance(width, Tensor) else math.log(width)


def _constraint(low: float, high: float) -> constraints.Constraint:
    """What lies between two ends, either of which may be infinite."""
    if math.isfinite(low) and math.isfinite(high):
        return constraints.interval(low, high)
    if math.isfinite(low):
        return constraints.greater_than_eq(low)
    return LessThanEq(high) if math.isfinite(high) else constraints.real


def _check_numbers(low: object, high: object) -> None:
    """Refuse what are no ends."""
    for name, end in (("low", low), ("high", high)):
        check_number(name, end)  # type: ignore[arg-type]
        if math.isnan(end):  # type: ignore[arg-type]
            raise ValueError(f"{name}={end!r} must be a number, infinite for a half-line")
    if not low < high:  # type: ignore[operator]
        raise ValueError(f"low={low!r} must be less than high={high!r}; swap or change them")


def _as_tensors(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """Ends of one shape, dtype and memory of their own, checked.

    Raises:
        TypeError: tensors that are not of numbers.
        ValueError: shapes that do not broadcast, NaN, or ends that are not in order.
    """
    for name, end in (("low", low), ("high", high)):
        if not isinstance(end, Tensor):
            check_number(name, end)
        elif end.is_complex() or end.dtype == torch.bool:
            raise TypeError(f"{name} must hold numbers, got {end.dtype}")
    dtype = torch.result_type(low, high)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    device = next(end.device for end in (low, high) if isinstance(end, Tensor))
    ends = [torch.as_tensor(end, device=device).detach().to(dtype) for end in (low, high)]
    try:
        ends = [end.clone() for end in torch.broadcast_tensors(*ends)]
    except RuntimeError:
        shapes = " and ".join(str(tuple(end.shape)) for end in ends)
        raise ValueError(f"low and high have the shapes {shapes}, which do not broadcast") from None
    wrong = ~(ends[0] < ends[1])  # NaN too
    if not wrong.is_meta and bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"low must be less than high, and neither NaN, but {int(wrong.sum())} of "
            f"{wrong.numel()} pairs are not (first index {first}: low={ends[0][first].item():.6g}, "
            f"high={ends[1][first].item():.6g}); swap them"
        )
    return ends[0], ends[1]
