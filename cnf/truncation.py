"""Parts of a flow: as far as some way from base to data, or as far as its dequantization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.base import as_base
from cnf.flow import Flow
from cnf.transforms import CNF, Compose, Inverse, Transform
from cnf.transforms.times import as_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cnf.transforms import Choices

__all__ = ["dequantized", "is_continuous", "parts_of", "truncate"]

ROUNDING = 1e-9  # of a fraction times a number of parts


def truncate(flow: Flow, fraction: float) -> Flow:
    """The flow stopped on its way: the density at a fraction of the path from base to data.

    The transforms of a `Compose`, those within it and within an `Inverse` of it too, are equal
    parts of the path. A CNF is cut in its time; any other part is in once the path has passed it.
    Parameters are shared.

    Args:
        flow: any flow.
        fraction: 0 for the base, 1 for the whole flow.

    Raises:
        ValueError: a fraction outside [0, 1].

    Example:
        >>> import cnf, torch
        >>> flow = cnf.FFJORD(2, blocks=2)
        >>> truncate(flow, 0.75).log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
        >>> len(truncate(cnf.RealNVP(2, layers=8), 0.5).transform)
        4
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1]")
    parts = parts_of(flow.transform)
    done = fraction * len(parts)
    whole = int(done + ROUNDING)
    taken, rest = parts[:whole], done - whole
    if rest > ROUNDING and is_continuous(parts[whole]):
        taken.append(_cut(parts[whole], rest))
    base = as_base(flow.base)
    return Flow(base, Compose(*taken) if taken else _Identity(base.event_shape))


def dequantized(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Flow, Tensor]:
    """Of a flow of integers, the flow of real numbers within it, and integers x with noise.

    Args:
        flow: a flow whose transform ends in a dequantization; any other comes back as it is.
        x: integers (*batch, *event).
        context: conditions (*batch, C), or broadcastable to it.
        generator: source of the noise.

    Example:
        >>> import cnf, torch
        >>> ends = cnf.Sigmoid(), cnf.UniformDequantization(4)
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(*ends))
        >>> flow, y = dequantized(flow, torch.tensor([[0, 3]]))
        >>> flow.transform, y.dtype
        (Compose(
          (transforms): ModuleList(
            (0): Sigmoid(alpha=0.05)
          )
        ), torch.float32)
    """
    if not flow.transform.quantized:
        return flow, x
    *rest, end = parts_of(flow.transform)
    choices: Choices = {} if generator is None else {"generator": generator}
    with torch.no_grad():
        y = end.inverse(x, context if end.takes_context else None, **choices)
    return Flow(flow.base, Compose(*rest) if rest else _Identity(flow.base.event_shape)), y


def parts_of(transform: Transform) -> list[Transform]:
    """What a transform does in a row, from base to data."""
    if isinstance(transform, Compose):
        return [part for each in transform for part in parts_of(each)]
    if isinstance(transform, Inverse):
        inner = transform.transform
        if isinstance(inner, Inverse):
            return parts_of(inner.transform)
        if isinstance(inner, Compose):
            return [part for each in reversed(list(inner)) for part in parts_of(Inverse(each))]
    return [transform]


def is_continuous(part: Transform) -> bool:
    """Whether it is a CNF, or the inverse of one."""
    return isinstance(part.transform if isinstance(part, Inverse) else part, CNF)


def _cut(part: Transform, fraction: float) -> Transform:
    """The first fraction of a CNF, or of the inverse of one."""
    block = part.transform if isinstance(part, Inverse) else part
    if not isinstance(block, CNF):
        raise TypeError(f"a {type(block).__name__} has no time to be cut in")
    start, end = (as_number(t) for t in block.times)
    if isinstance(part, Inverse):  # it runs from the end to the start
        times = (end + (start - end) * fraction, end)
    else:
        times = (start, start + (end - start) * fraction)
    cut = CNF(block.field, block.divergence, block.solver, event_dims=block.event_dims, times=times)
    return Inverse(cut) if isinstance(part, Inverse) else cut


class _Identity(Transform):
    """x = z, the path that has not begun."""

    event_shape: tuple[int, ...]
    takes_context = False

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = self.base_shape = event_shape

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z, and zeros."""
        return z, z.new_zeros(z.shape[: z.ndim - len(self.event_shape)])

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x, and zeros."""
        return self.forward_and_log_det(x)
