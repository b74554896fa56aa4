"""Pictures of flows: on the plane their samples, density and path; images; how training went.

Needs matplotlib and Pillow: pip install "cnf[examples]". Every function draws on figures of its
own, without pyplot's global state, and returns the figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.checks import check_count
from cnf.flow import Flow
from cnf.truncation import is_continuous, parts_of, truncate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cnf.comparison import TraceComparison

__all__ = [
    "animate_path",
    "log_density_grid",
    "plot_densities",
    "plot_flow",
    "plot_images",
    "plot_path",
    "plot_samples",
    "plot_table",
    "plot_trace",
    "plot_training",
    "truncate",
]

Extent = tuple[float, float, float, float]
"""(left, right, bottom, top) of the plane."""


@torch.no_grad()
def log_density_grid(
    log_prob: Callable[[Tensor], Tensor], extent: Extent, size: int = 150, *, like: Tensor
) -> Tensor:
    """A log-density on a regular grid of the plane.

    Args:
        log_prob: (B, 2) -> (B,).
        extent: (left, right, bottom, top).
        size: points along each axis.
        like: a tensor of the dtype and device to use.

    Returns:
        (size, size), rows from bottom to top.
    """
    left, right, bottom, top = extent
    xs = torch.linspace(left, right, size, dtype=like.dtype, device=like.device)
    ys = torch.linspace(bottom, top, size, dtype=like.dtype, device=like.device)
    points = torch.cartesian_prod(ys, xs).flip(-1)  # (size * size, 2) as (x, y)
    values = [log_prob(chunk) for chunk in points.split(10_000)]
    return torch.cat(values).reshape(size, size)


def plot_flow(
    flow: Flow,
    data: Tensor,
    *,
    truth: Callable[[Tensor], Tensor] | None = None,
    samples: int = 10_000,
    size: int = 120,
    generator: torch.Generator | None = None,
) -> Figure:
    """Data, samples of the flow, its density, and the true density where it is known.

    Args:
        flow: a flow on the plane.
        data: (N, 2).
        truth: true log-density (B, 2) -> (B,).
        samples: how many to draw.
        size: points of the density along each axis.
        generator: source of randomness.
    """
    _check_real("plot_flow", flow)
    extent = square_around(data)
    model = log_density_grid(
        lambda x: flow.log_prob(x, divergence="exact"), extent, size, like=data
    ).exp()
    panels = 3 if truth is None else 4
    figure, axes = _panels(panels)
    _histogram(axes[0], data[:samples], extent, "data")
    x = flow.sample((samples,), generator=generator)
    _histogram(axes[1], x, extent, "samples")
    top = model.max().item()
    if truth is not None:
        true = log_density_grid(truth, extent, size, like=data).exp()
        top = max(top, true[true.isfinite()].max().item())
        _heat(axes[3], true, extent, "true density", top)
    _heat(axes[2], model, extent, "density", top)
    return figure


def plot_path(flow: Flow, data: Tensor, *, frames: int = 6, size: int = 80) -> Figure:
    """The flow's path from base to data, as a strip of densities: in time, or layer by layer.

    Args:
        flow: a flow on the plane.
        data: (N, 2), for the extent.
        frames: pictures in the strip, two or more; a flow of fewer layers has fewer.
        size: points along each axis.
    """
    _check_real("plot_path", flow)
    steps = _steps(flow, frames)
    extent = square_around(data)
    figure, axes = _panels(len(steps))
    for ax, (fraction, title) in zip(axes, steps, strict=True):
        density = path_density(flow, fraction, extent, size, data)
        _heat(ax, density, extent, title, density.max().item())
    return figure


def animate_path(
    flow: Flow,
    data: Tensor,
    path: str | Path,
    *,
    frames: int = 24,
    size: int = 64,
    points: int = 400,
    generator: torch.Generator | None = None,
) -> None:
    """Write the flow's path from base to data as an animated GIF: density, and samples that move.

    Args:
        flow: a flow on the plane.
        data: (N, 2), for the extent.
        path: file to write.
        frames: pictures, two or more; a flow of fewer layers has fewer, each shown for longer.
        size: points of the density along each axis.
        points: number of moving samples.
        generator: source of randomness.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    _check_real("animate_path", flow)
    steps = _steps(flow, frames)
    extent = square_around(data)
    with torch.no_grad():
        z = flow.base.rsample((points,), generator)
    figure, (ax,) = _panels(1)

    def draw(i: int) -> Sequence[Artist]:
        ax.clear()
        fraction, title = steps[i]
        density = path_density(flow, fraction, extent, size, data)
        _heat(ax, density, extent, title, density.max().item())
        with torch.no_grad():
            x = truncate(flow, fraction).transform.forward(z).cpu().numpy()
        ax.scatter(x[:, 0], x[:, 1], s=3, c="white", linewidths=0, alpha=0.8)
        ax.set(xlim=extent[:2], ylim=extent[2:])
        return ()

    animation = FuncAnimation(figure, draw, frames=len(steps), init_func=lambda: ())
    writer = PillowWriter(fps=max(1, round(12 * len(steps) / frames)))
    animation.save(str(path), writer=writer, dpi=80)


