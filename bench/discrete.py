"""Discrete flows: a training step, log_prob and sampling of cnf beside zuko, nflows and normflows.

    pip install -e . zuko nflows normflows && python bench/discrete.py --plot discrete.png

Affine coupling, spline coupling and masked autoregression, of one architecture for all libraries,
which the number of parameters shows; each flow is checked to be one. Every round times each
contestant once, in a random order; a ratio is the median over the rounds, to the fastest peer.
The bare conditioners are one pass of the networks, which none can do without; nflows, normflows and
zuko sample a MAF in one pass a feature. Each library keeps its own form of the scale of an affine
layer, and nflows and normflows sample with the log-determinant.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _flags
import torch
from _discrete import FLOOR, FLOWS, TASKS, Architecture, Model, check, contestant, floor, models
from _measure import Times, operations, ratio, rounds


@dataclass
class Row:
    """A library's line; no ratio where there is no peer."""

    name: str
    parameters: int
    ms: float
    ratio: float | None
    operations: float | None


@dataclass
class Table:
    """One task of one flow, under its title."""

    kind: str
    task: str
    title: str
    fastest: str | None  # peer
    rows: list[Row]


def main() -> None:
    """Check, time, print, draw."""
    args = _parse()
    _flags.set_threads(args.threads)
    torch.empty(3 << 21)  # 24 MiB, once freed: glibc then keeps memory, and no run pays for pages
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.features, generator=torch.Generator().manual_seed(1))
    x = x.to(args.device)
    tables = []
    for kind in FLOWS if args.flow == "all" else [args.flow]:
        architecture = Architecture(kind, args.features, args.layers, tuple(args.hidden), args.bins)
        made = list(models(architecture, args.only, args.device))
        if not made:
            continue
        gap = max(check(model, x) for model in made)
        print(f"{FLOWS[kind]}: all are flows, log q of own samples agrees to {gap:.0e}")
        made.append(floor(architecture, x))
        for task in TASKS if args.task == "all" else [args.task]:
            tables.append(measure(architecture, task, made, x, args))
            show(tables[-1])
    if not tables:
        raise SystemExit("there is nothing to time: none of the libraries is installed")
    summary(tables)
    if args.plot:
        plot(tables, args.plot)


def _parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    _flags.device_flags(flags)
    flags.add_argument("--flow", choices=[*FLOWS, "all"], default="all")
    flags.add_argument("--task", choices=[*TASKS, "all"], default="all")
    flags.add_argument("--features", type=int, default=43)
    flags.add_argument("--layers", type=int, default=5)
    flags.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    flags.add_argument("--bins", type=int, default=8, help="of the splines")
    flags.add_argument("--batch", type=int, default=1000, help="of data and of samples")
    flags.add_argument("--rounds", type=int, default=31)
    flags.add_argument("--only", metavar="NAMES", help="libraries with one of these in the name")
    return flags.parse_args()


def measure(
    architecture: Architecture,
    task: str,
    made: Sequence[Model],
    x: torch.Tensor,
    args: argparse.Namespace,
) -> Table:
    """The times of a task."""
    contestants = [contestant(model, task, x) for model in made]
    times = rounds(contestants, args.rounds, args.device)
    base = fastest(times)
    rows = [
        Row(
            model.name,
            model.size,
            1e3 * statistics.median(times[model.name]),
            ratio(times, model.name, base) if base else None,
            operations(c),
        )
        for model, c in zip(made, contestants, strict=True)
    ]
    bins = f", {args.bins} bins" if architecture.kind == "spline" else ""
    title = (
        f"{FLOWS[architecture.kind]}, {TASKS[task]}: {args.features}-D, {args.layers} layers, "
        f"hidden {' x '.join(map(str, args.hidden))}{bins}, batch {args.batch}, {args.device}, "
        f"threads {torch.get_num_threads()}"
    )
    return Table(architecture.kind, task, title, base, rows)


def fastest(times: Times) -> str | None:
    """The peer of the least median."""
    peers = [name for name in times if name not in ("cnf", FLOOR)]
    return min(peers, key=lambda name: statistics.median(times[name]), default=None)


def show(table: Table) -> None:
    """Print a table, the slowest first."""
    print(f"\n{table.title}\nratio: to {table.fastest or 'a peer'} in the same round")
    print(f"{'':20}" + "".join(f"{head:>12}" for head in ("parameters", "ms", "ratio", "aten ops")))
    for row in sorted(table.rows, key=lambda row: -row.ms):
        cells = [f"{row.parameters}", f"{row.ms:.2f}", _number(row.ratio, 2)]
        cells.append(_number(row.operations, 0))
        print(f"{row.name:20}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary(tables: Sequence[Table]) -> None:
    """Print cnf's ratio to the fastest peer, in one line for each table."""
    print("\ncnf, of the fastest peer")
    for table in tables:
        ours = next((row.ratio for row in table.rows if row.name == "cnf"), None)
        name = f"{FLOWS[table.kind]}, {TASKS[table.task]}"
        print(f"{name:58}{_number(ours, 2):>6}  {table.fastest or '-'}")


def plot(tables: Sequence[Table], path: Path) -> None:
    """Bars of the times, labelled with the ratios: a flow in each row, a task in each column."""
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(table.kind for table in tables))
    tasks = list(dict.fromkeys(table.task for table in tables))
    figure, panels = plt.subplots(
        len(kinds),
        len(tasks),
        figsize=(4.2 * len(tasks), 0.4 + 2.0 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for table in tables:
        panel = panels[kinds.index(table.kind)][tasks.index(table.task)]
        rows = sorted(table.rows, key=lambda row: -row.ms)
        colours = {"cnf": "tab:blue", FLOOR: "tab:green"}
        bars = panel.barh(
            [row.name for row in rows],
            [row.ms for row in rows],
            color=[colours.get(row.name, "tab:gray") for row in rows],
        )
        labels = [f" {_number(row.ratio, 2)}" if row.ratio else "" for row in rows]
        panel.bar_label(bars, labels, fontsize=8)
        flow = FLOWS[table.kind].split("(")[1].rstrip(")")
        panel.set_title(f"{flow}, {TASKS[table.task]}", fontsize=9, loc="left")
        panel.set_xlabel(f"ms; labels: ratio to {table.fastest or 'a peer'}", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.2)
    figure.suptitle(tables[0].title.split(": ")[1], fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
