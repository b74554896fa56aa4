"""Draws of noise like a tensor, from a generator of whatever device or from torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["draw"]


def draw(
    sampler: Callable[..., Tensor], *args: Any, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """sampler(*args), of the dtype and device of `like`; drawn on the generator's device.

    Args:
        sampler: `torch.rand`, `torch.randn` or `torch.randint`.
        args: its positional arguments.
        like: a tensor of the wanted dtype and device.
        generator: source of randomness, None for torch's global one.

    Example:
        >>> draw(torch.rand, (2, 3), like=torch.zeros(()).double(), generator=None).dtype
        torch.float64
    """
    try:
        return _drawn(sampler, args, like, generator)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
    raise RuntimeError(
        "noise is drawn under torch.func.vmap, which must be told whether the samples share it: "
        "use torch.func.vmap(..., randomness='different'), or 'same'; log_prob draws none with "
        "divergence='exact'"
    )


def _drawn(
    sampler: Callable[..., Tensor],
    args: Sequence[Any],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    if generator is None:  # a keyword of None stops torch.compile where a shape is symbolic
        return sampler(*args, dtype=like.dtype, device=like.device)
    drawn = sampler(*args, dtype=like.dtype, device=generator.device, generator=generator)
    return drawn.to(like.device)
