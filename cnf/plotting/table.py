"""Columns of a table against each other: data and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_table"]


def plot_table(data: Tensor, samples: Tensor, *, columns: int = 5) -> Figure:
    """Columns of a table against one another: data below the diagonal, samples above it.

    Args:
        data: (N, D).
        samples: (M, D).
        columns: how many of the first columns to draw.
    """
    from matplotlib.figure import Figure

    n = min(columns, data.shape[1])
    count = min(1000, len(data), len(samples))  # as many of each, so that the eye can compare
    data, samples = data[:count].double().cpu(), samples[:count].double().cpu()
    low, high = (torch.quantile(data, q, dim=0).tolist() for q in (0.005, 0.995))
    limits = list(zip(low, high, strict=True))
    figure = Figure(figsize=(1.6 * n, 1.6 * n), layout="constrained")
    axes = figure.subplots(n, n, squeeze=False)
    for i in range(n):
        for j in range(n):
            ax = axes[i][j]
            ax.set(xticks=[], yticks=[], xlim=limits[j])
            if i == j:
                for x, color in ((data, "C0"), (samples, "C1")):
                    style: dict[str, Any] = {"density": True, "histtype": "step", "color": color}
                    ax.hist(x[:, i].numpy(), bins=30, range=limits[i], **style)
            else:
                x, color = (data, "C0") if j < i else (samples, "C1")
                ax.scatter(x[:, j].numpy(), x[:, i].numpy(), s=3, linewidths=0, c=color)
                ax.set_ylim(limits[i])
    figure.suptitle("data (blue, below) and samples (orange, above)", fontsize=9)
    return figure
