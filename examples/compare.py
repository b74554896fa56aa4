"""Train several flows on one data set and compare them: likelihood, size, time, and a picture.

python examples/compare.py                                  # every model on 8gaussians
python examples/compare.py --data checkerboard --models ffjord nsf maf --max-time 30
python examples/compare.py --data FILE                      # a table: .csv, .txt, .npy, .npz
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    PLANE,
    TABLE,
    add_models,
    complete,
    default_out,
    device_of,
    goes_on,
    mean_and_error,
    open_density,
    parameters,
    parser,
    print_notes,
    refuse_idle,
    run_example,
    score,
    standard_error,
    train,
)
from models import MODELS
from torch import Tensor

import cnf
from cnf.data import (
    TOY_NAMES,
    PlaneDensity,
    gaussian_log_prob,
    read_table,
    sklearn_table,
    split_table,
)
from cnf.plotting import plot_densities, plot_samples
from cnf.training import FitResult

TABLES = (".csv", ".txt", ".npy", ".npz")
TIMED, REPEATS = 1000, 7  # points of a timed call, and calls


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the flows learn, and what they are measured against.

    Attributes:
        name: of the data.
        train: the rows, or what draws points.
        val: points to choose the best weights by.
        test: points to compare on.
        reference: a log-likelihood of each test point: the true one, or a Gaussian's.
        density: the true one, where it is known.
        defaults: of the flags.
        fit: when to validate, and when to stop.
    """

    name: str
    train: Tensor | Callable[[int, torch.Generator], Tensor]
    val: Tensor
    test: Tensor
    reference: Tensor
    density: PlaneDensity | None
    defaults: dict[str, Any]
    fit: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's line of the table; `gap` is the KL divergence, or the gain over a Gaussian."""

    model: str
    log_prob: float
    log_prob_error: float
    gap: float
    gap_error: float
    parameters: int
    steps: int
    stopped: str
    training_seconds: float
    log_prob_ms: float
    sample_ms: float

    def cells(self) -> list[str]:
        """How it reads."""
        return [
            self.model,
            f"{self.log_prob:.4f} +- {self.log_prob_error:.4f}",
            f"{self.gap:.4f} +- {self.gap_error:.4f}",
            str(self.parameters),
            str(self.steps),
            f"{self.training_seconds:.1f}",
            f"{self.log_prob_ms:.2f}",
            f"{self.sample_ms:.2f}",
        ]


def main() -> int:
    """Run the example; the exit code is 0, 1 if a model failed, or 130 after Ctrl-C."""
    flags = parser(__doc__)
    add_models(flags, PLANE, several=True)
    flags.add_argument(
        "--data",
        default="8gaussians",
        help=f"{', '.join(TOY_NAMES)}, a picture file, breast_cancer (in scikit-learn), or a "
        "table file, for which the flags that are not given are those of table.py",
    )
    flags.add_argument("--test-size", type=int, default=10_000, help="test points of a density")
    flags.add_argument(
        "--columns", type=int, nargs=2, default=[0, 1], help="of a table, for the picture"
    )
    args = flags.parse_args()
    refuse_idle(flags, args.models)
    problem = open_problem(args)
    runs = [complete(args, name, problem.defaults) for name in dict.fromkeys(args.models)]
    for run in runs:  # what cannot be built is better known before the first is trained
        MODELS[run.model].build(run, problem.test.shape[1])
    out = args.out or default_out("compare", problem.name)
    found = read_rows(out) if args.resume else {}
    flows: dict[str, cnf.Flow] = {}
    rows: list[Row] = []
    failed: list[str] = []
    for run in runs:
        run.resume = args.resume and (out / run.model / "last.safetensors").exists()
        ended = run.model in found and not goes_on(found[run.model], run)
        run.max_time = 0.0 if ended else args.max_time  # it has had its time
        print(f"{run.model}: up to {run.steps} steps")
        try:
            flow, result = train(run, problem.train, problem.val, out / run.model, **problem.fit)
        except (cnf.SolverError, cnf.TrainingError) as error:
            failed.append(f"{run.model} failed: {error}")
            continue
        if result.signal is not None:
            return result.exit_code
        flows[run.model] = flow
        rows.append(measure(run.model, flow, result, problem))
        found[run.model] = dataclasses.asdict(rows[-1])
        text = json.dumps(list(found.values()), indent=2)
        (out / "compare.json").write_text(text + "\n", encoding="utf-8")
    report(rows, failed, problem, runs[0], out)
    draw(flows, rows, problem, args.columns, out)
    return 1 if failed else 0


