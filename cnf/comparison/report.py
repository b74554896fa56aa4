"""What a comparison of traces found: its rows, and how they read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnf.divergence import Divergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TraceComparison", "TraceRow"]

_NAN = float("nan")


@dataclass(frozen=True)
class TraceRow:
    """One way to compute the trace: its cost, and its error against the exact value.

    A number is NaN where it was not measured; the note says why.
    """

    name: str
    divergence: Divergence
    seconds: float = _NAN  # of a log-likelihood without gradient, median over the rounds
    training_seconds: float = _NAN  # of -log_prob.mean() and its gradient
    memory: float = _NAN  # peak of a log-likelihood above the start, in bytes
    training_memory: float = _NAN
    nfe: float = _NAN  # evaluations of the fields in a log-likelihood, mean over the draws
    training_nfe: float = _NAN  # in a training step, those of its backward pass too
    bias: float = _NAN  # mean over draws and rows of (log p - exact log p), in nats
    bias_error: float = _NAN  # the standard error of the bias, 0 where nothing is random
    std: float = _NAN  # of log p by the noise: root of the variance's mean over the rows
    draws: int = 0  # of the noise
    note: str = ""  # what was left out, and why


@dataclass(frozen=True)
class TraceComparison:
    """What `compare_trace` found: its rows, which `print` shows as a table and `plot` draws.

    Example:
        >>> import cnf
        >>> row = TraceRow("exact", cnf.Exact(), 0.002, nfe=16, bias=0.0, bias_error=0.0, std=0.0)
        >>> TraceComparison((row,), "1 row of (2,)").rows[0].std
        0.0
    """

    rows: tuple[TraceRow, ...]
    setting: str  # what was measured, and how
    exact: str = "none"  # what the estimates were compared with

    def plot(self) -> Figure:
        """The noise of each estimator against its time, exact ones as lines; needs matplotlib."""
        from cnf.plotting import plot_trace

        return plot_trace(self)

    def __str__(self) -> str:
        lines = [_cells(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*_HEADS, *lines, strict=True)]
        notes = ["", "", *(row.note for row in self.rows)]
        table = [
            "  ".join([f"  {name:<{widths[0]}}", *map(str.rjust, cells, widths[1:]), note]).rstrip()
            for (name, *cells), note in zip([*_HEADS, *lines], notes, strict=True)
        ]
        return "\n".join([f"cnf.compare_trace: {self.setting}", *table, f"  exact: {self.exact}"])


_HEADS = (
    ("", "log p", "step", "log p", "step", "NFE", "NFE", "bias", "standard", "std"),
    ("", "ms", "ms", "MiB", "MiB", "log p", "step", "nats", "error", "nats"),
)


def _cells(row: TraceRow) -> list[str]:
    def show(value: float, style: str) -> str:
        return "-" if math.isnan(value) else "0" if value == 0 else f"{value:{style}}"

    times = [show(1e3 * s, ".4g") for s in (row.seconds, row.training_seconds)]
    memory = [show(b / 2**20, ".2f") for b in (row.memory, row.training_memory)]
    nfe = [show(n, ".4g") for n in (row.nfe, row.training_nfe)]
    errors = [show(row.bias, "+.1e"), show(row.bias_error, ".1e"), show(row.std, ".2g")]
    return [row.name, *times, *memory, *nfe, *errors]
