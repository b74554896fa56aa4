"""Integers at the data side of a flow: their levels, and what is accepted as such."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints

from cnf.checks import tracing
from cnf.ode.inputs import check_finite, check_floating
from cnf.transforms.base import Choices, Transform, check_choices, over_samples
from cnf.transforms.columns import Columns
from cnf.transforms.inputs import check_like, check_shape
from cnf.warn import warn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Dequantization"]

LARGEST = 2**50  # number of levels, which leaves float64 a digit for the noise


class Dequantization(Transform):
    """Integers x at the data side, numbers y = (x + u) / L at the other.

    A kind of it says what the noise u is: a draw and its log q(u | x), and log q of one that is
    given.
    """

    bounded = True
    levels: int | tuple[int | None, ...]
    like: Tensor

    def __init__(self, levels: int | Sequence[int | None]) -> None:
        super().__init__()
        self.levels = _check_levels(levels)
        if isinstance(self.levels, tuple):
            self.event_shape = self.base_shape = (len(self.levels),)
        self.register_buffer("like", torch.zeros(()), persistent=False)  # dtype and device

    def codomain(self, event_shape: tuple[int, ...]) -> constraints.Constraint:
        """The integers below the levels, of each number; real numbers in the other columns."""
        if isinstance(self.levels, int):
            own = constraints.integer_interval(0, self.levels - 1)
            return constraints.independent(own, len(event_shape))
        columns = [
            constraints.real if n is None else constraints.integer_interval(0, n - 1)
            for n in self.levels
        ]
        return Columns(columns)

    def extra_repr(self) -> str:
        """The levels."""
        return f"levels={self.levels}"

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """The integers x of numbers (*batch, *event), those outside [0, 1) to the nearest level.

        Warns:
            RuntimeWarning: numbers far outside, as of a flow without a `Sigmoid`.

        Raises:
            ValueError: numbers that are NaN, for which there are no integers.
        """
        check_choices(choices)
        check_floating(z)
        self._check_digits()
        scale, real = self._scale(), self._real()
        self._check_numbers(z, real)
        x = torch.minimum((z * scale).floor().clamp_min(0), scale - 1)
        if real is not None:
            return torch.where(real, z, x)
        return x.to(torch.uint8 if self._most <= 256 else torch.int64)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """y = (x + u) / L for a draw of u, and -log L - log q(u | x); -inf of no level."""
        check_choices(choices)
        x, outside = self._as_numbers(x)
        scale = self._scale()
        u, log_q = self._noise(x, context, choices)
        log_det = -(over_samples(scale.log().expand_as(x), log_q.ndim) + log_q)
        if outside is not None:
            wrong = over_samples(outside, log_q.ndim) > 0
            log_det = log_det.masked_fill(wrong, -torch.inf)
        return (x + u) / scale, log_det

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """The integers x, and log L + log q(u | x) of the u that z has above them."""
        x, scale = self.forward(z, context, **choices), self._scale()
        numbers = x.to(z.dtype)
        log_q = self._log_noise(z * scale - numbers, numbers, context, choices)
        return x, over_samples(scale.log().expand_as(z), log_q.ndim) + log_q

    def _check_numbers(self, z: Tensor, real: Tensor | None) -> None:
        """Refuse NaN; warn of what no `Sigmoid` has been through."""
        if z.is_meta or tracing():
            return
        z = z if real is None else z[..., ~real]
        if real is None and (lost := int(z.isnan().sum())):
            raise ValueError(
                f"{lost} of {z.numel()} numbers to be made integers are NaN: the flow has "
                "diverged; look at its weights, or at the on_failure of its solver"
            )
        if far := int(((z < -1) | (z > 2)).sum()):
            warn(
                f"{far} of {z.numel()} numbers to be made integers lie far outside of [0, 1), "
                "where log_prob counts none; put a cnf.Sigmoid() before the dequantization"
            )

    @abstractmethod
    def _noise(self, x: Tensor, context: Tensor | None, choices: Choices) -> tuple[Tensor, Tensor]:
        """u (*batch, *event) in the open unit cube, and log q(u | x)."""

    @abstractmethod
    def _log_noise(self, u: Tensor, x: Tensor, context: Tensor | None, choices: Choices) -> Tensor:
        """log q(u | x)."""

    def _scale(self) -> Tensor:
        """L (), or of each column (D,), 1 for real ones."""
        if isinstance(self.levels, int):
            return self.like.new_full((), self.levels)
        return self.like.new_tensor([n or 1 for n in self.levels])

    def _real(self) -> Tensor | None:
        """Which columns are real (D,), None for none of them."""
        if isinstance(self.levels, int) or None not in self.levels:
            return None
        return torch.tensor([n is None for n in self.levels], device=self.like.device)

    @property
    def _most(self) -> int:
        """The largest L."""
        each = (self.levels,) if isinstance(self.levels, int) else self.levels
        return max(n for n in each if n is not None)

    @property
    def _noise_bits(self) -> int:
        """So many binary digits of u survive that x + u and (x + u) / L are rounded."""
        digits = -round(math.log2(torch.finfo(self.like.dtype).eps))
        return digits - math.ceil(math.log2(self._most)) - 1

    def _check_digits(self) -> None:
        """Refuse a dtype that cannot hold integers with noise."""
        if self.like.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the flow is {self.like.dtype}, expected float32 or float64; use flow.float()"
            )
        if self._noise_bits < 1:
            raise ValueError(
                f"levels={self.levels} are too many for {self.like.dtype}, which has no digits "
                "left for the noise; use flow.double()"
            )

    def _as_numbers(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Integers x (*batch, *event) as floating-point numbers, checked, and which are no level.

        Those are 0; None in place of which they are, where there can be none.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
        self._check_digits()
        real = self._real()
        floating = x.is_floating_point() or x.is_complex()
        if floating != (real is not None):
            raise TypeError(self._refusal(x, f"{str(x.dtype).removeprefix('torch.')} with "))
        if real is not None:
            check_floating(x)
            check_like(x, self)
        elif x.device != self.like.device:
            raise ValueError(
                f"x is on {x.device} but the flow is on {self.like.device}; use "
                f"x.to({str(self.like.device)!r})"
            )
        if self.event_shape is not None:
            check_shape(x, self.event_shape)
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch can but convert
            x = x.long()
        outside = self._outside(x, real)
        x = x.to(self.like.dtype)
        return (x, None) if outside is None else (x.masked_fill(outside, 0.0), outside)

    def _outside(self, x: Tensor, real: Tensor | None) -> Tensor | None:
        """Which x are none of the levels; fractions are refused, where values can be looked at."""
        if x.is_meta or (x.dtype == torch.uint8 and self.levels == 256):
            return None
        outside = (x < 0) | (x >= self._scale())
        if real is None:
            return outside
        fraction = (x != x.floor()) & ~real
        if not tracing():
            check_finite(x, x.ndim - 1)
            if bool(fraction.any()):
                raise ValueError(self._refusal(x))
        return (outside & ~real) | (fraction & ~x.isnan())

    def _refusal(self, x: Tensor, kind: str = "") -> str:
        """What is expected of x, and what it is."""
        real = self._real()
        if isinstance(self.levels, int):
            expected = f"integers from 0 to {self.levels - 1}"
        else:
            expected = f"whole numbers from 0 to one less than levels={self.levels}"
        if real is not None:
            expected += " (None: any number; all as floats)"
            x = x[..., ~real] if x.shape[-1:] == real.shape else x
        seen = f"got {kind}values {_range_of(x)}"
        if real is not None and not x.is_floating_point():
            return f"x must hold {expected}, {seen}; use x.float()"
        if kind:
            looked_at = x.is_floating_point() and not (x.is_meta or tracing())
            unit = looked_at and bool(((x >= 0) & (x <= 1)).all())
            whole = f"({self._most - 1} * x)" if unit else "x"
            return f"x must hold {expected}, {seen}; use {whole}.round().to(torch.uint8)"
        return f"x must hold {expected}, {seen}, with fractions; name its real columns by None"


def _range_of(x: Tensor) -> str:
    """From the least to the largest of its values that are numbers."""
    known = x.detach()
    if x.is_complex() or x.is_meta or tracing():
        return "that have no order" if x.is_complex() else "unknown"
    if not x.numel():
        return "of an empty tensor"
    if x.is_floating_point():
        known = known[~known.isnan()]
        if not known.numel():
            return "NaN"
    low, high = known.min().item(), known.max().item()
    return f"from {low:.6g} to {high:.6g}" if x.is_floating_point() else f"from {low} to {high}"


def _check_levels(levels: int | Sequence[int | None]) -> int | tuple[int | None, ...]:
    """A number of levels, or one for each column, None for a real one.

    Raises:
        TypeError: of another kind.
        ValueError: below 2, above what float64 can hold with noise, or no number at all.
    """
    if isinstance(levels, Integral):
        return _check_level(levels, levels)
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(
            f"levels={levels!r} must be an integer, such as 256, or one for each column of a table"
        )
    each = tuple(None if n is None else _check_level(n, levels) for n in levels)
    if all(n is None for n in each):
        raise ValueError(f"levels={levels!r} names no column of integers")
    return each


def _check_level(n: object, levels: object) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"levels={levels!r} must be integers, such as 256")
    if not 2 <= int(n) <= LARGEST:
        raise ValueError(
            f"levels={levels!r} must be 2 or more, for values from 0 to levels - 1, and at most "
            "2^50"
        )
    return int(n)
