"""Dequantization: noise that fills the gaps between integers, and what it adds to the likelihood.

With noise u ~ q(u | x) in the unit cube, a density p of y = (x + u) / L gives integers x of D
dimensions the probability

    P(x) = E_q [ p(y) / (L^D q(u | x)) ],   log P(x) >= E_q [ log p(y) - D log L - log q(u | x) ]

So the inverse of these transforms draws u, and what stands for its log-determinant is
-D log L - log q(u | x): the log-likelihood of a flow that ends in one is a draw of that bound.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnf.checks import tracing
from cnf.noise import draw
from cnf.ode.inputs import check_finite, check_floating
from cnf.transforms.base import (
    Choices,
    Transform,
    check_choices,
    check_no_context,
    over_samples,
)
from cnf.transforms.context import check_context, expand_context
from cnf.transforms.discrete import check_context_size
from cnf.transforms.inputs import check_like, check_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cnf.flow import Flow

__all__ = ["UniformDequantization", "VariationalDequantization"]

LARGEST = 2**50  # number of levels, which leaves float64 a digit for the noise


class _Dequantization(Transform):
    """Integers x at the data side, numbers y = (x + u) / L at the other."""

    levels: int | tuple[int | None, ...]
    like: Tensor

    def __init__(self, levels: int | Sequence[int | None]) -> None:
        super().__init__()
        self.levels = _check_levels(levels)
        if isinstance(self.levels, tuple):
            self.event_shape = self.base_shape = (len(self.levels),)
        self.register_buffer("like", torch.zeros(()), persistent=False)  # dtype and device

    def extra_repr(self) -> str:
        """The levels."""
        return f"levels={self.levels}"

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """The integers x of numbers (*batch, *event), those outside [0, 1) to the nearest level.

        Raises:
            ValueError: numbers that are not finite, for which there are no integers.
        """
        check_choices(choices)
        check_floating(z)
        self._check_digits()
        scale, real = self._scale(), self._real()
        x = torch.minimum((z * scale).floor().clamp_min(0), scale - 1)
        if real is not None:
            return torch.where(real, z, x)
        if not (z.is_meta or tracing()) and (lost := int(z.isnan().sum())):
            raise ValueError(
                f"{lost} of {z.numel()} numbers to be made integers are NaN: the flow has "
                "diverged; look at its weights, or at the on_failure of its solver"
            )
        return x.to(torch.uint8 if self._most <= 256 else torch.int64)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """y = (x + u) / L for a draw of u, and -log L - log q(u | x)."""
        check_choices(choices)
        x, scale = self._as_numbers(x), self._scale()
        u, log_q = self._noise(x, context, choices)
        log_scale = over_samples(scale.log().expand_as(x), log_q.ndim)
        return (x + u) / scale, -(log_scale + log_q)

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """The integers x, and log L + log q(u | x) of the u that z has above them."""
        x, scale = self.forward(z, context, **choices), self._scale()
        numbers = x.to(z.dtype)
        log_q = self._log_noise(z * scale - numbers, numbers, context, choices)
        return x, over_samples(scale.log().expand_as(z), log_q.ndim) + log_q

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

    def _as_numbers(self, x: Tensor) -> Tensor:
        """Integers x (*batch, *event) as floating-point numbers, checked."""
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
        self._check_values(x, real)
        return x.to(self.like.dtype)

    def _check_values(self, x: Tensor, real: Tensor | None) -> None:
        """Refuse what is not one of the levels."""
        if (
            x.is_meta
            or tracing()
            or not x.numel()
            or (x.dtype == torch.uint8 and self.levels == 256)
        ):
            return
        wrong = (x < 0) | (x >= self._scale())
        if real is not None:
            check_finite(x, x.ndim - 1)
            wrong = (wrong | (x != x.floor())) & ~real
        if wrong.any():
            raise ValueError(self._refusal(x))

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
            unit = x.is_floating_point() and bool(((x >= 0) & (x <= 1)).all())
            whole = f"({self._most - 1} * x)" if unit else "x"
            return f"x must hold {expected}, {seen}; use {whole}.round().to(torch.uint8)"
        if x.is_floating_point() and (x != x.floor()).any():
            return f"x must hold {expected}, {seen}, with fractions; name its real columns by None"
        return (
            f"x must hold {expected}, {seen}; shift them to begin at 0, and choose levels= to "
            "cover them"
        )


class UniformDequantization(_Dequantization):
    """Uniform noise on integers: real numbers in the unit interval, whose density a flow can learn.

        inverse: y = (x + u) / L,  u ~ U(0, 1);    forward: x = floor(L y)

    Put last in a `Compose`, after a `Sigmoid`, it makes a flow of integers: `log_prob(x)` is a draw
    of a lower bound of log P(x), `sample` returns integers, and `flow.bits_per_dim(x, samples=k)`
    tightens the bound by k draws. The noise is never so near to 0 or 1 that x + u or y would be
    rounded to the next integer or to 1.

    Args:
        levels: L, the number of values, 0 to L - 1, of each dimension: 256 for pixels, 2^n for n
            bits. For a table, one for each column, and None for a column of real numbers, which
            stays as it is; with such a column x is of floating point.

    Shapes:
        x (*batch, *event) of any integer type, y the same of the flow's dtype. Of one number for
        all dimensions the log-determinant is that of each, and has the shape of x; a `Compose` or
        `Flow` sums it over samples. Samples are uint8 up to 256 levels, int64 above.

    Raises:
        TypeError: floating-point x where integers are due; levels of another kind.
        ValueError: levels below 2, or too many for the dtype; x that is not one of the levels.

    Reference: Uria et al., arXiv 1306.0186; Theis et al., arXiv 1511.01844.

    Example:
        >>> import cnf
        >>> flow = cnf.RealNVP((1, 8, 8), hidden=(16,))
        >>> ends = cnf.Sigmoid(), cnf.UniformDequantization(17)
        >>> flow = cnf.Flow(flow.base, cnf.Compose(flow.transform, *ends))
        >>> x = torch.randint(17, (5, 1, 8, 8))
        >>> flow.log_prob(x).shape, flow.bits_per_dim(x, samples=4).shape, flow.sample((3,)).dtype
        (torch.Size([5]), torch.Size([5]), torch.uint8)
    """

    takes_context = False

    def __init__(self, levels: int | Sequence[int | None] = 256) -> None:
        super().__init__(levels)

    def _noise(self, x: Tensor, context: Tensor | None, choices: Choices) -> tuple[Tensor, Tensor]:
        check_no_context(self, context)
        u = draw(torch.rand, x.shape, like=x, generator=choices.get("generator"))
        steps = 2**self._noise_bits
        u = ((u * steps).floor() + 0.5) / steps  # the middles of equal parts
        real = self._real()
        if real is not None:
            u = u.masked_fill(real, 0.0)
        return u, self._log_noise(u, x, context, choices)

    def _log_noise(self, u: Tensor, x: Tensor, context: Tensor | None, choices: Choices) -> Tensor:
        return torch.zeros_like(x) if self.event_shape is None else x.new_zeros(x.shape[:-1])


class VariationalDequantization(_Dequantization):
    """Noise on integers from a flow q(u | x) that is learned with the rest.

        inverse: y = (x + u) / L,  u = Phi(v),  v ~ q(v | x);    forward: x = floor(L y)

    with Phi the standard normal distribution function, by which a q that is the standard normal, as
    discrete flows are at first, gives uniform noise.

    The bound is tight where q(u | x) is the density of u given x, so a q that learns it leaves the
    model a density of its own choice between the integers, where uniform noise asks for a flat one.
    log_prob of the whole flow has a gradient in the parameters of q; `MaximumLikelihood` trains
    them together.

    Args:
        q: a flow of the shape of x, given context of as many features as x has dimensions, x scaled
            to (-1, 1) and flattened. For images give its networks `context_shape=` (`ConvNet`,
            `ConvField`), by which they see it as an image; they take no other context beside it.
        levels: L, the number of values of each dimension, see `UniformDequantization`; no column
            may be None.
        context: number of context features of the whole flow that q is given behind x.

    Shapes:
        x (*batch, *event) of any integer type, y the same of the flow's dtype; log_det (*batch,).

    Raises:
        TypeError: q is not a Flow; floating-point x where integers are due.
        ValueError: q without context, or of integers itself; levels as above.

    Reference: Ho et al., arXiv 1902.00275.

    Example:
        >>> import cnf
        >>> from cnf.transforms import ConvNet
        >>> shape = (1, 8, 8)
        >>> def network(inputs, outputs, context):
        ...     return ConvNet(inputs, outputs, context, hidden=(16,), context_shape=shape)
        >>> q = cnf.RealNVP(shape, layers=2, context=64, conditioner=network)
        >>> f = VariationalDequantization(q, levels=17)
        >>> y, log_det = f.inverse_and_log_det(torch.randint(17, (5, *shape)))
        >>> y.shape, log_det.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    event_shape: tuple[int, ...]
    q: Flow
    context: int

    def __init__(
        self, q: Flow, levels: int | Sequence[int | None] = 256, *, context: int = 0
    ) -> None:
        super().__init__(levels)
        check_context_size(context)
        self.event_shape = self.base_shape = _check_noise_flow(q, self.event_shape, context)
        if self._real() is not None:
            raise ValueError(
                f"levels={self.levels} has None for columns of real numbers, which take no noise; "
                "use UniformDequantization"
            )
        self.q = q
        self.context = context

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether q is given some besides x."""
        return self.context > 0

    def _noise(self, x: Tensor, context: Tensor | None, choices: Choices) -> tuple[Tensor, Tensor]:
        given = self._given(x, context)
        start = self.q.base.rsample(tuple(given.shape[:-1]), choices.get("generator"))
        v, log_det = self.q.transform.forward_and_log_det(start, given, **choices)
        u = self._edge + (1 - 2 * self._edge) * torch.special.ndtr(v)
        return u, self._log_density(start, -log_det) - self._log_slope(v)

    def _log_noise(self, u: Tensor, x: Tensor, context: Tensor | None, choices: Choices) -> Tensor:
        part = ((u - self._edge) / (1 - 2 * self._edge)).clamp(self._edge, 1 - self._edge)
        v = torch.special.ndtri(part)
        start, log_det = self.q.transform.inverse_and_log_det(v, self._given(x, context), **choices)
        return self._log_density(start, log_det) - self._log_slope(v)

    def _log_density(self, start: Tensor, log_det: Tensor) -> Tensor:
        """log q(v | x) (*batch,)."""
        log_prob: Tensor = self.q.base.log_prob(start)
        return log_prob + over_samples(log_det, log_prob.ndim)

    @property
    def _edge(self) -> float:
        """u stays as far from 0 and 1, so that x + u is not rounded to an integer."""
        return 0.5 ** (self._noise_bits + 1)

    def _log_slope(self, v: Tensor) -> Tensor:
        """log du/dv (*batch,)."""
        slopes = math.log1p(-2 * self._edge) - 0.5 * (v.square() + math.log(2 * math.pi))
        return over_samples(slopes, v.ndim - len(self.event_shape))

    def _given(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What q is given (*batch, D + C): x, scaled and flattened, and context."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        image = ((2 * x + 1) / self._scale() - 1).reshape(*batch, math.prod(self.event_shape))
        if not self.context:
            check_no_context(self, context)
            return image
        if context is None:
            raise ValueError(
                f"context is missing: this VariationalDequantization was built with "
                f"context={self.context}; pass context of shape (..., {self.context})"
            )
        check_context(context)
        if context.shape[-1] != self.context:
            raise ValueError(
                f"context has {context.shape[-1]} features, expected context={self.context}"
            )
        return torch.cat((image, expand_context(context, batch)), -1)


def _range_of(x: Tensor) -> str:
    """From the least to the largest of its values that are numbers."""
    known = x.detach()
    if x.is_complex() or not x.numel():
        return "that are complex" if x.is_complex() else "of an empty tensor"
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


def _check_noise_flow(q: Flow, expected: tuple[int, ...] | None, context: int) -> tuple[int, ...]:
    """The event shape of q, which must be a flow of real numbers given context."""
    transform = getattr(q, "transform", None)
    if not isinstance(q, nn.Module) or not isinstance(transform, Transform):
        raise TypeError(
            f"q must be a cnf.Flow, such as cnf.RealNVP(D, context=D), got {type(q).__name__}"
        )
    shape: tuple[int, ...] = q.event_shape
    if transform.quantized:
        raise ValueError("q is a flow of integers; expected one of real numbers")
    if not transform.takes_context:
        raise ValueError(
            f"q takes no context, but its noise depends on x; build it with "
            f"context={math.prod(shape) + context}"
        )
    given = math.prod(shape) + context
    sizes = {getattr(part, "context", 0) for part in transform.modules()} - {0}
    if sizes and all(isinstance(n, int) for n in sizes) and given not in sizes:
        raise ValueError(
            f"q takes context of {', '.join(map(str, sizes))} features, but is given {given}: the "
            f"{math.prod(shape)} of x and context={context}; build it with context={given}"
        )
    if expected is not None and expected != shape:
        raise ValueError(
            f"q has event_shape {shape}, but levels= names {expected[0]} columns; use "
            f"levels=256, or q of event_shape {expected}"
        )
    return shape
