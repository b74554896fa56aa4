r"""Test log-likelihood against training time: likelihood, flow matching, OT flow matching, both.

    python bench/time_to_likelihood.py --plot curves.png
    python bench/time_to_likelihood.py --data checkerboard --hidden 128 128
    python bench/time_to_likelihood.py --data FILE            # a table: .csv, .txt, .npy, .npz

One network, the same first weights and the same constant learning rate for all. Weights are
averaged over the last tenth of the steps so far, so that a curve is fair at all its points, and
scored by dopri5 at 1e-5 with the exact trace; the time of scoring is not counted. The methods take
turns from one time of the curve to the next, so that all meet the same noise of the machine.
Optimal transport pairs groups of 128.
"Both" matches for half of each time and fine-tunes by likelihood for the other half: each of its
points is a run of its own that begins with the weights of flow matching.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import cnf
from cnf.data import TOY_NAMES, read_table, split_table, toy
from cnf.objectives.couplings import Coupling, Independent, OptimalTransport
from cnf.objectives.time_sampling import TIME_SAMPLING
from cnf.training import Muon

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "adam": lambda module, lr: torch.optim.Adam(module.parameters(), lr=lr),
    "muon": Muon,
}
METHODS = ("likelihood", "flow matching", "OT flow matching", "both")
SOLVER = cnf.Solver("dopri5", rtol=1e-3, atol=1e-3)  # in training
TIGHT = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of the time, the curve's points


class Trainer:
    """A flow in training, its clock, and the average of its weights."""

    def __init__(
        self, objective: nn.Module, batch: Callable[[], Tensor], lr: float, optimizer: str = "adam"
    ) -> None:
        self.objective, self.batch = objective, batch
        self.average = copy.deepcopy(objective)
        self.optimizer = OPTIMIZERS[optimizer](objective, lr)
        self.seconds, self.steps = 0.0, 0

    def train_until(self, seconds: float) -> None:
        """Steps until the clock shows so much."""
        start = time.perf_counter() - self.seconds
        while (now := time.perf_counter() - start) < seconds:
            self.seconds = now
            self.step()
        self.seconds = time.perf_counter() - start

    def step(self) -> None:
        """One step of the optimiser, and of the average."""
        self.optimizer.zero_grad()
        self.objective(self.batch()).backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 10.0)
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            weight = 10.0 / (10.0 + self.steps)
            pairs = zip(self.average.parameters(), self.objective.parameters(), strict=True)
            for mean, parameter in pairs:
                mean.lerp_(parameter, weight)

    def flow(self) -> cnf.Flow:
        """The flow of averaged weights."""
        flow: cnf.Flow = self.average.flow  # type: ignore[assignment]
        return flow


def main() -> None:
    """Train in turns, score, print, draw."""
    args = _parse()
    torch.set_num_threads(args.threads)
    batch, test, best = load(args.data, args.batch, args.test_size)
    features = test.shape[1]
    print(
        f"{Path(args.data).stem}: {features}-D, hidden {' x '.join(map(str, args.hidden))}, batch "
        f"{args.batch}, {args.optimizer} {args.lr:g}, threads {args.threads}, {len(test)} test "
        "points" + ("" if best is None else f"; the density itself has {best:.4f}")
    )
    curves = measure(args, batch, test)
    show(curves, best)
    if args.out:
        args.out.write_text(json.dumps(curves, indent=1) + "\n")
        print(f"written: {args.out}")
    if args.plot:
        draw(curves, best, args)


def _parse() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--data", default="checkerboard", help=f"{', '.join(TOY_NAMES)}, or a FILE")
    flags.add_argument("--seconds", type=float, default=60.0, help="of training, each method")
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    flags.add_argument("--batch", type=int, default=512)
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="of all methods")
    flags.add_argument("--time-sampling", choices=TIME_SAMPLING, default="log-uniform")
    flags.add_argument("--test-size", type=int, default=2000)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--out", type=Path, metavar="FILE", help="the curves as JSON")
    flags.add_argument("--plot", type=Path, metavar="FILE")
    args = flags.parse_args()
    if not args.seconds > 0:
        flags.error(f"--seconds={args.seconds} must be positive")
    return args


def load(data: str, size: int, test_size: int) -> tuple[Callable[[], Tensor], Tensor, float | None]:
    """What draws a batch, the test points, and their true mean log-likelihood where it is known."""
    generator = torch.Generator().manual_seed(0)
    if data in TOY_NAMES:
        density = toy(data)
        test = density.sample(test_size, torch.Generator().manual_seed(1))
        best = density.log_prob(test.double()).mean().item()
        return lambda: density.sample(size, generator), test, best
    table = split_table(read_table(data), drop_constant=True)
    rows = table.train

    def batch() -> Tensor:
        return rows[torch.randint(len(rows), (size,), generator=generator)]

    return batch, table.test[:test_size], None


def measure(
    args: argparse.Namespace, batch: Callable[[], Tensor], test: Tensor
) -> dict[str, list[dict[str, float]]]:
    """The curve of each method: seconds, steps, test log-likelihood."""
    torch.manual_seed(args.seed)
    first = cnf.FFJORD(test.shape[1], args.hidden, solver=SOLVER)

    def trainer(method: str, flow: cnf.Flow) -> Trainer:
        optimal = method == "OT flow matching"
        coupling: Coupling = OptimalTransport() if optimal else Independent()
        objective: nn.Module = cnf.MaximumLikelihood(flow)
        if method not in ("likelihood", "fine-tuning"):
            objective = cnf.FlowMatching(flow, coupling=coupling, time_sampling=args.time_sampling)
        return Trainer(objective, batch, args.lr, args.optimizer)

    trainers = {name: trainer(name, copy.deepcopy(first)) for name in args.methods}
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in args.methods}
    for fraction in FRACTIONS:
        seconds = fraction * args.seconds
        for name, run in trainers.items():
            run.train_until(seconds / 2 if name == "both" else seconds)
            scored, steps = run, run.steps
            if name == "both":
                scored = trainer("fine-tuning", copy.deepcopy(run.flow()))
                scored.train_until(seconds / 2)
                steps += scored.steps
            curves[name].append(
                {"seconds": seconds, "steps": steps, "log_prob": score(scored.flow(), test)}
            )
    return curves


@torch.no_grad()
def score(flow: cnf.Flow, test: Tensor) -> float:
    """The mean log-likelihood of test points; NaN where a solve fails."""
    try:
        parts = [flow.log_prob(x, divergence="exact", solver=TIGHT) for x in test.split(1000)]
    except cnf.SolverError:
        return float("nan")
    return torch.cat(parts).double().mean().item()


def show(curves: dict[str, list[dict[str, float]]], best: float | None) -> None:
    """Print the table, and when each method reaches what likelihood has at the end."""
    names = list(curves)
    print("\n" + "seconds".rjust(8) + "".join(name.rjust(18) for name in names))
    for rows in zip(*curves.values(), strict=True):
        cells = "".join(f"{row['log_prob']:18.4f}" for row in rows)
        print(f"{rows[0]['seconds']:8.1f}{cells}")
    print("steps".rjust(8) + "".join(f"{rows[-1]['steps']:18.0f}" for rows in curves.values()))
    if "likelihood" not in curves:
        return
    goal, total = curves["likelihood"][-1]["log_prob"], curves["likelihood"][-1]["seconds"]
    print(f"\nwhat likelihood has after {total:g} s, {goal:.4f}, is reached by")
    for name in names:
        at = reached(curves[name], goal)
        text = "not at all" if at is None else f"{at:.1f} s, {at / total:.2f} of the time"
        print(f"  {name:18}{text}")


def reached(curve: Sequence[dict[str, float]], goal: float) -> float | None:
    """The first time of the curve at which it is at the goal, or None."""
    return next((row["seconds"] for row in curve if row["log_prob"] >= goal), None)


def draw(
    curves: dict[str, list[dict[str, float]]], best: float | None, args: argparse.Namespace
) -> None:
    """Log-likelihood against seconds, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        seconds, values = ([row[key] for row in rows] for key in ("seconds", "log_prob"))
        axes.plot(seconds, values, marker="o", label=name)
    if best is not None:
        axes.axhline(best, color="black", linestyle="--", label="the density itself")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="test log-likelihood, nats")
    axes.set_title(f"{Path(args.data).stem}, {args.optimizer}, threads {args.threads}")
    shown = [row["log_prob"] for rows in curves.values() for row in rows[len(rows) // 3 :]]
    finite = [value for value in shown if value == value]
    if finite:
        top = max([*finite, *([] if best is None else [best])])
        axes.set_ylim(min(finite) - 0.1, top + 0.05)
    axes.legend(loc="lower right")
    figure.savefig(args.plot, dpi=120)
    print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
