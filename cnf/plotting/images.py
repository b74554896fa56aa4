"""Grids of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.checks import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_images"]


def plot_images(
    images: Mapping[str, Tensor], *, levels: int = 256, columns: int = 8, panels: int = 4
) -> Figure:
    """Grids of images side by side.

    Args:
        images: whole grey levels (N, C, H, W) for each title, C = 1 for grey and 3 for colours.
        levels: number of grey levels; the highest is white.
        columns: images in a row of a grid.
        panels: grids in a row of the figure, at most.

    Raises:
        TypeError: images that are no tensors by title.
        ValueError: images of another shape or of other values, none at all, or no columns.
    """
    from matplotlib.figure import Figure

    if not isinstance(images, Mapping):
        raise TypeError(
            f"images must be tensors by title, {{'samples': x}}, got a {type(images).__name__}"
        )
    if not images:
        raise ValueError("images is empty; give one grid at least, such as {'samples': x}")
    check_count("columns", columns)
    check_count("panels", panels)
    grids = {title: _grid(x, columns, levels) for title, x in images.items()}
    across = min(panels, len(grids))
    down = -(-len(grids) // across)
    tallest = max(grid.shape[0] / grid.shape[1] for grid in grids.values())
    figure = Figure(figsize=(3.4 * across, (3.3 * tallest + 0.4) * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, grid) in zip(axes, grids.items(), strict=False):
        ax.imshow(grid.numpy(), interpolation="nearest", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
    return figure


def _grid(images: Tensor, columns: int, levels: int) -> Tensor:
    """One image (height, width, 3) of images (N, C, H, W), in rows, with lines between them."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be tensors, got {type(images).__name__}; use torch.as_tensor")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"images must be (N, C, H, W), N one or more and C 1 or 3, got {tuple(images.shape)}"
        )
    images = images.detach()
    low, high = images.min().item(), images.max().item()
    whole = not images.is_floating_point() or bool((images == images.round()).all())
    if not (whole and low >= 0 and high <= levels - 1):
        raise ValueError(
            f"images must hold whole grey levels from 0 to levels - 1 = {levels - 1}, got "
            f"{'' if whole else 'fractions, '}values from {low:.6g} to {high:.6g}"
        )
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.full((3, rows * (height + 1) + 1, columns * (width + 1) + 1), 0.5, device="cpu")
    for i, image in enumerate(images.cpu() / (levels - 1)):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = image
    return grid.permute(1, 2, 0)
