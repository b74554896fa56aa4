"""Learn posteriors p(x | c) from simulations, by likelihood and by flow matching, and judge them.

python examples/conditional.py                     # two problems, two objectives, five minutes
python examples/conditional.py --problem two-moons --objective flow-matching
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    complete,
    default_out,
    goes_on,
    parameters,
    parser,
    prepare,
    print_notes,
    run_example,
    standard_error,
    train_flow,
    write_report,
)
from models import flow_solver
from objectives import MATCHING_OPTIMIZER, add_optimizer
from torch import Tensor, nn

import cnf
from cnf.calibration import Calibration, c2st, simulation_based_calibration
from cnf.data import LinearGaussian, Simulator, TwoMoons
from cnf.objectives.time_sampling import TIME_SAMPLING
from cnf.plotting import plot_calibration, plot_posteriors, plot_training
from cnf.training import FitResult

REFERENCE = cnf.Solver("dopri5", rtol=1e-4, atol=1e-4)  # of all final figures: means right to 1e-3
DRAWS = 99  # from each posterior, for its calibration: 100 ranks, in 20 bins of 5
VALIDATION = 1000  # pairs to choose the best weights by
SHOWN = 3  # observations in a picture

PROBLEMS: dict[str, Simulator] = {
    "linear-gaussian": LinearGaussian.random(features=4, context=3, noise=0.5),
    "two-moons": TwoMoons(),
}
OBJECTIVES = ("likelihood", "flow-matching")
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("linear-gaussian", "likelihood"): {"steps": 300, "hidden": [32, 32]},
    ("linear-gaussian", "flow-matching"): {"steps": 3000, "hidden": [32, 32]},
    ("two-moons", "likelihood"): {"steps": 600, "hidden": [64, 64]},
    ("two-moons", "flow-matching"): {"steps": 8000, "hidden": [128, 128], "ema_decay": 0.995},
}
ALL = {
    "lr": 1e-2,
    "batch_size": 512,
    "ema_decay": 0.99,
    "optimizer": MATCHING_OPTIMIZER,
    "time_sampling": "log-uniform",
}
SIZES = {"test_size": 2, "calibration_size": 1, "observations": 1, "c2st_samples": 10}
"""Those of the test, and the least of each."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        problem: what was simulated.
        objective: what the flow was trained by.
        log_prob: mean log q(x | c) of the test pairs, in nats.
        log_prob_error: its standard error.
        kl: mean log p(x | c) - log q(x | c), of the true posterior.
        kl_error: its standard error.
        p_parameters: p-value of the ranks of the parameters, the smallest times their number.
        p_density: p-value of the ranks of the density.
        c2st: accuracy of a classifier that tells q from the posterior, a mean over observations.
        c2st_each: the accuracy of each.
        parameters: how many numbers are learned.
        steps: of training.
        stopped: by what.
        training_seconds: of training and validation.
        test_seconds: of the test.
    """

    problem: str
    objective: str
    log_prob: float
    log_prob_error: float
    kl: float
    kl_error: float
    p_parameters: float
    p_density: float
    c2st: float | None
    c2st_each: list[float]
    parameters: int
    steps: int
    stopped: str
    training_seconds: float
    test_seconds: float

    @property
    def key(self) -> str:
        """The run, by name."""
        return f"{self.problem}/{self.objective}"

    def cells(self) -> list[str]:
        """How it reads."""
        return [
            self.problem,
            self.objective,
            f"{self.log_prob:.3f} +- {self.log_prob_error:.3f}",
            f"{self.log_prob + self.kl:.3f}",
            f"{self.kl:.3f} +- {self.kl_error:.3f}",
            f"{self.p_parameters:.2g}",
            f"{self.p_density:.2g}",
            "" if self.c2st is None else f"{self.c2st:.3f}",
            str(self.parameters),
            str(self.steps),
            f"{self.training_seconds:.0f}",
        ]


def main() -> int:
    """Run the example; the exit code is 0, 1 if a run failed, or 130 after Ctrl-C."""
    args = conditional_flags().parse_args()
    check(args)
    runs = [
        of_run(args, problem, objective)
        for problem in dict.fromkeys(args.problem)
        for objective in dict.fromkeys(args.objective)
    ]
    for run in runs:  # what cannot be built is better known before the first is trained
        objective_of(run)
    out = args.out or default_out("conditional", "-".join(dict.fromkeys(args.problem)))
    found = read_rows(out) if args.resume else {}
    trained: dict[str, cnf.Flow] = {}
    judged: dict[str, Calibration] = {}
    failed: list[str] = []
    for run in runs:
        key = f"{run.problem}/{run.objective}"
        run.resume = args.resume and (out / key / "last.safetensors").exists()
        if key in found and not goes_on(found[key], run):
            run.max_time = 0.0  # it has had its time
        print(f"{key}: up to {run.steps} steps")
        try:
            flow, result = train(run, out / key)
            if result.signal is not None:
                return result.exit_code
            row, judged[key] = measure(run, flow, result)
        except (cnf.SolverError, cnf.TrainingError) as error:
            failed.append(f"{key} failed: {error}")
            continue
        trained[key] = flow
        found[key] = dataclasses.asdict(row)
        text = json.dumps(list(found.values()), indent=2)
        (out / "results.json").write_text(text + "\n", encoding="utf-8")
    report([Row(**row) for row in found.values()], failed, args, out)
    for problem in dict.fromkeys(args.problem):
        draw(problem, trained, judged, args, out)
    return 1 if failed else 0


def conditional_flags() -> argparse.ArgumentParser:
    """The flags; those left open have defaults by problem and objective."""
    flags = parser(__doc__, fields=())
    flags.add_argument(
        "--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="what is simulated"
    )
    flags.add_argument(
        "--objective",
        nargs="+",
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        help="what the flow is trained by",
    )
    add_optimizer(flags)
    flags.add_argument("--time-sampling", choices=TIME_SAMPLING, help="in flow matching")
    flags.add_argument("--test-size", type=int, default=2000, help="pairs to test on")
    flags.add_argument(
        "--calibration-size", type=int, default=300, help="pairs to judge the calibration by"
    )
    flags.add_argument(
        "--observations", type=int, default=3, help="observations of two-moons for C2ST"
    )
    flags.add_argument(
        "--c2st-samples",
        type=int,
        default=2000,
        help="of each posterior, for C2ST and pictures; the benchmark has 10000",
    )
    words = [
        f"{name}: {', '.join(f'{k} {v}' for k, v in defaults.items())}"
        for name, defaults in {**{"/".join(k): d for k, d in DEFAULTS.items()}, "else": ALL}.items()
    ]
    flags.epilog = f"Flags that are not given (None) have defaults: {'; '.join(words)}."
    return flags


def check(args: argparse.Namespace) -> None:
    """Refuse what would otherwise be found after the training."""
    for name, least in SIZES.items():
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be {least} or more")
    if args.time_sampling is not None and "flow-matching" not in args.objective:
        raise ValueError("--time-sampling has no effect on likelihood; leave it out")


def of_run(args: argparse.Namespace, problem: str, objective: str) -> argparse.Namespace:
    """The flags of one run."""
    run = complete(args, "ffjord", {**ALL, **DEFAULTS[problem, objective]})
    run.problem, run.objective = problem, objective
    return run


def build(args: argparse.Namespace) -> cnf.FFJORD:
    """The flow of the parameters, given an observation."""
    simulator = PROBLEMS[args.problem]
    return cnf.FFJORD(
        simulator.features,
        args.hidden,
        blocks=args.blocks,
        context=simulator.context,
        divergence=None if args.trace == "auto" else args.trace,
        solver=flow_solver(args),
    )


def objective_of(args: argparse.Namespace) -> nn.Module:
    """What a new flow is trained by."""
    flow = build(args)
    if args.objective == "likelihood":
        return cnf.MaximumLikelihood(flow)
    return cnf.FlowMatching(flow, time_sampling=args.time_sampling)


def train(args: argparse.Namespace, out: Path) -> tuple[cnf.Flow, FitResult]:
    """Train a flow on pairs that are simulated for it; return it with its best averaged weights."""
    prepare(args)
    x, c = pairs(args, VALIDATION, 1)

    @torch.no_grad()
    def validate(averaged: cnf.Flow) -> Tensor:
        return -averaged.log_prob(*on_device(averaged, x, c), divergence="exact")

    return train_flow(
        argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in SIZES}),
        objective_of(args),
        PROBLEMS[args.problem].sample,
        out,
        validate,
        clip_grad_norm=10.0,
        validate_every=max(1, args.steps // 10),
    )


def pairs(args: argparse.Namespace, n: int, stream: int) -> tuple[Tensor, Tensor]:
    """Parameters and observations of a stream of their own."""
    generator = torch.Generator().manual_seed(1000 * (args.seed + 1) + stream)
    return PROBLEMS[args.problem].sample(n, generator)


def on_device(flow: cnf.Flow, *tensors: Tensor) -> list[Tensor]:
    """The tensors where the flow is."""
    device = next(flow.parameters()).device
    return [tensor.to(device) for tensor in tensors]


@torch.no_grad()
def measure(args: argparse.Namespace, flow: cnf.Flow, result: FitResult) -> tuple[Row, Calibration]:
    """The test of a trained flow."""
    start = time.perf_counter()
    x, c = pairs(args, args.test_size, 2)
    log_q = flow.log_prob(*on_device(flow, x, c), divergence="exact", solver=REFERENCE).cpu()
    print_notes(log_q, f"{args.problem}: ")
    kl = PROBLEMS[args.problem].posterior_log_prob(x, c) - log_q
    calibration = judge(args, flow)
    *by_parameter, p_density = calibration.p_values().tolist()
    accuracies = c2st_of(args, flow) if args.problem == "two-moons" else []
    row = Row(
        args.problem,
        args.objective,
        log_q.mean().item(),
        standard_error(log_q),
        kl.mean().item(),
        standard_error(kl),
        min(1.0, len(by_parameter) * min(by_parameter)),
        p_density,
        statistics.mean(accuracies) if accuracies else None,
        accuracies,
        parameters(flow),
        result.step,
        result.stopped,
        result.elapsed,
        time.perf_counter() - start,
    )
    return row, calibration


def judge(args: argparse.Namespace, flow: cnf.Flow) -> Calibration:
    """The calibration of a flow, on pairs of their own."""
    x, c = on_device(flow, *pairs(args, args.calibration_size, 3))
    return simulation_based_calibration(
        flow, x, c, draws=DRAWS, divergence="exact", solver=REFERENCE
    )


def c2st_of(args: argparse.Namespace, flow: cnf.Flow) -> list[float]:
    """How well a classifier tells the flow from the posterior, for each of some observations."""
    true, found = posteriors(args, flow, args.observations, args.c2st_samples)
    return [c2st(true[:, i], found[:, i]) for i in range(true.shape[1])]


@torch.no_grad()
def posteriors(
    args: argparse.Namespace, flow: cnf.Flow, observations: int, n: int
) -> tuple[Tensor, Tensor]:
    """Samples (n, B, D) of the true posteriors and of the flow."""
    _, c = pairs(args, observations, 4)
    generator = torch.Generator().manual_seed(args.seed)
    true = PROBLEMS[args.problem].posterior_sample(c, n, generator)
    found = flow.sample((n,), *on_device(flow, c), solver=REFERENCE, generator=generator)
    return true, found.cpu()


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of runs that have ended."""
    path = out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {Row(**row).key: row for row in rows}


