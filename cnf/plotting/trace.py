"""Estimators of the trace: noise against time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnf.comparison import TraceComparison

__all__ = ["plot_trace"]


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