def plot_densities(
    densities: Mapping[str, Callable[[Tensor], Tensor]],
    data: Tensor,
    *,
    columns: int = 4,
    size: int = 120,
) -> Figure:
    """Densities on the plane side by side, in colours that end at the first one's maximum.

    Args:
        densities: a log-density (B, 2) -> (B,) for each title.
        data: (N, 2), for the extent.
        columns: panels in a row, at most.
        size: points along each axis.
    """
    extent = square_around(data)
    figure, axes = _panels(len(densities), columns)
    top = None
    for ax, (title, log_prob) in zip(axes, densities.items(), strict=True):
        density = log_density_grid(log_prob, extent, size, like=data).exp()
        top = density[density.isfinite()].max().item() if top is None else top
        _heat(ax, density, extent, title, top)
    return figure


def plot_samples(
    samples: Mapping[str, Tensor],
    *,
    dims: tuple[int, int] = (0, 1),
    columns: int = 4,
    count: int = 2000,
) -> Figure:
    """Two dimensions of samples side by side, as many of each, within the limits of the first.

    Args:
        samples: (N, D) for each title, the data first.
        dims: the two dimensions.
        columns: panels in a row, at most.
        count: the most to draw of each.
    """
    count = min(count, *map(len, samples.values()))
    shown = {title: x[:count, list(dims)].double().cpu() for title, x in samples.items()}
    first = next(iter(shown.values()))
    low, high = (torch.quantile(first, q, dim=0) for q in (0.005, 0.995))
    margin = 0.1 * (high - low)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    figure, axes = _panels(len(shown), columns)
    for i, (ax, (title, x)) in enumerate(zip(axes, shown.items(), strict=True)):
        ax.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=4, linewidths=0, c="C1" if i else "C0")
        ax.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top), title=title)
    figure.supxlabel(f"dimension {dims[0]}", fontsize=9)
    figure.supylabel(f"dimension {dims[1]}", fontsize=9)
    return figure


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


