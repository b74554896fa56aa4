"""What the example scripts share: their flags, and the test of a trained flow."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from models import FIELDS, MODELS, Model, flow_solver, optional
from objectives import (
    MATCHING,
    MATCHING_OPTIMIZER,
    OBJECTIVES,
    OPTIMIZERS,
    add_objectives,
    complete_objective,
    make_objective,
    of_stage,
)
from torch import Tensor, nn

import cnf
from cnf.data import ImageDensity, PlaneDensity, toy
from cnf.ode import METHODS
from cnf.training import FitResult, far_below, fit, load_weights

UNRELATED = frozenset(  # to the training
    "out resume test_size threads models columns data_dir draws probes".split()  # noqa: SIM905
)
PLANE: dict[str, Any] = {"batch_size": 512, "ema_decay": 0.99}
PLANE_MATCHING: dict[str, Any] = {
    "steps": 5000,
    "batch_size": 1024,
    "lr": 1e-2,
    "ema_decay": 0.995,
    "hidden": [128, 128],
    "time_sampling": "log-uniform",
    "optimizer": MATCHING_OPTIMIZER,
}
"""What fits the plane's densities by flow matching in about a minute on two cores."""
TABLE: dict[str, Any] = {
    "steps": 2000,
    "batch_size": 500,
    "lr": 3e-3,
    "ema_decay": 0.995,
    "layers": None,  # as many as the class has
}
TABLE_MATCHING: dict[str, Any] = {
    "steps": 10_000,
    "ema_decay": 0.999,
    "optimizer": MATCHING_OPTIMIZER,
}
ERRORS = (cnf.SolverError, cnf.CheckpointError, cnf.TrainingError)
REFERENCE = cnf.Solver("dopri5", rtol=1e-6, atol=1e-6)  # how every final figure is computed


def parser(
    description: str, *, fields: Sequence[str] = tuple(FIELDS), **defaults: Any
) -> argparse.ArgumentParser:
    """The flags of every example; `fields` are those to choose from, `defaults` those of one."""
    p = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--batch-size", type=int, help="samples a step")
    p.add_argument("--lr", type=float, help="highest learning rate of Adam")
    p.add_argument("--hidden", type=int, nargs="+", help="widths of a network's hidden layers")
    if fields:
        p.add_argument("--field", choices=fields, default="mlp", help="network of the vector field")
    p.add_argument("--blocks", type=int, default=1, help="CNF blocks, one after the other")
    p.add_argument(
        "--trace",
        choices=["auto", "exact", "hutchinson"],
        default="auto",
        help="trace in training; auto is exact where the network has a closed form of it",
    )
    p.add_argument("--method", choices=METHODS, default="dopri5", help="solver in training")
    p.add_argument("--solver-steps", type=int, default=20, help="steps of a fixed-step method")
    p.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance in training")
    p.add_argument("--atol", type=float, default=1e-3, help="absolute tolerance in training")
    p.add_argument(
        "--gradient",
        choices=["backprop", "checkpoint", "adjoint"],
        default="backprop",
        help="how the gradient is computed, see help(cnf.Solver)",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="compile the solver's steps: up to a minute at the start, then about twice as fast",
    )
    p.add_argument("--device", default="auto", help="auto takes a GPU where there is one")
    p.add_argument(
        "--threads", type=int, default=1, help="CPU threads; networks this small gain by one alone"
    )
    p.add_argument("--seed", type=int, default=0, help="of weights, batches and test points")
    p.add_argument("--max-time", type=float, help="end training after so many seconds")
    p.add_argument("--ema-decay", type=float, help="decay of the average of the weights")
    p.add_argument("--out", type=Path, help="folder of the run; none takes runs/EXAMPLE-DATA")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on where the run in --out stopped, with the same flags; "
        "with another --steps, the learning rate follows the new schedule",
    )
    common = {"model": "ffjord", "objective": "likelihood", "optimizer": "adam", "layers": None}
    p.set_defaults(**{**common, **defaults})
    return p


def add_models(
    flags: argparse.ArgumentParser, defaults: dict[str, Any], *, several: bool = False
) -> None:
    """The flags that choose one of the models, or several of them; see `complete`."""
    if several:
        flags.add_argument(
            "--models", nargs="+", choices=MODELS, default=list(MODELS), help="what to compare"
        )
    else:
        flags.add_argument("--model", choices=MODELS, help="the flow to train")
    flags.add_argument("--layers", type=int, help="of a discrete flow")
    own = []
    for name, model in MODELS.items():
        filled = {**model.defaults, **defaults}
        own.append(f"{name} {', '.join(str(filled.get(k)) for k in ('steps', 'lr', 'layers'))}")
    if not several:
        add_objectives(flags)
    flags.epilog = (
        f"Where --steps, --lr, --layers are not given they are: {'; '.join(own)} (None: as the "
        "class has it). A flag that the model does not take is refused."
    )


