r"""What regularised paths save: evaluations of a trained 2-D FFJORD, at the likelihood it reaches.

    python bench/regularization.py
    python bench/regularization.py --data checkerboard --only none rnode --steps 2000

The same field from the same weights on the same batches (Adam, cosine schedule, dopri5 at 1e-3),
trained by likelihood alone, and with RNODE's two terms, the second derivative of the path, or
STEER's random end time; then a field with a potential, alone, and with OT-Flow's two terms. Each is
tested at dopri5 1e-5, with the exact divergence: log-likelihood in nats a point; function
evaluations (NFE) of log_prob and of sampling, mean over batches of 1000; and the kinetic energy,
the mean of int |f|^2 dt. "- none" is the gain in log-likelihood over the plain flow, at each test
point, with its own standard error: the smaller one, for the points are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import cnf
from cnf import HJBResidual, JacobianFrobenius, KineticEnergy, Regularizer, TaylorDerivative
from cnf.data import PlaneDensity, toy

TRAINED = cnf.Solver("dopri5", rtol=1e-3, atol=1e-3)
TESTED = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)
WIDTHS = (13, 19, 19, 10, 10, 10, 9)  # of the columns


@dataclass(frozen=True)
class Contestant:
    """A way to train."""

    regularizers: tuple[Regularizer, ...] = ()
    steer: float = 0.0
    field: Callable[..., cnf.VectorField] = cnf.MLPField


def rnode(weight: float) -> Contestant:
    """RNODE's two terms, of equal weight."""
    return Contestant((KineticEnergy(weight), JacobianFrobenius(weight)))


CONTESTANTS = {
    "none": Contestant(),
    "rnode 0.003": rnode(0.003),
    "rnode 0.01": rnode(0.01),
    "rnode 0.03": rnode(0.03),
    "taylor 2": Contestant((TaylorDerivative(2, 0.003),)),
    "steer 0.25": Contestant(steer=0.25),
    "potential": Contestant(field=cnf.PotentialField),
    "ot-flow": Contestant((KineticEnergy(0.01), HJBResidual(0.01)), field=cnf.PotentialField),
}


@dataclass
class Row:
    """What one contestant reached."""

    name: str
    seconds: float
    log_prob: Tensor = field(repr=False)
    nfe: float
    nfe_sampling: float
    energy: float


def main() -> None:
    """Train, test, print, write."""
    args = _parse()
    torch.set_num_threads(args.threads)
    density = toy(args.data)
    test = density.sample(args.test, generator=torch.Generator().manual_seed(1))
    print(
        f"{args.data}: {args.steps} steps of {args.batch} points, hidden {args.hidden}, "
        f"seed {args.seed}; {args.test} test points, minus entropy {-density.entropy:.4f}"
    )
    _line("", ["test", "- none", "NFE", "sampling", "energy", "CPU s"])
    rows: list[Row] = []
    for name in args.only or CONTESTANTS:
        rows.append(run(name, density, test, args))
        show(rows[-1], rows[0])
        if args.out:  # at once: what follows may be stopped
            args.out.write_text(json.dumps(report(args, rows), indent=1) + "\n")
    if args.out:
        print(f"\nwritten: {args.out}")


def _parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--data", default="8gaussians", help="a toy density")
    flags.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME")
    flags.add_argument("--steps", type=int, default=600)
    flags.add_argument("--batch", type=int, default=256)
    flags.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    flags.add_argument("--lr", type=float, default=5e-3)
    flags.add_argument("--test", type=int, default=4000, help="number of test points")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    return flags.parse_args()


def run(name: str, density: PlaneDensity, test: Tensor, args: argparse.Namespace) -> Row:
    """Train one contestant, and test it."""
    how = CONTESTANTS[name]
    torch.manual_seed(args.seed)
    flow = cnf.FFJORD(2, args.hidden, field=how.field, solver=TRAINED)
    objective = cnf.MaximumLikelihood(flow, regularizers=how.regularizers, steer=how.steer)
    seconds = train(objective, density, args)
    return tested(name, flow, test, seconds)


def train(
    objective: cnf.MaximumLikelihood, density: PlaneDensity, args: argparse.Namespace
) -> float:
    """The processor's seconds that it took."""
    batches = torch.Generator().manual_seed(args.seed)
    optimiser = torch.optim.Adam(objective.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    start = time.process_time()
    for _ in range(args.steps):
        optimiser.zero_grad()
        objective(density.sample(args.batch, generator=batches)).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 10.0)
        optimiser.step()
        schedule.step()
    return time.process_time() - start


@torch.no_grad()
def tested(name: str, flow: cnf.Flow, test: Tensor, seconds: float) -> Row:
    """The figures of a trained flow."""
    log_probs, energies, nfes, sampling = [], [], [], []
    for i, x in enumerate(test.split(1000)):
        with cnf.record_solves() as solves:
            log_prob, energy = flow.log_prob_and_integrals(
                x, regularizers=[KineticEnergy(0)], divergence="exact", solver=TESTED
            )
            flow.sample(len(x), solver=TESTED, generator=torch.Generator().manual_seed(i))
        log_probs.append(log_prob)
        energies.append(energy)
        nfes.append(solves[0].nfe)
        sampling.append(solves[1].nfe)
    energy = torch.cat(energies).mean().item()
    return Row(name, seconds, torch.cat(log_probs), _mean(nfes), _mean(sampling), energy)


def show(row: Row, first: Row) -> None:
    """Print a row; the first one is what others are compared with."""
    cells = [
        _pm(row.log_prob),
        "-" if row is first else _pm(row.log_prob - first.log_prob),
        f"{row.nfe:.0f}",
        f"{row.nfe_sampling:.0f}",
        f"{row.energy:.2f}",
        f"{row.seconds:.0f}",
    ]
    _line(row.name, cells)


def _line(name: str, cells: Sequence[str]) -> None:
    texts = [f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS[1:], strict=True)]
    print(f"{name:{WIDTHS[0]}}{''.join(texts)}", flush=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def _pm(values: Tensor) -> str:
    return f"{values.mean():.3f} +- {_error(values):.3f}"


def report(args: argparse.Namespace, rows: Sequence[Row]) -> dict[str, object]:
    """All figures, as plain values."""
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    scores = []
    for row in rows:
        gain = row.log_prob - rows[0].log_prob
        scores.append(
            {
                "name": row.name,
                "log_prob": [row.log_prob.mean().item(), _error(row.log_prob)],
                "gain": [gain.mean().item(), _error(gain)],
                "nfe": row.nfe,
                "nfe_sampling": row.nfe_sampling,
                "energy": row.energy,
                "seconds": row.seconds,
            }
        )
    return {"flags": flags, "rows": scores}


if __name__ == "__main__":
    main()
