"""Targets of variational inference beside the flows fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.plotting.plane import Extent, log_density_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_energies"]

LogDensity = Callable[[Tensor], Tensor]


def plot_energies(
    rows: Mapping[str, Mapping[str, LogDensity]],
    *,
    extent: Extent = (-3.98, 3.98, -4.8, 3.2),
    size: int = 120,
    like: Tensor | None = None,
) -> Figure:
    """Densities on the plane side by side, a row a target, in colours of the first in the row.

    Args:
        rows: for each target, by its title, a log-density (B, 2) -> (B,) for each panel's title:
            the target first, normalised as the others are.
        extent: (left, right, bottom, top).
        size: points of a density along each axis.
        like: a tensor of the dtype and device to use; None for float32 on the CPU.

    Raises:
        ValueError: no rows, or a row without a density.
    """
    from matplotlib.figure import Figure

    if not rows or not all(rows.values()):
        raise ValueError("rows must have one target at least, and each of them one density")
    like = torch.zeros((), device="cpu") if like is None else like
    across = max(map(len, rows.values()))
    figure = Figure(figsize=(2.1 * across + 0.4, 2.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        top = None
        for ax in line:
            ax.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=9)
        for ax, (title, log_prob) in zip(line, panels.items(), strict=False):
            density = log_density_grid(log_prob, extent, size, like=like).exp().cpu()
            top = density[density.isfinite()].max().item() if top is None else top
            image = density.nan_to_num(0.0).numpy()
            ax.imshow(
                image, extent=extent, origin="lower", cmap="magma", interpolation="bilinear",
                vmin=0, vmax=top,
            )  # fmt: skip
            ax.set_title(title, fontsize=8)
    return figure
