"""Fit flows to densities known up to their normaliser, and see how near they come.

python examples/posterior2d.py                                   # all, about twenty minutes
python examples/posterior2d.py --potential 2 --models ffjord     # one
python examples/posterior2d.py --steps 5000 --resume             # go on, for longer

The targets are the potentials of Rezende and Mohamed (2015); flows are trained by reverse KL, on no
data. The free energy of a flow is at least -log Z, its gap the KL divergence from flow to target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    REFERENCE,
    complete,
    default_out,
    goes_on,
    parameters,
    parser,
    prepare,
    refuse_idle,
    run_example,
    train_flow,
    write_report,
)
from models import CONTINUOUS, Model, ffjord, flow_solver
from objectives import MATCHING_OPTIMIZER, add_optimizer
from torch import Tensor

import cnf
from cnf.data import POTENTIALS, Potential, potential
from cnf.plotting import plot_energies
from cnf.training import FitResult, linear
from cnf.transforms import Interval

VALIDATION = 4000  # samples of the free energy by which the best weights are chosen
FLAT = 0.05  # the exponent of the target, beta, in the first step
SHARPNESS = 3.0  # how much larger than usual a field's first weights are at the start


def layers_of(make: Callable[..., cnf.Flow], count: int) -> Callable[..., cnf.Flow]:
    """How to build a flow of so many layers without networks."""
    return lambda _args, features: make(features, layers=count)


def realnvp(args: argparse.Namespace, features: int) -> cnf.Flow:
    """Affine coupling layers."""
    return cnf.RealNVP(features, layers=8, hidden=args.hidden)


def sharp_ffjord(args: argparse.Namespace, features: int) -> cnf.FFJORD:
    """A continuous flow whose fields vary over shorter distances from the start.

    The targets turn within one unit. A field of the usual weights is flat over several, and learns
    turns last: it is ten times as far from the bound after as many steps.
    """
    flow = ffjord(args, features)
    for block in flow.modules():
        if isinstance(block, cnf.CNF):
            first = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
            with torch.no_grad():  # of x, not of time
                first.weight[:, :features] *= SHARPNESS
                first.bias *= SHARPNESS
    return flow


POSTERIORS = {
    "planar-2": Model(layers_of(cnf.PlanarFlow, 2), frozenset(), {"steps": 1000, "lr": 2e-2}),
    "planar-8": Model(layers_of(cnf.PlanarFlow, 8), frozenset(), {"steps": 1500, "lr": 2e-2}),
    "planar-32": Model(layers_of(cnf.PlanarFlow, 32), frozenset(), {"steps": 2000, "lr": 2e-2}),
    "radial-32": Model(layers_of(cnf.RadialFlow, 32), frozenset(), {"steps": 1500, "lr": 1e-2}),
    "realnvp": Model(
        realnvp, frozenset({"hidden"}), {"steps": 2500, "lr": 3e-3, "hidden": [64, 64]}
    ),
    "ffjord": Model(
        sharp_ffjord,
        CONTINUOUS,
        {
            "steps": 700,
            "lr": 5e-3,
            "optimizer": MATCHING_OPTIMIZER,
            "hidden": [64, 64],
            "batch_size": 512,
            "annealing": 0.5,
        },
    ),
}
"""The flows, and the flags of their training that are not given."""
COMMON: dict[str, Any] = {
    "batch_size": 256,
    "ema_decay": 0.99,
    "estimator": "reparameterised",
    "annealing": 0.7,  # a shorter one loses a branch of potential 4
    "optimizer": "adam",
    "layers": None,
}
OPEN = ("steps", "lr", "optimizer", "estimator", "annealing")


@dataclasses.dataclass(frozen=True)
class Row:
    """One flow's line of the table.

    Attributes:
        potential: number of the target.
        model: name of the flow.
        free_energy: E_q[log q + U].
        free_energy_error: its standard error.
        gap: what it is above -log Z: KL(q || p).
        log_z: the estimate of log Z by importance sampling.
        log_z_error: its standard error.
        log_z_true: the truth.
        effective: effective sample size, as a share of the samples.
        parameters: how many numbers are learned.
        steps: of training.
        stopped: by what.
        training_seconds: of training and validation.
    """

    potential: int
    model: str
    free_energy: float
    free_energy_error: float
    gap: float
    log_z: float
    log_z_error: float
    log_z_true: float
    effective: float
    parameters: int
    steps: int
    stopped: str
    training_seconds: float

    def cells(self) -> list[str]:
        """How it reads."""
        return [
            self.model,
            f"{self.free_energy:.4f} +- {self.free_energy_error:.4f}",
            f"{self.gap:.4f}",
            f"{self.log_z:.4f} +- {self.log_z_error:.4f}",
            f"{(self.log_z - self.log_z_true) / max(self.log_z_error, 1e-12):+.1f}",
            f"{self.effective:.1%}",
            str(self.parameters),
            str(self.steps),
            f"{self.training_seconds:.0f}",
        ]


HEAD = ["", "free energy", "gap", "log Z", "off, in s.e.", "ESS", "parameters", "steps", "s"]


def main() -> int:
    """Run the example; the exit code is 0, 1 if a flow failed, or 130 after Ctrl-C."""
    flags = posterior_flags()
    args = flags.parse_args()
    refuse_idle(flags, args.models, POSTERIORS)
    if args.test_size < 2:
        raise ValueError(f"--test-size={args.test_size} must be 2 or more, for a standard error")
    if args.annealing is not None and not 0 <= args.annealing <= 1:
        raise ValueError(f"--annealing={args.annealing} must be a share, from 0 to 1")
    numbers = list(dict.fromkeys(args.potential))
    runs = [with_defaults(args, name) for name in dict.fromkeys(args.models)]
    for run in runs:  # what cannot be built is better known before the first is trained
        objective_of(run, potential(numbers[0]))
    out = args.out or default_out("posterior2d", "potentials")
    found = read_rows(out) if args.resume else {}
    flows: dict[tuple[int, str], cnf.Flow] = {}
    failed: list[str] = []
    for number in numbers:
        for run in runs:
            key, folder = (number, run.model), out / f"potential{number}" / run.model
            own = argparse.Namespace(**{**vars(run), "potential": number})
            own.resume = args.resume and (folder / "last.safetensors").exists()
            if key in found and not goes_on(dataclasses.asdict(found[key]), run):
                own.max_time = 0.0  # it has had its time
            print(f"potential {number}, {run.model}: up to {run.steps} steps", flush=True)
            try:
                flow, result = train(own, potential(number), folder)
            except (ValueError, cnf.SolverError, cnf.TrainingError) as error:
                failed.append(f"potential {number}, {run.model} failed: {error}")
                continue
            if result.signal is not None:
                return result.exit_code
            flows[key], found[key] = flow, measure(own, flow, result, number)
            rows = [dataclasses.asdict(found[key]) for key in sorted_keys(found)]
            (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    report(found, failed, args, out)
    draw(flows, found, out)
    return 1 if failed else 0


def posterior_flags() -> argparse.ArgumentParser:
    """The flags; those left open have defaults by the flow."""
    # An adaptive solver by default: the error of a few fixed steps enters the free energy, and a
    # flow may learn to gain by that error alone.
    flags = parser(__doc__)
    flags.add_argument(
        "--potential", type=int, nargs="+", choices=POTENTIALS, default=list(POTENTIALS),
        help="targets",
    )  # fmt: skip
    flags.add_argument(
        "--models", nargs="+", choices=POSTERIORS, default=list(POSTERIORS), help="flows to train"
    )
    flags.add_argument(
        "--estimator",
        choices=["reparameterised", "path"],
        help="of the gradient, see help(cnf.ReverseKL)",
    )
    flags.add_argument(
        "--annealing", type=float, help="share of the steps in which the target is sharpened"
    )
    add_optimizer(flags)
    flags.add_argument("--test-size", type=int, default=20_000, help="samples of every figure")
    own = []
    for name, model in POSTERIORS.items():
        filled = {**COMMON, **model.defaults}
        own.append(f"{name} {', '.join(str(filled[k]) for k in OPEN)}")
    flags.epilog = (
        f"Where {', '.join(f'--{name}' for name in OPEN)} are not given they are: "
        f"{'; '.join(own)}. A flag that none of the models takes is refused."
    )
    return flags


def with_defaults(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """The flags for one flow."""
    defaults = {**COMMON, **POSTERIORS[model].defaults}
    return complete(args, model, defaults, POSTERIORS)


def build(args: argparse.Namespace, target: Potential) -> cnf.Flow:
    """The flow that the flags describe, with the support of the target."""
    flow = POSTERIORS[args.model].build(args, 2)
    ends = [
        Interval(low, high, columns=(column,))
        for column, (low, high) in enumerate(target.support)
        if math.isfinite(high - low)
    ]
    return cnf.Flow(flow.base, cnf.Compose(flow.transform, *ends)) if ends else flow


def objective_of(args: argparse.Namespace, target: Potential) -> cnf.ReverseKL:
    """The free energy of that flow."""
    samples, gradient = args.batch_size, args.estimator
    return cnf.ReverseKL(
        build(args, target), target.log_density, samples=samples, gradient=gradient
    )


def train(args: argparse.Namespace, target: Potential, out: Path) -> tuple[cnf.Flow, FitResult]:
    """Train a flow by reverse KL, the target sharpened little by little."""
    prepare(args)
    objective = objective_of(args, target)

    def validate(averaged: cnf.Flow) -> float:
        return free_energy(averaged, target, args)

    drawn = argparse.Namespace(**{**vars(args), "batch_size": None, "samples": args.batch_size})
    return train_flow(
        drawn,
        objective,
        None,
        out,
        validate,
        POSTERIORS,
        anneal={"beta": linear(FLAT, 1.0, max(1, round(args.annealing * args.steps)))},
        clip_grad_norm=10.0,
        validate_every=max(1, min(250, args.steps // 4)),
    )


@torch.no_grad()
def free_energy(flow: cnf.Flow, target: Potential, args: argparse.Namespace) -> float:
    """The free energy, of the same base samples each time."""
    generator = torch.Generator(next(flow.parameters()).device).manual_seed(args.seed + 1)
    objective = cnf.ReverseKL(flow, target.log_density, samples=VALIDATION)
    loss = objective(divergence="exact", solver=flow_solver(args), generator=generator)
    return loss.item()


def measure(args: argparse.Namespace, flow: cnf.Flow, result: FitResult, number: int) -> Row:
    """The test of a trained flow, by samples of its own."""
    target = potential(number)
    generator = torch.Generator(next(flow.parameters()).device).manual_seed(args.seed + 2)
    estimate = cnf.importance_sampling(
        flow, target.log_density, args.test_size, solver=REFERENCE, generator=generator
    )
    return Row(
        number,
        args.model,
        estimate.free_energy.item(),
        estimate.free_energy_stderr.item(),
        estimate.free_energy.item() + target.log_normalizer,
        estimate.log_normalizer.item(),
        estimate.stderr.item(),
        target.log_normalizer,
        estimate.effective_sample_size.item() / args.test_size,
        parameters(flow),
        result.step,
        result.stopped,
        result.elapsed,
    )


def read_rows(out: Path) -> dict[tuple[int, str], Row]:
    """The rows of a run that was cut short: of each flow trained to its end."""
    path = out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {(row["potential"], row["model"]): Row(**row) for row in rows}


def sorted_keys(found: dict[tuple[int, str], Row]) -> Sequence[tuple[int, str]]:
    """By potential, and in the order of the models."""
    order = list(POSTERIORS)
    return sorted(found, key=lambda key: (key[0], order.index(key[1])))


def report(
    found: dict[tuple[int, str], Row], failed: list[str], args: argparse.Namespace, out: Path
) -> None:
    """Print the table, and keep it as report.txt."""
    lines = [HEAD]
    for number in sorted({number for number, _ in found}):
        truth = potential(number).log_normalizer
        lines.append([f"potential {number}", f"{-truth:.4f}", "0", f"{truth:.4f}", *[""] * 5])
        lines += [found[key].cells() for key in sorted_keys(found) if key[0] == number]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    write_report(
        [
            f"{args.test_size} samples of each flow; free energy in nats, at least -log Z, which "
            "heads its column; s: seconds of training",
            *(
                "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
                for name, *cells in lines
            ),
            *failed,
        ],
        out,
    )


def draw(
    flows: dict[tuple[int, str], cnf.Flow], found: dict[tuple[int, str], Row], out: Path
) -> None:
    """posterior2d.png: every target, and beside it the flows."""
    rows: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    for key in sorted_keys({key: found[key] for key in flows}):
        target = potential(key[0])
        panels = rows.setdefault(target.name, {"target": target.log_prob})
        panels[f"{key[1]}  {found[key].gap:.3f}"] = partial(log_prob, flows[key])
    if rows:
        plot_energies(rows).savefig(out / "posterior2d.png", dpi=100)
        print(f"picture: {out / 'posterior2d.png'}")


def log_prob(flow: cnf.Flow, x: Tensor) -> Tensor:
    """The log-density of points on any device."""
    device = next(flow.parameters()).device
    return flow.log_prob(x.to(device), divergence="exact")


if __name__ == "__main__":
    run_example(main)
