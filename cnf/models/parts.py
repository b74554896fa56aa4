"""What the models share: stacks of layers, and what mixes dimensions between them."""

from __future__ import annotations

import torch

from cnf.checks import check_choice
from cnf.transforms import Compose, Conv1x1, Inverse, LULinear, Permutation, Transform

__all__ = ["MIXINGS", "mixing_layer", "stack"]

MIXINGS = ("none", "reverse", "random", "lu")
"""What may stand between layers."""


def mixing_layer(
    mixing: str, event_shape: tuple[int, ...], generator: torch.Generator | None = None
) -> list[Transform]:
    """What stands between two layers: nothing, a permutation, or a learned matrix.

    The matrix is that of the way from data to base, which training goes.
    """
    check_choice("mixing", mixing, MIXINGS)
    if mixing == "none":
        return []
    if mixing == "lu":
        kind = Conv1x1 if len(event_shape) == 3 else LULinear
        return [Inverse(kind(event_shape, generator=generator))]
    return [Permutation(event_shape, mixing, generator=generator)]


def stack(layers: list[list[Transform]]) -> Compose:
    """All of them in a row, base to data."""
    return Compose(*(transform for layer in layers for transform in layer))
