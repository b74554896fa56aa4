"""Dequantization: noise that fills the gaps between integers, and what it adds to the likelihood.

With noise u ~ q(u | x) in the unit cube, a density p of y = (x + u) / L gives integers x of D
dimensions the probability

    P(x) = E_q [ p(y) / (L^D q(u | x)) ],   log P(x) >= E_q [ log p(y) - D log L - log q(u | x) ]

So the inverse of these transforms draws u, and what stands for its log-determinant is
-D log L - log q(u | x): the log-likelihood of a flow that ends in one is a draw of that bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnf.noise import draw
from cnf.transforms.base import Choices, Transform, check_no_context, over_samples
from cnf.transforms.context import check_context, expand_context
from cnf.transforms.discrete import check_context_size
from cnf.transforms.quantization import Dequantization

if TYPE_CHECKING:
    from cnf.flow import Flow

__all__ = ["UniformDequantization", "VariationalDequantization"]


class UniformDequantization(Dequantization):
    """Uniform noise on integers: real numbers in the unit interval, whose density a flow can learn.

        inverse: y = (x + u) / L,  u ~ U(0, 1);    forward: x = floor(L y)

    Put last in a `Compose`, after a `Sigmoid`, it makes a flow of integers: `log_prob(x)` is a draw
    of a lower bound of log P(x), `sample` returns integers, and `flow.bits_per_dim(x, samples=k)`
    tightens the bound by k draws. The noise is never so near to 0 or 1 that x + u or y would be
    rounded to the next integer or to 1.

    Args:
        levels: L, the number of values, 0 to L - 1, of each dimension: 256 for pixels, 2^n for n
            bits. For a table, one for each column, and None for a column of real numbers, which
            stays as it is; with such a column x is of floating point, and `Sigmoid(columns=...)`
            before it is for the others.

    Shapes:
        x (*batch, *event) of any integer type, y the same of the flow's dtype. Of one number for
        all dimensions the log-determinant is that of each, and has the shape of x; a `Compose` or
        `Flow` sums it over samples. Samples are uint8 up to 256 levels, int64 above.

    Raises:
        TypeError: floating-point x where integers are due; levels of another kind.
        ValueError: levels below 2, or too many for the dtype; fractions in a column of integers.
            Integers that are no level have the log-probability -inf.

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


class VariationalDequantization(Dequantization):
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
