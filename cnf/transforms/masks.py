"""Masks of couplings: which dimensions are kept and condition the others (True), by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.fields.base import event_shape_of

__all__ = ["MASKS", "make_mask"]


def _halves(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """The first half of the first dimension, the smaller one if it is odd."""
    return _along_first(torch.arange(shape[0]) < shape[0] // 2, shape)


def _alternating(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Every second entry of the first dimension."""
    return _along_first(torch.arange(shape[0]) % 2 == 1, shape)


def _random(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """A random half of the first dimension."""
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(shape[0], generator=generator, device=device).cpu()
    return _along_first(order < shape[0] // 2, shape)


def _checkerboard(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Every second pixel of an image, of all its channels."""
    if len(shape) != 3:
        raise ValueError(f"mask='checkerboard' is for images (C, H, W), got the shape {shape}")
    rows, columns = torch.arange(shape[1]), torch.arange(shape[2])
    return ((rows[:, None] + columns) % 2 == 1).expand(shape)


def _along_first(kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(D,) -> (D, ...), the same for all further dimensions."""
    return kept.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


MASKS: dict[str, Callable[[tuple[int, ...], torch.Generator | None], Tensor]] = {
    "halves": _halves,
    "alternating": _alternating,
    "random": _random,
    "checkerboard": _checkerboard,
    "channel": _halves,
}
"""Every mask that has a name."""


def make_mask(
    mask: str | Tensor,
    features: int | Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask (*event): True for the dimensions that a coupling keeps, False for those it changes.

    Args:
        mask: "halves" (of the first dimension), "alternating", "random", "checkerboard" (images
            alone), "channel" ("halves" of the channels), or a boolean tensor (*event). `~mask`
            swaps the two.
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        generator: source of a random mask.

    Raises:
        TypeError: neither a name nor a boolean tensor.
        ValueError: a name that is not known, a tensor of another shape, or a mask that keeps or
            changes all dimensions, such as any of one dimension.

    Example:
        >>> make_mask("alternating", 5)
        tensor([False,  True, False,  True, False])
    """
    shape = event_shape_of(features)
    if isinstance(mask, str):
        check_choice("mask", mask, MASKS, ", or a boolean tensor")
        made = MASKS[mask](shape, generator).clone()
    elif isinstance(mask, Tensor) and mask.dtype == torch.bool:
        made = mask.clone()
    else:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a name or a boolean tensor, got {kind}; use mask.bool()")
    if made.shape != shape:
        raise ValueError(f"mask has shape {tuple(made.shape)}, expected features={shape}")
    kept = int(made.sum())
    if kept in (0, made.numel()):
        what = "keeps" if kept else "changes"
        raise ValueError(
            f"mask={mask if isinstance(mask, str) else made.tolist()!r} {what} all of the "
            f"{made.numel()} dimensions of {shape}; a coupling needs two dimensions or more, one "
            "to keep and one to change"
        )
    return made