def parse(
    flags: argparse.ArgumentParser, defaults: dict[str, Any], matching: dict[str, Any]
) -> argparse.Namespace:
    """The flags of the command line, and those left open; see `complete`.

    Args:
        flags: the parser.
        defaults: of the script.
        matching: those that flow matching has in their place.
    """
    args = flags.parse_args()
    refuse_idle(flags, [args.model])
    args, own = complete_objective(args, matching)
    return complete(args, args.model, {**defaults, **own})


def refuse_idle(
    flags: argparse.ArgumentParser, models: Sequence[str], known: Mapping[str, Model] = MODELS
) -> None:
    """Refuse a flag of the command line, even at its default, that none of the models takes."""
    blank = argparse.Namespace(**dict.fromkeys(vars(flags.parse_args())))
    given = {k for k, v in vars(flags.parse_args(namespace=blank)).items() if v is not None}
    for name in sorted(given & optional(known)):
        takers = [model for model in known if name in known[model].takes]
        if not set(takers) & set(models):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on {', '.join(models)}; leave it out, "
                f"or choose from {', '.join(takers)}"
            )


def complete(
    args: argparse.Namespace,
    model: str,
    defaults: dict[str, Any],
    known: Mapping[str, Model] = MODELS,
) -> argparse.Namespace:
    """The flags for one model: those left open are `defaults`, else the model's own."""
    own = {**known[model].defaults, **defaults}
    filled = {k: own[k] for k, v in vars(args).items() if v is None and k in own}
    return argparse.Namespace(**{**vars(args), **filled, "model": model})


def default_out(example: str, data: str, model: str = "ffjord") -> Path:
    """The folder of a run that names none."""
    return Path("runs") / "-".join([example, data, *([model] if model != "ffjord" else [])])


def open_density(data: str) -> PlaneDensity:
    """The toy density of that name, or the picture in that file."""
    is_file = Path(data).suffix or Path(data).is_file()
    return ImageDensity.open(data) if is_file else toy(data)


def train(
    args: argparse.Namespace,
    data: Tensor | Callable[[int, torch.Generator], Tensor],
    val: Tensor,
    out: Path,
    *,
    patience: int | None = None,
    validate_every: int = 250,
) -> tuple[cnf.Flow, FitResult]:
    """Train the flow that the flags describe; return it with its best averaged weights.

    Whatever the objective, weights are chosen by the likelihood of `val`. The first of two stages
    has the folder `out`/flow-matching.
    """
    prepare(args)
    flow = MODELS[args.model].build(args, val.shape[-1])

    def validate(averaged: cnf.Flow) -> Tensor:
        return -score(averaged, val, flow_solver(args)).log_prob

    began, stages = time.monotonic(), OBJECTIVES[args.objective]
    results: list[FitResult] = []
    for i, stage in enumerate(stages):
        last = i + 1 == len(stages)
        folder = out if last else out / stage
        run = of_stage(i, args)
        if len(stages) > 1:
            run.resume = args.resume and (folder / "last.safetensors").exists()
            print(f"{stage}: up to {run.steps} steps")
        if args.max_time is not None:  # the second stage has a fifth, and what the first leaves
            share = args.max_time if last else 0.8 * args.max_time
            run.max_time = max(0.0, share - (time.monotonic() - began))
        _, result = train_flow(
            run,
            make_objective(stage, run, flow),
            data,
            folder,
            validate,
            patience=patience,
            validate_every=validate_every * (5 if stage == "flow-matching" else 1),  # steps cheaper
            clip_grad_norm=10.0,
        )
        results.append(result)
        if result.signal is not None:
            break
    return flow, in_all(results)


def in_all(stages: Sequence[FitResult]) -> FitResult:
    """The end of the last stage, with the steps, time and evaluations of all."""
    *others, last = stages
    before = sum(result.step for result in others)
    return dataclasses.replace(
        last,
        step=before + last.step,
        best_step=None if last.best_step is None else before + last.best_step,
        **{
            name: sum(getattr(result, name) for result in stages)
            for name in ("elapsed", "nfe_forward", "nfe_backward")
        },
    )


