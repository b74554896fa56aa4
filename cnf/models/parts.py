"""What the models share: stacks of layers, and what mixes dimensions between them."""

from __future__ import annotations

import torch

from cnf.checks import check_choice
from cnf.transforms import Compose, Conv1x1, Inverse, LULinear, Permutation, Transform

__all__ = ["MIXINGS", "check_squeezes", "mixed", "mixing_layer", "stack"]

MIXINGS = ("none", "reverse", "random", "lu")
"""What may stand between layers."""


def mixing_layer(
    mixing: str,
    event_shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    kept: int = 0,
) -> list[Transform]:
    """What stands between two layers: nothing, a permutation, or a learned matrix.

    The matrix is that of the way from data to base, which training goes. A random permutation
    puts none of the first `kept` dimensions there again, where the layer would not change them.
    """
    check_choice("mixing", mixing, MIXINGS)
    if mixing == "none":
        return []
    if mixing == "lu":
        kind = Conv1x1 if len(event_shape) == 3 else LULinear
        return [Inverse(kind(event_shape, generator=generator))]
    if mixing == "reverse":
        return [Permutation(event_shape, mixing)]
    order = Permutation(event_shape, "random", generator=generator).order.tolist()
    first = [i for i in order if i >= kept][:kept]
    rest = [i for i in order if i not in first]
    return [Permutation(event_shape, first + rest)]


def mixed(
    layers: list[Transform],
    mixing: str,
    event_shape: tuple[int, ...],
    generator: torch.Generator | None = None,
) -> list[list[Transform]]:
    """Layers that take turns, each with what mixes behind it.

    Permutations stand behind every second layer: within a pair, two masks or two orders complete
    each other, which a permutation between them could undo.
    """
    made: list[list[Transform]] = []
    for i, layer in enumerate(layers):
        behind = mixing == "lu" or i % 2 == 1
        made.append([layer, *(mixing_layer(mixing, event_shape, generator) if behind else [])])
    return made


def stack(layers: list[list[Transform]]) -> Compose:
    """All of them in a row, base to data."""
    return Compose(*(transform for layer in layers for transform in layer))


def check_squeezes(shape: tuple[int, ...], levels: int, squeezes: int) -> None:
    """Refuse an image (C, H, W) that cannot be squeezed so often.

    Raises:
        ValueError: a height or width that is not divisible by 2^squeezes.
    """
    for name, size in zip(("height", "width"), shape[1:], strict=True):
        for done in range(squeezes):
            if size >> done & 1:
                raise ValueError(
                    f"features={shape} cannot be squeezed {squeezes} times, as levels={levels} "
                    f"asks: {name} {size} not divisible by {2 ** (done + 1)}; use fewer levels, or "
                    "pad or crop"
                )
