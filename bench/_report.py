"""A table of contestants, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _floor
from _measure import Times, operations, peak_memory, ratio
from _peer import Contestant


@dataclass
class Row:
    """One line of a table; None where there is nothing to tell."""

    name: str
    ms: float
    to_base: float | None
    to_floor: float | None
    nfe: tuple[int | None, int | None]
    operations: float | None
    memory: float | None


@dataclass
class Table:
    """The rows of one problem, under its title."""

    title: str
    base: str
    rows: list[Row]


def make_table(
    title: str,
    base: str,
    contestants: Sequence[Contestant],
    times: Times,
    device: str,
    *,
    memory: bool,
) -> Table:
    """The medians of the times, and what else is to be told."""
    rows = [
        Row(
            c.name,
            1e3 * statistics.median(times[c.name]),
            ratio(times, c.name, base),
            ratio(times, c.name, _floor.NAME),
            c.nfe,
            operations(c),
            peak_memory(c, device) if memory else None,
        )
        for c in contestants
    ]
    return Table(title, base, rows)


def show(table: Table, *, memory: bool) -> None:
    """Print a table, the slowest first."""
    print(f"\n{table.title}\nratio: to {table.base} in the same round; floor: to {_floor.NAME}")
    heads = ["", "ms", "ratio", "floor", "NFE", "backward", "ops/NFE", "MiB"]
    print(_line(heads[: 8 if memory else 7]))
    for row in sorted(table.rows, key=lambda row: -row.ms):
        cells = [
            row.name,
            _number(row.ms, 2),
            _number(row.to_base, 2),
            _number(row.to_floor, 2),
            _number(row.nfe[0], 0),
            _number(row.nfe[1], 0),
            _number(row.operations, 0),
            _number(row.memory, 1),
        ]
        print(_line(cells[: 8 if memory else 7]), flush=True)


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:32}" + "".join(f"{cell:>10}" for cell in cells[1:])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def plot(tables: Sequence[Table], path: Path) -> None:
    """Bars of the times, labelled with the ratios, a panel for each table."""
    from matplotlib import pyplot as plt

    heights = [max(1, len(table.rows)) for table in tables]
    figure, panels = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.9 * len(tables) + 0.28 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, table in zip(panels[:, 0], tables, strict=True):
        rows = sorted(table.rows, key=lambda row: -row.ms)
        colours = [_colour(row.name) for row in rows]
        bars = panel.barh([row.name for row in rows], [row.ms for row in rows], color=colours)
        ratios = [_number(row.to_base, 2) for row in rows]
        panel.bar_label(bars, [f" {r}" if r != "-" else "" for r in ratios], fontsize=8)
        panel.set_title(table.title, fontsize=8, loc="left")
        panel.set_xlabel(f"ms; labels: ratio to {table.base}", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.1)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


def _colour(name: str) -> str:
    if name.startswith("cnf"):
        return "tab:blue"
    return "tab:green" if name == _floor.NAME else "tab:gray"
