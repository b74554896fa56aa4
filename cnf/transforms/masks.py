"""Masks of couplings: which dimensions are kept and condition the others (True), by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.fields.base import event_shape_of
from cnf.transforms.inputs import check_vector

__all__ = ["MASKS", "make_mask"]


def _halves(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """The first half of the first dimension, the smaller one if it is odd."""
    return _along_first(_range(shape[0]) < shape[0] // 2, shape)


def _alternating(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Every second entry of the first dimension."""
    return _along_first(_range(shape[0]) % 2 == 1, shape)


def _random(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """A random half of the first dimension."""
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(shape[0], generator=generator, device=device).cpu()
    return _along_first(order < shape[0] // 2, shape)


def _checkerboard(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Every second pixel of an image, of all its channels."""
    if len(shape) != 3:
        raise ValueError(f"mask='checkerboard' is for images (C, H, W), got the shape {shape}")
    rows, columns = _range(shape[1]), _range(shape[2])
    return ((rows[:, None] + columns) % 2 == 1).expand(shape)


def _range(n: int) -> Tensor:
    """0, ..., n - 1, whatever torch's default device: a mask is looked at."""
    return torch.arange(n, device="cpu")


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
    check_vector(shape)
    if isinstance(mask, str):
        check_choice("mask", mask, MASKS, ", or a boolean tensor")
        made = MASKS[mask](shape, generator).clone()
    elif isinstance(mask, Tensor) and mask.dtype == torch.bool:
        made = mask.clone()
    else:
        if isinstance(mask, Tensor):
            kind, remedy = str(mask.dtype), "mask.bool()"
        else:
            kind, remedy = type(mask).__name__, "torch.tensor(mask, dtype=torch.bool)"
        raise TypeError(f"mask must be a name or a boolean tensor, got {kind}; use {remedy}")
    if made.shape != shape:
        raise ValueError(f"mask has shape {tuple(made.shape)}, expected features={shape}")
    kept = int(made.sum())
    if kept in (0, made.numel()):
        what = "keeps" if kept else "changes"
        hint = "; for images of one channel use 'checkerboard'" if len(shape) == 3 else ""
        if made.numel() == 1:
            raise ValueError(
                f"features={shape} is one dimension; a coupling needs two dimensions or more, one "
                "to keep and one to change; use MAF, NeuralSpline(kind='autoregressive'), "
                "PlanarFlow or FFJORD"
            )
        raise ValueError(
            f"mask={repr(mask) if isinstance(mask, str) else 'the tensor'} {what} all of the "
            f"{made.numel()} dimensions of {shape}; a coupling needs two dimensions or more, one "
            f"to keep and one to change{hint}"
        )
    return made
