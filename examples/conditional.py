"""Learn posteriors p(x | c) from simulations, by likelihood and by flow matching, and judge them.

python examples/conditional.py                     # two problems, two objectives, some minutes
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
    UNRELATED,
    complete,
    default_out,
    device_of,
    goes_on,
    parameters,
    parser,
    prepare,
    run_example,
    schedule,
    standard_error,
)
from models import MODELS, flow_solver, optional
from torch import Tensor, nn

import cnf
from cnf.calibration import Calibration, c2st, simulation_based_calibration
from cnf.data import LinearGaussian, Simulator, TwoMoons
from cnf.objectives.time_sampling import Stratified
from cnf.plotting import plot_calibration, plot_posteriors, plot_training
from cnf.training import FitResult, fit, load_weights

REFERENCE = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)  # how every final figure is computed
DRAWS = 99  # from each posterior, for its calibration: 100 ranks, in 20 bins of 5
VALIDATION = 1000  # pairs to choose the best weights by
SHOWN = 3  # observations in a picture

PROBLEMS: dict[str, Simulator] = {
    "linear-gaussian": LinearGaussian.random(features=4, context=3, noise=0.5),
    "two-moons": TwoMoons(),
}
OBJECTIVES = ("likelihood", "flow-matching")
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("linear-gaussian", "likelihood"): {"steps": 300, "lr": 1e-2, "hidden": [32, 32]},
    ("linear-gaussian", "flow-matching"): {"steps": 3000, "lr": 1e-2, "hidden": [32, 32]},
    ("two-moons", "likelihood"): {"steps": 800, "lr": 1e-2, "hidden": [64, 64], "fineness": 20.0},
    ("two-moons", "flow-matching"): {
        "steps": 25_000,
        "lr": 3e-3,
        "hidden": [128, 128],
        "ema_decay": 0.999,
        "fineness": 20.0,
        "late": 1.0,
    },
}
ALL = {"ema_decay": 0.99, "batch_size": 512, "fineness": 1.0, "late": 0.0}


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
        build(run)
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
    flags = parser(__doc__, fields=(), test_size=2000)
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
    flags.add_argument(
        "--fineness",
        type=float,
        help="of the field's first features: a factor of its weights of parameters and observation",
    )
    flags.add_argument(
        "--late",
        type=float,
        help="flow matching's times are 1 - u^(1 + this), u uniform: above 0 more near the data",
    )
    flags.add_argument("--test-size", type=int, help="pairs to test on")
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
    flags.set_defaults(objective=list(OBJECTIVES), test_size=2000)
    words = [
        f"{'/'.join(names)}: {', '.join(f'{k} {v}' for k, v in d.items())}"
        for names, d in DEFAULTS.items()
    ]
    flags.epilog = f"Flags that are not given (None) have defaults: {'; '.join(words)}."
    return flags


def check(args: argparse.Namespace) -> None:
    """Refuse what would otherwise be found after the training."""
    for name, least in (
        ("test_size", 2),
        ("calibration_size", 1),
        ("observations", 1),
        ("c2st_samples", 10),
        ("late", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be {least} or more")
    if args.late is not None and "flow-matching" not in args.objective:
        raise ValueError("--late has no effect on likelihood; leave it out")
    if args.fineness is not None and not args.fineness > 0:
        raise ValueError(f"--fineness={args.fineness} must be positive")


def of_run(args: argparse.Namespace, problem: str, objective: str) -> argparse.Namespace:
    """The flags of one run."""
    run = complete(args, "ffjord", {**ALL, **DEFAULTS[problem, objective]})
    run.problem, run.objective = problem, objective
    return run


def build(args: argparse.Namespace) -> cnf.FFJORD:
    """The flow of the parameters, given an observation.

    The posterior of two moons is a hundredth of its box thick, and where it is depends on c. From
    the usual initial weights a network takes long to become as fine, by any objective.
    """
    simulator = PROBLEMS[args.problem]
    flow = cnf.FFJORD(
        simulator.features,
        args.hidden,
        blocks=args.blocks,
        context=simulator.context,
        divergence=None if args.trace == "auto" else args.trace,
        solver=flow_solver(args),
    )
    with torch.no_grad():
        for field in (part for part in flow.modules() if isinstance(part, cnf.MLPField)):
            weight = field.network[0].weight  # (H, D + times + C)
            weight[:, : simulator.features] *= args.fineness
            weight[:, -simulator.context :] *= args.fineness
    return flow


def objective_of(args: argparse.Namespace, flow: cnf.Flow) -> nn.Module:
    """What the flow is trained by."""
    if args.objective == "likelihood":
        return cnf.MaximumLikelihood(flow)

    def times(n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        u = Stratified()(n, like=like, generator=generator)
        return 1 - (1 - u) ** (1 + args.late)

    return cnf.FlowMatching(flow, time_sampling=times)


def train(args: argparse.Namespace, out: Path) -> tuple[cnf.Flow, FitResult]:
    """Train that flow on pairs that are simulated for it; return its best averaged weights."""
    prepare(args)
    simulator, flow = PROBLEMS[args.problem], build(args)
    x, c = pairs(args, VALIDATION, 1)

    @torch.no_grad()
    def validate(averaged: nn.Module) -> float:
        log_prob = averaged.flow.log_prob(*on_device(flow, x, c), divergence="exact")
        return -log_prob.mean().item()

    def simulate(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return simulator.sample(size, generator)

    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    unread = {*UNRELATED, *(optional(MODELS) - MODELS["ffjord"].takes)}
    unread |= {"calibration_size", "observations", "c2st_samples"}
    result = fit(
        objective_of(args, flow),
        simulate,
        steps=args.steps,
        batch_size=args.batch_size,
        optimizer=optimizer,
        scheduler=schedule(optimizer, args.steps),
        clip_grad_norm=10.0,
        ema_decay=args.ema_decay,
        validate=validate,
        validate_every=max(1, args.steps // 10),
        max_time=args.max_time,
        out=out,
        resume=args.resume,
        config={k: v for k, v in vars(args).items() if k not in unread},
        seed=args.seed,
        device=device_of(args.device),
    )
    if result.signal is not None:
        print(f"Stopped at step {result.step}, saved in {out}. Go on with --resume.")
    else:
        load_weights(flow, result.best or out / "last.safetensors", prefix="flow")
    return flow, result


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
    print("\n" + "\n".join(text))
    (out / "report.txt").write_text("\n".join(text) + "\n", encoding="utf-8")


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
    parameters, _ = pairs(run, SHOWN, 4)
    figures = {
        "calibration": plot_calibration({o: judged[key] for o, key in runs.items()}),
        "posterior": plot_posteriors(samples, parameters[:, :2]),
        "training": plot_training({o: out / key / "log.jsonl" for o, key in runs.items()}),
    }
    for name, figure in figures.items():
        path = out / problem / f"{name}.png"
        figure.savefig(path, dpi=100)
        print(f"picture: {path}")


if __name__ == "__main__":
    run_example(main)