def plot_training(logs: Mapping[str, str | Path], *, ylabel: str = "loss") -> Figure:
    """Loss of batches (thin) and of validation (thick) against seconds, of one run or several.

    Args:
        logs: the `log.jsonl` that `cnf.training.fit` wrote, for each title.
        ylabel: what the loss is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    seen: list[float] = []
    for i, (title, path) in enumerate(logs.items()):
        records = list(map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()))
        styles: dict[str, dict[str, Any]] = {
            "loss": {"alpha": 0.4, "linewidth": 1, "label": f"{title}, batches"},
            "val_loss": {"marker": ".", "label": f"{title}, validation"},
        }
        for kind, style in styles.items():
            points = [(r["elapsed"], r[kind]) for r in records if r.get(kind) is not None]
            if points:
                times, losses = zip(*points, strict=True)
                ax.plot(times, losses, color=f"C{i}", **style)
                seen.extend(sorted(losses)[: math.ceil(0.95 * len(losses))])
    if seen:  # the first steps may be far above all others
        margin = 0.05 * (max(seen) - min(seen)) or 0.1
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    ax.set(xlabel="seconds of training", ylabel=ylabel)
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def path_density(flow: Flow, fraction: float, extent: Extent, size: int, like: Tensor) -> Tensor:
    """The density (size, size) at a fraction of the path."""
    part = truncate(flow, fraction)
    return log_density_grid(
        lambda x: part.log_prob(x, divergence="exact"), extent, size, like=like
    ).exp()


def square_around(data: Tensor) -> Extent:
    """A square around nearly all of the data (N, 2), centred on it, with a margin."""
    low, high = (torch.quantile(data.double(), q, dim=0) for q in (0.002, 0.998))
    centre, half = (low + high) / 2, 0.6 * (high - low).max()
    x, y = centre.tolist()
    h = half.item()
    return (x - h, x + h, y - h, y + h)


def _check_real(name: str, flow: Flow) -> None:
    """Refuse a flow of integers, which have no density on the plane."""
    if flow.transform.quantized:
        raise TypeError(
            f"{name} draws densities of real numbers, and this flow is of integers; use "
            "plot_images for its samples"
        )


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
    grid = torch.full((3, rows * (height + 1) + 1, columns * (width + 1) + 1), 0.5)
    for i, image in enumerate(images.cpu() / (levels - 1)):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = image
    return grid.permute(1, 2, 0)


def _steps(flow: Flow, frames: int) -> list[tuple[float, str]]:
    """Fractions of the path, and what to call them."""
    if frames < 2:
        raise ValueError(f"frames={frames} must be 2 or more")
    parts = parts_of(flow.transform)
    n = len(parts)
    if any(map(is_continuous, parts)):
        return [(i / (frames - 1), f"t = {i / (frames - 1):.2f}") for i in range(frames)]
    last = min(frames - 1, n)
    taken = [n * i // last for i in range(last + 1)]
    return [(k / n, f"layer {k} of {n}" if k else "base") for k in taken]


def _panels(n: int, columns: int | None = None) -> tuple[Figure, Sequence[Axes]]:
    """A figure of n panels, in rows of so many columns, or in one."""
    from matplotlib.figure import Figure

    columns = min(n, columns or n)
    rows = -(-n // columns)
    figure = Figure(figsize=(3 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, list(axes[:n])


def _heat(ax: Axes, density: Tensor, extent: Extent, title: str, top: float) -> None:
    image = density.nan_to_num(0.0).cpu().numpy()
    style: dict[str, Any] = {"origin": "lower", "cmap": "magma", "interpolation": "bilinear"}
    ax.imshow(image, extent=extent, vmin=0, vmax=top, **style)
    ax.set(xticks=[], yticks=[], title=title)


def _histogram(ax: Axes, x: Tensor, extent: Extent, title: str) -> None:
    left, right, bottom, top = extent
    x = x.cpu()
    limits = [[left, right], [bottom, top]]
    ax.hist2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=120, range=limits, cmap="magma")
    ax.set(xticks=[], yticks=[], title=title, aspect="equal")


def plot_trace(comparison: TraceComparison) -> Figure:
    """The noise of log p against its time: a point for each estimator, a line for what has none.

    Args:
        comparison: from `compare_trace`; rows that were not timed are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    timed = [row for row in comparison.rows if row.seconds > 0]
    slowest = max((row.seconds for row in timed), default=1.0)
    for i, row in enumerate(timed):
        ms, colour = 1e3 * row.seconds, f"C{i}"
        if row.std > 0:
            ax.scatter(ms, row.std, color=colour, zorder=3, label=row.name)
            left, low = row.seconds > slowest / 2, i % 2  # beside the others' labels
            style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            style |= {"xytext": (-6 if left else 6, -8 if low else 4)}
            ax.annotate(row.name, (ms, row.std), ha="right" if left else "left", **style)
        elif row.std == 0:
            ax.axvline(ms, color=colour, linestyle="--", label=row.name)
            style = {"textcoords": "offset points", "xytext": (-4, 0), "fontsize": 8}
            style |= {"rotation": 90, "va": "top", "ha": "right", "color": colour}
            style |= {"xycoords": ax.get_xaxis_transform()}
            ax.annotate(row.name, (ms, 0.98), **style)
    ax.set(xscale="log", xlabel="time of a log-likelihood (ms)")
    ax.set_ylabel("std of log p by the noise (nats); lines: none")
    if any(row.std > 0 for row in timed):
        ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        for format_ticks in (axis.set_major_formatter, axis.set_minor_formatter):
            format_ticks("{x:g}")
    ax.margins(0.2)
    ax.grid(visible=True, alpha=0.3)
    return figure
