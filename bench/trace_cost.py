"""What the trace costs: exact in closed form, Hutchinson's estimate, Hutch++, and D products.

    python bench/trace_cost.py --plot trace_cost.png

One field for all, over dimensions and for images; a log-likelihood without gradient, and a training
step, by a method of fixed steps, so that work done once a solve counts as it does in use. Every
round times each in a random order; a ratio is the median over the rounds. Products one by one are
timed up to --limit dimensions, and beyond (~) extrapolated from a few of them in one evaluation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _flags
import _trace
import torch
from _measure import ratio, rounds
from _trace import CHUNKS, CLOSED, FORM, ONE, SKETCH, VJP, Case

import cnf

LIMITS = {"MLP": (1.0, 1.05), "convolution": (1.3, 1.3)}
"""What the closed form may cost of Hutchinson's estimate by a product: a log-likelihood, a step."""


@dataclass
class Cost:
    """One way's time, and its ratio to one probe by a product and by the closed form."""

    ms: float
    to_vjp: float | None
    to_form: float | None
    timed: bool = True  # or extrapolated


@dataclass
class Table:
    """The costs of one case: of a log-likelihood and of a training step, by name."""

    case: Case
    costs: tuple[dict[str, Cost], dict[str, Cost]]


def main() -> None:
    """Check, time, print, draw."""
    args = _parse()
    _flags.set_threads(args.threads)
    print(
        f"ratio: to {VJP} in the same round; closed: to {FORM}; ~: extrapolated\n"
        f"rk4 x {args.steps}, {args.device}, threads {torch.get_num_threads()}"
    )
    tables = []
    for case in cases(args):
        gap = _trace.verify(case)
        print(f"\n{case.name}\nall exact traces are the same: they differ by at most {gap:.0e}")
        costs = (_costs(case, args, training=False), _costs(case, args, training=True))
        tables.append(Table(case, costs))
        show(tables[-1])
    summary(tables)
    if args.plot:
        plot(tables, args.plot)


