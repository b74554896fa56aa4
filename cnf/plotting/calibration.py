"""Is a conditional flow calibrated? Coverage and ranks; posterior samples beside the true ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.calibration import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_calibration", "plot_posteriors"]


def plot_calibration(
    calibrations: Mapping[str, Calibration], *, bins: int = 20, confidence: float = 0.95
) -> Figure:
    """Expected coverage of highest-density regions, and rank histograms, with their bands.

    A row for each title: the coverage, which should stay in the grey band around the diagonal
    (below it a flow is over-confident), the ranks of each dimension, and those of the density.

    Args:
        calibrations: from `simulation_based_calibration`, for each title.
        bins: of the histograms; must divide the number of ranks, draws + 1.
        confidence: of the bands, each level and bin for itself.
    """
    from matplotlib.figure import Figure

    if not calibrations:
        raise ValueError("calibrations is empty; expected one or more, {title: Calibration}")
    columns = 2 + max(c.ranks.shape[1] for c in calibrations.values())
    figure = Figure(figsize=(2.6 * columns, 2.6 * len(calibrations)), layout="constrained")
    axes = figure.subplots(len(calibrations), columns, squeeze=False)
    for row, (title, calibration) in zip(axes, calibrations.items(), strict=True):
        _coverage(row[0], calibration, title, confidence)
        counts = calibration.histogram(bins)
        names = [*(f"rank of x{i}" for i in range(len(counts) - 1)), "rank of the density"]
        low, high = calibration.histogram_band(bins, confidence=confidence)
        top = 1.1 * max(high, counts.max().item())
        for ax, name, count in zip(row[1:], names, counts, strict=False):
            ax.axhspan(low, high, color="0.85", linewidth=0)
            ax.bar(range(bins), count.numpy(), width=1.0, alpha=0.8)
            ax.set(xticks=[], title=name, ylim=(0, top))
        for ax in row[1 + len(counts) :]:
            ax.set_axis_off()
    return figure


def _coverage(ax: Axes, calibration: Calibration, title: str, confidence: float) -> None:
    """Coverage against content, with the band of a right one."""
    levels = torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu")
    low, high = calibration.band(levels, confidence=confidence)
    ax.fill_between(levels.numpy(), low.numpy(), high.numpy(), color="0.85", linewidth=0)
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    ax.plot(levels.numpy(), calibration.coverage(levels).numpy())
    ax.set(xlabel="content of the region", ylabel="coverage", title=title, aspect="equal")
    ax.set(xlim=(0, 1), ylim=(0, 1))


def plot_posteriors(
    samples: Mapping[str, Tensor], parameters: Tensor | None = None, *, count: int = 3000
) -> Figure:
    """Samples on the plane from posteriors: a row for each observation, a column for each title.

    Every panel of a row has the limits of its first, the truth.

    Args:
        samples: (N, B, 2) for each title, of B observations; the truth first.
        parameters: the true parameters (B, 2), drawn as crosses.
        count: the most to draw of each.
    """
    from matplotlib.figure import Figure

    if not samples:
        raise ValueError("samples is empty; expected one or more, {title: (N, B, 2)}")
    for title, x in samples.items():
        if x.ndim != 3 or x.shape[-1] != 2 or not x.numel():
            raise ValueError(f"samples[{title!r}] has shape {tuple(x.shape)}, expected (N, B, 2)")
    shown = {title: x[:count].detach().cpu().double() for title, x in samples.items()}
    first = next(iter(shown.values()))
    rows = first.shape[1]
    figure = Figure(figsize=(3 * len(shown), 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, len(shown), squeeze=False)
    for i, (j, (title, x)) in itertools.product(range(rows), enumerate(shown.items())):
        ax = axes[i][j]
        low, high = first[:, i].amin(0), first[:, i].amax(0)
        centre, half = (low + high) / 2, 0.6 * float((high - low).max())
        style: dict[str, Any] = {"s": 2, "linewidths": 0, "alpha": 0.5, "c": f"C{min(j, 1)}"}
        ax.scatter(x[:, i, 0].numpy(), x[:, i, 1].numpy(), **style)
        if parameters is not None:
            ax.plot(*parameters[i].detach().cpu().double().tolist(), "k+", markersize=10)
        left, bottom = (centre - half).tolist()
        limits = {"xlim": (left, left + 2 * half), "ylim": (bottom, bottom + 2 * half)}
        ax.set(**limits, xticks=[], yticks=[], aspect="equal", title=title if i == 0 else "")
    return figure
