"""Error against evaluations and against time, for each method of cnf and for torchdiffeq's.

    pip install -e ".[bench]" && python bench/work_precision.py --plot work_precision.png

A perceptron in 2-D, the exact trace, no gradient; fixed methods over steps, adaptive ones over
tolerances. The truth is a float64 solve by torchdiffeq's dopri8 at a tolerance of 1e-11, with a
last step that lands; cnf's own must agree with it. The error is the root of the mean square over
the batch, of x (solved from data to base) and of the log-density.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import _cnf
import _flags
import _torchdiffeq
import torch
from _peer import Peer
from _problem import FIXED, SIZES, Problem, make_field
from torch import Tensor

ADAPTIVE = ("bosh3", "dopri5", "tsit5", "dopri8")
TORCHDIFFEQ = ("rk4", "bosh3", "dopri5", "dopri8")
AGREEMENT = 1e-9
"""How far the two float64 references may be apart."""


@dataclasses.dataclass
class Point:
    """One solve."""

    library: str
    method: str
    setting: str
    nfe: int
    ms: float
    error: float
    log_prob_error: float


def main() -> None:
    """Solve, print, draw."""
    flags = _flags.device_flags(argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
    flags.add_argument("--batch", type=int, default=512)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--scale", type=float, default=3.0, help="multiplies the weights")
    flags.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    flags.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    flags.add_argument(
        "--tols", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    )
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--only", metavar="NAMES", help="curves with one of these in the name")
    args = flags.parse_args()
    _flags.set_threads(args.threads)
    exact = make_problem(args, torch.float64)
    truth = reference(exact)
    problem = make_problem(args, getattr(torch, args.dtype))
    points = []
    print(f"2-D, width {args.width}, batch {args.batch}, scale {args.scale:g}, {args.dtype}")
    print(f"{'':12}{'method':10}{'setting':>10}{'NFE':>7}{'ms':>9}{'error x':>10}{'log p':>10}")
    for library, method in curves(args.only):
        for case in settings(problem, method, args):
            points.append(measure(library, case, truth, args))
            show(points[-1])
    if args.plot:
        plot(points, args.plot)


def make_problem(args: argparse.Namespace, dtype: torch.dtype) -> Problem:
    """The field and the batch, with the same weights in every dtype."""
    dims = SIZES["2d"][0]
    field = make_field(dims, args.width, args.scale, args.device).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, dims, generator=generator).to(args.device, dtype)
    return Problem(field, x, trace="exact")


def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """(z, log-density) at a tolerance of 1e-11, by two libraries that must agree."""
    tight = dataclasses.replace(problem, method="dopri8", tol=1e-11)
    z, log_prob = solve(_torchdiffeq.peer(tight, "truth", adjoint=False, landing=True), tight.x)
    other_z, other_log_prob = solve(make_peer("cnf", tight), tight.x)
    gap = max((z - other_z).abs().max().item(), (log_prob - other_log_prob).abs().max().item())
    if not gap < AGREEMENT:
        raise SystemExit(f"the references of torchdiffeq and cnf differ by {gap:.1e}")
    return z, log_prob


def curves(only: str | None) -> Iterator[tuple[str, str]]:
    """(library, method) of each curve."""
    every = [("cnf", method) for method in FIXED + ADAPTIVE]
    every += [("torchdiffeq", method) for method in TORCHDIFFEQ]
    for library, method in every:
        names = only.split(",") if only else [""]
        if any(name.strip() in f"{library} {method}" for name in names):
            yield library, method


def settings(problem: Problem, method: str, args: argparse.Namespace) -> Iterator[Problem]:
    """The problem with each number of steps, or each tolerance."""
    if method in FIXED:
        for steps in args.steps:
            yield dataclasses.replace(problem, method=method, steps=steps)
    else:
        for tol in args.tols:
            yield dataclasses.replace(problem, method=method, tol=tol)


def make_peer(library: str, problem: Problem) -> Peer:
    """A library's plain solve."""
    module = _cnf if library == "cnf" else _torchdiffeq
    return module.peers(problem, gradients=False)[0]


def solve(peer: Peer, x: Tensor) -> tuple[Tensor, Tensor]:
    """z and the log-density, without gradient."""
    with torch.no_grad():
        z, log_det = peer.solve(x)
        return z, log_det - 0.5 * z.square().sum(1)  # the constant is the same for all


def measure(
    library: str, problem: Problem, truth: tuple[Tensor, Tensor], args: argparse.Namespace
) -> Point:
    """One solve: its cost, the fastest of the rounds, and its errors."""
    peer = make_peer(library, problem)
    z, log_prob = solve(peer, problem.x)
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        solve(peer, problem.x)[0].sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 1:
            break
    setting = f"{problem.steps} steps" if problem.fixed else f"tol {problem.tol:.0e}"
    errors = [_rms(a.double() - b) for a, b in zip((z, log_prob), truth, strict=True)]
    return Point(library, problem.method, setting, peer.count(), 1e3 * min(seconds), *errors)


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def show(p: Point) -> None:
    """Print a point as a row."""
    print(
        f"{p.library:12}{p.method:10}{p.setting:>10}{p.nfe:7d}{p.ms:9.2f}"
        f"{p.error:10.1e}{p.log_prob_error:10.1e}",
        flush=True,
    )


def plot(points: list[Point], path: Path) -> None:
    """The error of the log-density against evaluations and against time."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(FIXED + ADAPTIVE)}
    for library, method in dict.fromkeys((p.library, p.method) for p in points):
        curve = [p for p in points if (p.library, p.method) == (library, method)]
        errors = [p.log_prob_error for p in curve]
        style = ("-", "o") if library == "cnf" else ("--", "x")
        for panel, cost in zip(panels, ("nfe", "ms"), strict=True):
            panel.loglog(
                [getattr(p, cost) for p in curve],
                errors,
                color=colours[method],
                linestyle=style[0],
                marker=style[1],
                markersize=4,
                label=f"{library} {method}",
            )
    panels[0].set_ylabel("error of the log-density (root mean square)")
    for panel, label in zip(panels, ("evaluations of the field", "time (ms)"), strict=True):
        panel.set_xlabel(label)
        panel.grid(visible=True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