def _parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    _flags.device_flags(flags)
    flags.add_argument("--dims", type=int, nargs="*", default=[2, 8, 32, 128, 512, 1024])
    flags.add_argument("--width", type=int, default=512, help="of the two hidden layers")
    flags.add_argument("--batch", type=int, default=256)
    flags.add_argument("--images", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument(
        "--shapes",
        nargs="+",
        default=["1x28x28:32", "1x28x28:64", "3x32x32:64"],
        help="of images, with the channels of the two hidden layers",
    )
    flags.add_argument("--image-batch", type=int, default=16)
    flags.add_argument("--steps", type=int, default=4, help="of rk4, four evaluations each")
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--limit", type=int, default=32, help="dimensions to time D products in")
    args = flags.parse_args()
    try:
        args.shapes = [_shape(text) for text in args.shapes]
    except ValueError:
        flags.error(f"--shapes {' '.join(args.shapes)}: write each as 1x28x28:32")
    return args


def _shape(text: str) -> tuple[tuple[int, int, int], int]:
    shape, channels = text.split(":")
    c, h, w = map(int, shape.split("x"))
    return (c, h, w), int(channels)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The fields and batches that the flags ask for, one at a time."""
    solver = cnf.Solver("rk4", steps=args.steps)
    for dims in args.dims:
        torch.manual_seed(0)
        field = cnf.MLPField(dims, (args.width, args.width)).to(args.device)
        x = torch.randn(args.batch, dims).to(args.device)
        yield Case(f"MLP {dims}-D, width {args.width}, batch {args.batch}", field, x, solver)
    for shape, channels in args.shapes if args.images else ():
        torch.manual_seed(0)
        field = cnf.fields.ConvField(shape, (channels, channels)).to(args.device)
        x = torch.randn(args.image_batch, *shape).to(args.device)
        name = f"convolution {'x'.join(map(str, shape))}, {channels} channels"
        yield Case(f"{name}, batch {args.image_batch}", field, x, solver)


def _costs(case: Case, args: argparse.Namespace, *, training: bool) -> dict[str, Cost]:
    """The cost of each way; the slow ones in fewer rounds of their own."""
    slow = [VJP, FORM, SKETCH]
    if timed := case.dims <= args.limit:
        slow += [CHUNKS, ONE]
    costs: dict[str, Cost] = {}
    for names, number in [(slow, max(1, args.rounds // 3)), ([CLOSED, VJP, FORM], args.rounds)]:
        made = _trace.contestants(case, names, training=training)
        times = rounds(made, number, args.device)
        for name in times:
            ms = 1e3 * statistics.median(times[name])
            costs[name] = Cost(ms, ratio(times, name, VJP), ratio(times, name, FORM))
    for name in () if timed else (CHUNKS, ONE):
        ms = 1e3 * _trace.extrapolated(case, name, training=training)
        by_form = ms / costs[FORM].ms if FORM in costs else None
        costs[name] = Cost(ms, ms / costs[VJP].ms, by_form, timed=False)
    return {name: costs[name] for name in (CLOSED, FORM, VJP, SKETCH, CHUNKS, ONE) if name in costs}


def show(table: Table) -> None:
    """Print a table."""
    heads = ["log p ms", "ratio", "closed", "step ms", "ratio", "closed"]
    print(" " * 34 + "".join(f"{head:>11}" for head in heads))
    for name in table.costs[0]:
        cells = [cell for costs in table.costs for cell in _cells(costs[name])]
        print(f"{name:34}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def _cells(cost: Cost) -> list[str]:
    about = "" if cost.timed else "~"
    numbers = [cost.ms, cost.to_vjp, cost.to_form]
    return ["-" if n is None else f"{about}{n:.{2 if n < 100 else 0}f}" for n in numbers]


def summary(tables: Sequence[Table]) -> None:
    """Print what the closed form costs of one probe, beside the limits."""
    print(f"\n{CLOSED}, of {VJP}: ratio (limit)")
    for table in tables:
        kind = table.case.name.split()[0]
        words = []
        for what, costs, limit in zip(
            ("log-likelihood", "training step"), table.costs, LIMITS[kind], strict=True
        ):
            found = costs[CLOSED].to_vjp or 0.0
            verdict = "ok" if found <= limit else "OVER"
            words.append(f"{what} {found:.2f} ({limit:.2f}) {verdict:4}")
        print(f"{table.case.name:52}" + "  ".join(words))


def plot(tables: Sequence[Table], path: Path) -> None:
    """Time against D, and bars for images; a log-likelihood left, a training step right."""
    from matplotlib import pyplot as plt

    kinds = [[t for t in tables if t.case.name.startswith(kind)] for kind in LIMITS]
    kinds = [kind for kind in kinds if kind]
    figure, panels = plt.subplots(
        len(kinds), 2, figsize=(10, 4.2 * len(kinds)), squeeze=False, layout="constrained"
    )
    for row, kind in zip(panels, kinds, strict=True):
        for i, (panel, what) in enumerate(
            zip(row, ("log-likelihood", "training step"), strict=True)
        ):
            draw = _curves if kind[0].case.name.startswith("MLP") else _bars
            draw(panel, kind, i)
            panel.set(yscale="log", ylabel="ms")
            panel.set_title(f"{what}: {kind[0].case.name.split()[0]}", fontsize=9, loc="left")
            panel.grid(visible=True, alpha=0.3)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


_COLOURS = {name: f"C{i}" for i, name in enumerate((CLOSED, VJP, FORM, SKETCH, CHUNKS, ONE))}


def _curves(panel: object, tables: Sequence[Table], i: int) -> None:
    """Time against D; hollow marks are extrapolated."""
    for name in tables[0].costs[i]:
        costs = [table.costs[i][name] for table in tables]
        dims, colour = [table.case.dims for table in tables], _COLOURS[name]
        panel.plot(dims, [cost.ms for cost in costs], color=colour, label=name)
        for d, cost in zip(dims, costs, strict=True):
            face = colour if cost.timed else "white"
            panel.plot(d, cost.ms, "o", color=colour, markerfacecolor=face, markersize=5)
    panel.set(xscale="log", xlabel="D (hollow: extrapolated)")


def _bars(panel: object, tables: Sequence[Table], i: int) -> None:
    """A group of bars for each kind of image; pale ones are extrapolated."""
    names = list(tables[0].costs[i])
    for k, name in enumerate(names):
        costs = [table.costs[i][name] for table in tables]
        places = [j + (k - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(tables))]
        bars = panel.bar(
            places, [c.ms for c in costs], 0.8 / len(names), color=_COLOURS[name], label=name
        )
        for bar, cost in zip(bars, costs, strict=True):
            bar.set_alpha(1.0 if cost.timed else 0.4)
    labels = [", ".join(t.case.name.removeprefix("convolution ").split(", ")[:2]) for t in tables]
    panel.set_xticks(range(len(tables)), labels, fontsize=8)
    panel.set_xlabel("(pale: extrapolated)")


if __name__ == "__main__":
    main()