def prepare(args: argparse.Namespace) -> None:
    """What is to be done before a flow is built."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def train_flow(
    args: argparse.Namespace,
    objective: nn.Module,
    data: Tensor | Callable[[int, torch.Generator], Tensor] | None,
    out: Path,
    validate: Callable[[Any], float | Tensor],
    known: Mapping[str, Model] = MODELS,
    *,
    part: str = "flow",
    **options: Any,
) -> tuple[Any, FitResult]:
    """Train what an objective calls `part`, by the flags; return it with its best averaged weights.

    Args:
        args: the flags.
        objective: what is minimised.
        data: as `fit` takes it.
        out: folder of the run.
        validate: the loss of the averaged part, or of each row, lower is better.
        known: the models, with the flags that each takes.
        part: "flow", or "vae".
        options: passed to `fit`.
    """
    flow = getattr(objective, part)
    optimizer = OPTIMIZERS[args.optimizer](flow, args.lr)
    unread = UNRELATED | optional(known).difference(known[args.model].takes)
    unread |= {"fine_tune", "optimizer"}  # steps of another stage; `fit` keeps the optimiser's name
    if args.objective == "likelihood":
        unread |= {"objective", *MATCHING}
    result = fit(
        objective,
        data,
        steps=args.steps,
        batch_size=args.batch_size,
        optimizer=optimizer,
        scheduler=schedule(optimizer, args.steps),
        ema_decay=args.ema_decay,
        validate=lambda averaged: validate(getattr(averaged, part)),
        max_time=args.max_time,
        out=out,
        resume=args.resume,
        config={k: v for k, v in vars(args).items() if k not in unread},
        seed=args.seed,
        device=device_of(args.device),
        **options,
    )
    if result.signal is not None:
        print(f"Stopped at step {result.step}, saved in {out}. Go on with --resume.")
    else:
        load_weights(flow, result.best or out / "last.safetensors", prefix=part)
    return flow, result


def device_of(name: str) -> torch.device:
    """The device that --device names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device={name} cannot be used; try auto, cpu or cuda ({reason})"
        ) from None
    return device


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A warm-up over 5% of the steps, then half a cosine down to 1%."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihoods of test points, and what they cost."""

    log_prob: Tensor
    nfe: int
    seconds: float

    def __str__(self) -> str:
        evaluations = f"{self.nfe} evaluations a batch, " if self.nfe else ""
        return f"{mean_and_error(self.log_prob)}  ({evaluations}{self.seconds:.1f} s)"


@torch.no_grad()
def score(flow: cnf.Flow, x: Tensor, solver: cnf.Solver = REFERENCE) -> Score:
    """Exact-trace log-likelihoods of x (N, *event), in batches, on the device of the flow."""
    device = next(flow.parameters()).device
    start = time.perf_counter()
    with cnf.record_solves() as solves:
        parts = [
            flow.log_prob(b.to(device), divergence="exact", solver=solver) for b in x.split(2000)
        ]
    nfe = sum(s.nfe for s in solves) // max(1, len(parts))
    return Score(torch.cat(parts).cpu().double(), nfe, time.perf_counter() - start)


def goes_on(row: dict[str, Any], run: argparse.Namespace) -> bool:
    """Whether a run that has ended, of which this is the row, is to be longer now."""
    return row["stopped"] == "steps" and row["steps"] < run.steps


def mean_and_error(values: Tensor) -> str:
    """Mean and standard error of the mean."""
    return f"{values.mean().item():.4f} +- {standard_error(values):.4f}"


def notes(log_prob: Tensor, label: str = " " * 22) -> list[str]:
    """A line for the report on rows (N,) far below the rest, if there are any."""
    found = far_below(log_prob)
    return [] if found is None else [f"{label}{found}"]


def print_notes(log_prob: Tensor, label: str) -> None:
    """The same, at once, where the report is a table."""
    for note in notes(log_prob, label):
        print(note)


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values (N,)."""
    return (values.std() / math.sqrt(len(values))).item()


def describe_training(flow: cnf.Flow, result: FitResult) -> list[str]:
    """What the training took, in lines for the report."""
    lines = [
        f"training              {result.step} steps in {result.elapsed:.0f} s, best at step "
        f"{result.best_step}, stopped by {result.stopped.replace('_', ' ')}",
    ]
    if result.nfe_forward:
        counts = (result.nfe_forward, result.nfe_backward)
        forward, backward = (n / max(1, result.step) for n in counts)
        lines.append(f"evaluations a step    {forward:.1f} forward, {backward:.1f} backward")
    return [*lines, f"parameters            {parameters(flow)}"]


def parameters(flow: cnf.Flow) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in flow.parameters())


def write_report(lines: list[str], out: Path) -> None:
    """Print the report and keep it as report.txt."""
    text = "\n".join(lines)
    print("\n" + text)
    out.mkdir(parents=True, exist_ok=True)  # also where nothing was trained
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")


def run_example(main: Callable[[], int]) -> NoReturn:
    """Run a script; what a user can mend is told without a traceback."""
    try:
        sys.exit(main())
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, ERRORS):
            raise
        notes = getattr(error, "__notes__", [])
        sys.exit("\n".join([f"error: {error}", *notes]))
