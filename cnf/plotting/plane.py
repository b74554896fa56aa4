"""Flows on the plane: data, samples, densities, and the path from base to data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.flow import Flow
from cnf.truncation import is_continuous, parts_of, truncate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "animate_path",
    "log_density_grid",
    "plot_densities",
    "plot_flow",
    "plot_path",
    "plot_samples",
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