def report(rows: list[Row], failed: list[str], args: argparse.Namespace, out: Path) -> None:
    """Print the table, and keep it as report.txt."""
    lines = [
        ["", "", "log q(x | c)", "true", "KL", "p of", "p of", "C2ST", "", "", "training"],
        ["", "", "nats", "nats", "nats", "ranks", "density", "", "parameters", "steps", "s"],
        *(row.cells() for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        *(
            "  ".join(
                [*map(str.ljust, cells[:2], widths), *map(str.rjust, cells[2:], widths[2:])]
            ).rstrip()
            for cells in lines
        ),
        f"{args.test_size} test pairs; p-values of {args.calibration_size} pairs, small where the "
        f"flow is not calibrated; C2ST (0.5 is best) of {args.c2st_samples} samples, a mean over "
        f"{args.observations} observations",
        *failed,
    ]
    write_report(text, out)


def draw(
    problem: str,
    trained: dict[str, cnf.Flow],
    judged: dict[str, Calibration],
    args: argparse.Namespace,
    out: Path,
) -> None:
    """The pictures of a problem: calibration, posteriors of some observations, training."""
    runs = {key.partition("/")[2]: key for key in trained if key.startswith(f"{problem}/")}
    if not runs:
        return
    samples: dict[str, Tensor] = {}
    for objective, key in runs.items():
        run = of_run(args, problem, objective)
        true, found = posteriors(run, trained[key], SHOWN, args.c2st_samples)
        samples |= {"true posterior": true[..., :2], objective: found[..., :2]}
    x, _ = pairs(run, SHOWN, 4)
    figures = {
        "calibration": plot_calibration({o: judged[key] for o, key in runs.items()}),
        "posterior": plot_posteriors(samples, x[:, :2]),
        "training": plot_training(
            {o: out / key / "log.jsonl" for o, key in runs.items()},
            ylabel="-log q(x | c), nats",
            terms=["negative_log_likelihood"],  # which flow matching does not know
        ),
    }
    for name, figure in figures.items():
        path = out / problem / f"{name}.png"
        figure.savefig(path, dpi=100)
        print(f"picture: {path}")


if __name__ == "__main__":
    run_example(main)