def open_problem(args: argparse.Namespace) -> Problem:
    """The data set that --data names."""
    path = Path(args.data)
    if args.data == "breast_cancer" or path.suffix.lower() in TABLES:
        return open_table(args.data, args.columns)
    if args.test_size < 2:
        raise ValueError(f"--test-size={args.test_size} must be 2 or more, for a standard error")
    density = open_density(args.data)
    held_out = torch.Generator().manual_seed(args.seed + 1)
    val, test = (density.sample(n, held_out) for n in (2000, args.test_size))

    def batch(size: int, generator: torch.Generator) -> Tensor:
        return density.sample(size, generator)

    true = density.log_prob(test.double())
    return Problem(path.stem, batch, val, test, true, density, PLANE, {"validate_every": 250})


def open_table(data: str, columns: list[int]) -> Problem:
    """A table, split as by table.py."""
    numbers = sklearn_table(data) if data == "breast_cancer" else read_table(data)
    table = split_table(numbers, drop_constant=True)
    count = len(table.names)
    if not all(0 <= i < count for i in columns):
        raise ValueError(f"--columns={columns} must lie in 0 ... {count - 1}: {data} has {count}")
    gaussian = gaussian_log_prob(table.train, table.test)  # refuses dependent columns
    fit = {"validate_every": 100, "patience": 6}
    name = Path(data).stem
    return Problem(name, table.train, table.val, table.test, gaussian, None, TABLE, fit)


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a comparison that was cut short: of each model trained to its end."""
    path = out / "compare.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["model"]: row for row in rows}


def measure(name: str, flow: cnf.Flow, result: FitResult, problem: Problem) -> Row:
    """The test of a trained flow, and its times."""
    log_prob = score(flow, problem.test).log_prob
    print_notes(log_prob, f"{name}: ")
    gap = log_prob - problem.reference
    if problem.density is not None:
        gap = -gap
    device = next(flow.parameters()).device
    x = problem.test[torch.arange(TIMED, device="cpu") % len(problem.test)].to(device)
    return Row(
        name,
        log_prob.mean().item(),
        standard_error(log_prob),
        gap.mean().item(),
        standard_error(gap),
        parameters(flow),
        result.step,
        result.stopped,
        result.elapsed,
        milliseconds(lambda: flow.log_prob(x)),
        milliseconds(lambda: flow.sample((TIMED,))),
    )


@torch.no_grad()
def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median time of a call, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call().sum().item()  # waits for a GPU
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def report(
    rows: list[Row], failed: list[str], problem: Problem, run: argparse.Namespace, out: Path
) -> None:
    """Print the table, and keep it as compare.txt."""
    known = problem.density is not None
    gap, reference = ("KL", "true density") if known else ("above Gaussian", "Gaussian")
    lines = [
        ["", "test", gap, "parameters", "steps", "training", "log_prob", "sampling"],
        ["", "log-likelihood", "nats", "", "", "s", "ms", "ms"],
        [reference, mean_and_error(problem.reference), *[""] * 6],
        *(row.cells() for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"{problem.name}: {len(problem.test)} test points of {problem.test.shape[1]} dimensions",
        *(
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in lines
        ),
        f"log_prob and sampling: of {TIMED} points, median of {REPEATS}, on "
        f"{where(run)}; a continuous flow with the solver of its training",
        *failed,
    ]
    print("\n" + "\n".join(text))
    (out / "compare.txt").write_text("\n".join(text) + "\n", encoding="utf-8")


def where(run: argparse.Namespace) -> str:
    """The device, and its threads."""
    device = device_of(run.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {run.threads} thread{'s' if run.threads > 1 else ''}"


@torch.no_grad()
def draw(
    flows: dict[str, cnf.Flow], rows: list[Row], problem: Problem, columns: list[int], out: Path
) -> None:
    """compare.png: densities of the plane side by side, or two columns of a table."""
    titles = {row.model: f"{row.model}  {row.log_prob:.3f}" for row in rows}
    density = problem.density
    if density is not None:
        shown = {f"true density  {problem.reference.mean():.3f}": density.log_prob}
        shown |= {titles[name]: on_its_device(flow) for name, flow in flows.items()}
        figure = plot_densities(shown, problem.test)
    else:
        samples = {"data": problem.train}
        for name, flow in flows.items():
            generator = torch.Generator().manual_seed(0)
            samples[titles[name]] = flow.sample((len(problem.train),), generator=generator)
        figure = plot_samples(samples, dims=(columns[0], columns[1]))
    figure.savefig(out / "compare.png", dpi=100)
    print(f"picture: {out / 'compare.png'}")


def on_its_device(flow: cnf.Flow) -> Callable[[Tensor], Tensor]:
    """The log-density of points on any device."""
    device = next(flow.parameters()).device
    return lambda x: flow.log_prob(x.to(device), divergence="exact")


if __name__ == "__main__":
    run_example(main)
