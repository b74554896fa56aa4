r"""Test log-likelihood of cnf's flows beside zuko's and nflows', trained by one loop.

    pip install -e .[examples] zuko nflows
    python bench/likelihood.py --data power-plant.txt
    python bench/likelihood.py --data bsds300:DIR --hidden 128 128 --batch 256 --lr 1e-3 \
        --steps 5000 --spline-steps 2500 --ffjord-steps 2000

RealNVP, spline couplings and MAF of one architecture, which the number of parameters shows, from
the weights that each library begins with; Adam, the batches and their order, the schedule, the
clipping of gradients and the averaged weights, kept where the validation loss is lowest, are the
same for all. cnf.FFJORD and the Gaussian of full covariance stand beside them. The difference to a
peer is also that of the two at each test point, whose standard error is much the smaller one;
"within" says that the means are within two standard errors of the peer's mean.

DIR holds train/ and test/ of BSDS300: patches of 8 x 8 grey values with noise, less their mean.
nflows' affine couplings can scale by no more than 1.001 on the way from data to noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from _discrete import FLOWS, Architecture
from _likelihood import Plan, Score, build, run, standard_error
from _likelihood_data import load
from torch import Tensor

import cnf
from cnf.data import Table, gaussian_log_prob

NAMES = {**FLOWS, "ffjord": "continuous (FFJORD)"}
WIDTHS = (12, 22, 22, 11, 7, 7, 7)  # of the columns


def main() -> None:
    """Train, score, print, write."""
    args = _parse()
    torch.set_num_threads(args.threads)
    args.libraries = [name for name in args.libraries if _installed(name)]
    table = load(args.data, tuple(args.patches))
    gaussian = gaussian_log_prob(table.train, table.test) + table.log_det_standardisation
    print(f"{title(args, table)}\nGaussian: {_pm(gaussian)}")
    scores: list[Score] = []
    for seed in args.seeds:
        for kind in args.flows:
            scores += show(kind, seed, train(kind, table, args, seed))
            if args.out:  # at once: what follows may be stopped
                args.out.write_text(json.dumps(report(args, gaussian, scores), indent=1) + "\n")
    if args.out:
        print(f"\nwritten: {args.out}")


def _parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--data", required=True, help="a table's FILE, or bsds300:DIR")
    flags.add_argument(
        "--patches", type=int, nargs=3, default=[100_000, 10_000, 50_000], help="of bsds300"
    )
    flags.add_argument("--flows", nargs="+", choices=[*NAMES], default=[*NAMES])
    flags.add_argument("--libraries", nargs="+", default=["cnf", "zuko", "nflows"])
    flags.add_argument("--layers", type=int, default=5)
    flags.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    flags.add_argument("--bins", type=int, default=8, help="of the splines")
    flags.add_argument("--steps", type=int, default=3000)
    flags.add_argument("--spline-steps", type=int, help="of the splines, where others are asked")
    flags.add_argument("--ffjord-steps", type=int, default=1500)
    flags.add_argument("--batch", type=int, default=500)
    flags.add_argument("--lr", type=float, default=2e-3)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--max-time", type=float, default=300, help="of FFJORD, seconds")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    return flags.parse_args()


def _installed(library: str) -> bool:
    found = library == "cnf" or find_spec(library) is not None
    if not found:
        print(f"{library} skipped: {library} is not installed")
    return found


def title(args: argparse.Namespace, table: Table) -> str:
    """What is trained on, and how."""
    sizes = " / ".join(str(len(x)) for x in (table.train, table.val, table.test))
    return (
        f"{args.data.rsplit('/', 1)[-1]}: {table.train.shape[1]}-D, {sizes} points; {args.layers} "
        f"layers, hidden {' x '.join(map(str, args.hidden))}, {args.bins} bins; batch "
        f"{args.batch}, Adam {args.lr:g}"
    )


def train(kind: str, table: Table, args: argparse.Namespace, seed: int) -> Iterator[Score]:
    """The scores of one kind of flow in every library."""
    features = table.train.shape[1]
    plan = Plan(args.steps, args.batch, args.lr, seed)
    if kind == "ffjord":
        plan = replace(plan, steps=args.ffjord_steps, max_time=args.max_time)
        solver = cnf.Solver("dopri5", rtol=1e-3, atol=1e-3, max_steps=200)
        yield run(
            kind, "cnf", lambda: cnf.FFJORD(features, args.hidden, solver=solver), table, plan
        )
        return
    if kind == "spline" and args.spline_steps:
        plan = replace(plan, steps=args.spline_steps)
    architecture = Architecture(kind, features, args.layers, tuple(args.hidden), args.bins)
    for library in args.libraries:
        yield run(kind, library, partial(build, library, architecture), table, plan)


def show(kind: str, seed: int, scores: Iterable[Score]) -> list[Score]:
    """Print a table, each row when it is there; cnf's gain is over the library of the row."""
    print(f"\n{NAMES[kind]}, seed {seed}; nats a test point")
    heads = ["parameters", "test", "cnf - it", "2 errors?", "CPU s", "steps", "best"]
    _line("", heads)
    shown: list[Score] = []
    ours = None
    for score in scores:
        shown.append(score)
        if score.library == "cnf":
            ours = score
        compared = ours is not None and ours is not score
        cells = [
            f"{score.parameters}",
            _pm(score.log_prob),
            _pm(ours.log_prob - score.log_prob) if compared else "-",
            verdict(ours, score) if compared else "-",
            f"{score.seconds:.0f}",
            f"{score.steps}",
            f"{score.best_step}",
        ]
        _line(score.library, cells)
    return shown


def _line(name: str, cells: Sequence[str]) -> None:
    text = "".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True))
    print(f"{name:8}{text}", flush=True)


def _pm(values: Tensor) -> str:
    return f"{values.mean():.4f} +- {standard_error(values):.4f}"


def verdict(ours: Score, peer: Score) -> str:
    """Where our mean is: within two standard errors of the peer's, above, or below."""
    gap = ours.mean - peer.mean
    if abs(gap) <= 2 * peer.error:
        return "within"
    return "above" if gap > 0 else "below"


def report(
    args: argparse.Namespace, gaussian: Tensor, scores: Sequence[Score]
) -> dict[str, object]:
    """All figures, as plain values."""
    rows = []
    for score in scores:
        row = {**asdict(score), "log_prob": score.mean, "standard_error": score.error}
        ours = [s for s in scores if (s.kind, s.seed) == (score.kind, score.seed)]
        ours = [s for s in ours if s.library == "cnf" and s is not score]
        if ours:
            gap = ours[0].log_prob - score.log_prob
            row["cnf_minus_it"] = [gap.mean().item(), standard_error(gap)]
            row["verdict"] = verdict(ours[0], score)
        rows.append(row)
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    normal = [gaussian.mean().item(), standard_error(gaussian)]
    return {"flags": flags, "gaussian": normal, "scores": rows}


if __name__ == "__main__":
    main()
