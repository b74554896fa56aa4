"""Where a torch distribution has a density, and its log-density everywhere, -inf outside.

Decided here and not by torch's argument validation, which is a flag of the process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
    Uniform,
    constraints,
)

__all__ = ["is_bounded", "is_real", "log_density", "support_of"]


def support_of(distribution: Distribution) -> constraints.Constraint | None:
    """The support of a distribution; None where it does not say, or says more than it has."""
    if (made := _made(distribution)) is not None and not (
        is_real(support_of(made.base_dist))
        and all(is_real(transform.codomain) for transform in _parts(made.transforms)[:-1])
    ):
        return None  # torch says what the last transform can give
    try:
        return distribution.support
    except NotImplementedError:
        return None


def _made(distribution: Distribution) -> TransformedDistribution | None:
    """The distribution within, where it is another one, transformed."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    # A subclass, such as LogNormal, has a support of its own.
    return distribution if type(distribution) is TransformedDistribution else None


def _parts(transforms: Sequence[Transform]) -> list[Transform]:
    """Transforms, one after the other."""
    parts: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            parts += _parts(transform.parts)
        else:
            parts.append(transform)
    return parts


def is_real(support: constraints.Constraint | None) -> bool:
    """Whether a support is all of R^D."""
    while (within := getattr(support, "base_constraint", None)) is not None:
        support = within  # of an Independent, of a mixture
    return support is constraints.real


def is_bounded(distribution: Distribution) -> bool:
    """Whether the density may be zero somewhere."""
    return not is_real(support_of(distribution))


def log_density(distribution: Distribution, z: Tensor, rounding: float | None = None) -> Tensor:
    """Log-density (*batch,) of z (*batch, *event): -inf outside the support, NaN for NaN.

    What lies outside takes no part in the gradient.

    Args:
        distribution: that does not validate its arguments.
        z: where.
        rounding: the error that z has, in units of the width of an interval, or of the standard
            deviation on a half-line; None for eight units in the last place. A z that lies
            outside by less is read as its mirror image inside.
    """
    n = len(distribution.event_shape)
    middle: Tensor | None = None
    if (ends := _ends(distribution)) is not None:
        low, high, middle = ends
        rounding = 8 * torch.finfo(z.dtype).eps if rounding is None else rounding
        z = _mirrored(z, low, high, rounding * _scale(distribution, low, high))
    inside = _inside(distribution, z)
    unknown = z.isnan().unsqueeze(-1).flatten(z.ndim - n).any(-1)
    known = inside.reshape((*inside.shape, *[1] * n))
    safe = torch.where(known, z, z.detach() if middle is None else middle)
    log_prob = distribution.log_prob(safe)
    return log_prob.masked_fill(~inside, -torch.inf).masked_fill(unknown, torch.nan)


def _inside(distribution: Distribution, z: Tensor) -> Tensor:
    """Whether z (*batch, *event) lies in the support (*batch,)."""
    if isinstance(distribution, Independent):
        inside = _inside(distribution.base_dist, z)
        n = distribution.reinterpreted_batch_ndims
        return inside.flatten(inside.ndim - n).all(-1) if n else inside
    if (made := _made(distribution)) is not None:
        n = len(distribution.event_shape)
        inside = z.new_ones(z.shape[: z.ndim - n], dtype=torch.bool)
        for transform in reversed(_parts(made.transforms)):
            inside = inside & _all(transform.codomain.check(z), inside.ndim)
            z = transform.inv(z)
            inside = inside & _all(z.isfinite(), inside.ndim)  # an end, such as 1 of tanh
        return inside & _all(_inside(made.base_dist, z), inside.ndim)
    if isinstance(distribution, MixtureSameFamily):  # torch asks that all components hold z
        n = len(distribution.event_shape)
        return _inside(distribution.component_distribution, z.unsqueeze(-1 - n)).any(-1)
    support = support_of(distribution)
    if support is None:
        return z.new_ones(z.shape[: z.ndim - len(distribution.event_shape)], dtype=torch.bool)
    return support.check(z)


def _all(inside: Tensor, batch_dims: int) -> Tensor:
    return inside.flatten(batch_dims).all(-1) if inside.ndim > batch_dims else inside


def _ends(distribution: Distribution) -> tuple[Tensor, Tensor, Tensor] | None:
    """The ends of a support that is an interval or half-line in each number; a point inside."""
    base, support = distribution, support_of(distribution)
    while isinstance(base, Independent):
        base = base.base_dist
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    if support is None or support.is_discrete or (low is None and high is None):
        return None
    like = next(
        (t for t in vars(base).values() if isinstance(t, Tensor)), torch.empty((), device="cpu")
    )
    low, high = (
        torch.as_tensor(default if end is None else end, dtype=like.dtype, device=like.device)
        for end, default in ((low, -torch.inf), (high, torch.inf))
    )
    if isinstance(base, Uniform):  # whose density excludes the end that its support includes
        high = torch.nextafter(high, low)
    middle = torch.where(
        low.isinf(), high - 1, torch.where(high.isinf(), low + 1, low + (high - low) / 2)
    )
    return low, high, middle


def _scale(distribution: Distribution, low: Tensor, high: Tensor) -> Tensor:
    """The unit of the rounding: the width, or on a half-line the standard deviation, else 1."""
    width = high - low
    try:
        spread = distribution.stddev
    except NotImplementedError:
        spread = torch.ones_like(width)
    spread = torch.where(spread.isfinite(), spread, 1.0)
    return torch.where(width.isfinite(), width, spread)


def _mirrored(z: Tensor, low: Tensor, high: Tensor, reach: Tensor) -> Tensor:
    """z, and where it lies outside within reach its image on the other side of the end."""
    z = torch.where((z < low) & (z >= low - reach), 2 * low - z, z)
    return torch.where((z > high) & (z <= high + reach), 2 * high - z, z)
