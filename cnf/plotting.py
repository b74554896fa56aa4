"""Pictures of a flow on the plane: data, samples, density, and the path from base to data.

Needs matplotlib and Pillow: pip install "cnf[examples]". Every function draws on figures of its
own, without pyplot's global state, and returns the figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.base import as_base
from cnf.flow import Flow
from cnf.transforms import CNF, Compose, Transform
from cnf.transforms.times import as_number

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cnf.comparison import TraceComparison

__all__ = [
    "animate_path",
    "log_density_grid",
    "plot_flow",
    "plot_path",
    "plot_table",
    "plot_trace",
    "truncate",
]

Extent = tuple[float, float, float, float]
"""(left, right, bottom, top) of the plane."""


def truncate(flow: Flow, fraction: float) -> Flow:
    """The flow stopped on its way: the density at a fraction of the path from base to data.

    Its CNF blocks count as equal parts of the path; parameters are shared.

    Args:
        flow: a flow of a CNF, or of a Compose of them.
        fraction: 0 for the base, 1 for the whole flow.

    Raises:
        TypeError: a flow with another transform than CNFs.
        ValueError: a fraction outside [0, 1].

    Example:
        >>> import cnf
        >>> flow = cnf.FFJORD(2, blocks=2)
        >>> truncate(flow, 0.75).log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1]")
    blocks = list(flow.transform) if isinstance(flow.transform, Compose) else [flow.transform]
    done = fraction * len(blocks)
    parts: list[Transform] = []
    for i, block in enumerate(blocks):
        if not isinstance(block, CNF):
            raise TypeError(f"the path of a {type(block).__name__} is not defined, only a CNF's")
        if i < done or i == 0:
            start, end = (as_number(t) for t in block.times)
            stop = start + (end - start) * min(1.0, done - i)
            part = CNF(
                block.field,
                block.divergence,
                block.solver,
                event_dims=block.event_dims,
                times=(start, stop),
            )
            parts.append(part)
    return Flow(as_base(flow.base), Compose(*parts))


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
    """The flow's path from base to data, as a strip of densities.

    Args:
        flow: a flow of CNFs on the plane.
        data: (N, 2), for the extent.
        frames: pictures in the strip, two or more.
        size: points along each axis.
    """
    fractions = _fractions(frames)
    extent = square_around(data)
    figure, axes = _panels(frames)
    for ax, fraction in zip(axes, fractions, strict=True):
        density = path_density(flow, fraction, extent, size, data)
        _heat(ax, density, extent, f"t = {fraction:.2g}", density.max().item())
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
        flow: a flow of CNFs on the plane.
        data: (N, 2), for the extent.
        path: file to write.
        frames: pictures, two or more.
        size: points of the density along each axis.
        points: number of moving samples.
        generator: source of randomness.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    fractions = _fractions(frames)
    extent = square_around(data)
    with torch.no_grad():
        z = flow.base.rsample((points,), generator)
    figure, (ax,) = _panels(1)

    def draw(i: int) -> Sequence[Artist]:
        ax.clear()
        density = path_density(flow, fractions[i], extent, size, data)
        _heat(ax, density, extent, f"t = {fractions[i]:.2f}", density.max().item())
        with torch.no_grad():
            x = truncate(flow, fractions[i]).transform.forward(z).cpu().numpy()
        ax.scatter(x[:, 0], x[:, 1], s=3, c="white", linewidths=0, alpha=0.8)
        ax.set(xlim=extent[:2], ylim=extent[2:])
        return ()

    animation = FuncAnimation(figure, draw, frames=frames, init_func=lambda: ())
    animation.save(str(path), writer=PillowWriter(fps=12), dpi=80)


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


def _fractions(frames: int) -> list[float]:
    if frames < 2:
        raise ValueError(f"frames={frames} must be 2 or more")
    return [i / (frames - 1) for i in range(frames)]


def _panels(n: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * n, 3.3), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


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
