"""Train flows on images, in whole grey levels, and compare their bits per dimension.

python examples/images.py                               # the digits in scikit-learn, a few minutes
python examples/images.py --data mnist --data-dir DIR --model ffjord --max-time 3600
python examples/images.py --dequantization variational  # noise that is learned
python examples/images.py --data cifar10 --data-dir DIR --bits 5 --flip --trace hutchinson
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
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
    refuse_idle,
    run_example,
    standard_error,
    train_flow,
    write_report,
)
from models import IMAGE_MODELS, noise_flow
from torch import Tensor
from torch.distributions import MultivariateNormal

import cnf
from cnf.data import ImageData, image_data, random_horizontal_flip
from cnf.plotting import plot_images, plot_training
from cnf.training import FitResult
from cnf.transforms import Compose, Diagonal

REFERENCE = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)  # how every final figure is computed
CHOOSING = cnf.Solver("dopri5", rtol=1e-3, atol=1e-3)  # few steps may flatter what they trained
BATCH = 250  # images evaluated at once
TYPICAL = 5000  # training images that the standardisation is computed of
SPREAD = 0.2  # a pixel that hardly varies counts as if it varied so much, lest rare ink is far out
VALIDATION = 500  # images to validate on
STAGES = 10  # images of an interpolation
PICTURES = ("samples", "interpolations", "training")

DIGITS: dict[str, dict[str, Any]] = {
    "ffjord": {"steps": 160, "lr": 8e-3, "hidden": [32, 32], "validate_every": 20, "max_time": 240},
    "glow": {"steps": 1000, "validate_every": 50, "max_time": 60},
    "realnvp": {"steps": 1000, "validate_every": 50, "max_time": 60},
}
SMALL = {"batch_size": 128, "ema_decay": 0.98, "alpha": 0.05, "draws": 16}
LARGE = {
    "steps": 20_000,
    "batch_size": 128,
    "ema_decay": 0.999,
    "draws": 1,
    "validate_every": 250,
    "test_size": 1000,
}
DARK = 1e-5  # alpha where most pixels are black: a larger one squeezes their logits together


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `bound` is that of several draws of the noise, where they are asked.

    Attributes:
        model: its name, or that of a baseline.
        bits: test bits per dimension, of one draw.
        bits_error: its standard error over the test images.
        bound: the same of `draws` draws.
        bound_error: its standard error.
        draws: how many.
        parameters: how many numbers are learned.
        trace: how the trace was computed.
        trace_error: standard error of `bits` by the estimate of the trace alone.
        steps: of training.
        stopped: by what.
        training_seconds: of training and validation.
        test_seconds: of the test.
    """

    model: str
    bits: float
    bits_error: float
    bound: float | None
    bound_error: float | None
    draws: int | None
    parameters: int
    trace: str = ""
    trace_error: float = 0.0
    steps: int | None = None
    stopped: str | None = None
    training_seconds: float | None = None
    test_seconds: float | None = None

    def cells(self) -> list[str]:
        """How it reads."""
        bound = "" if self.bound is None else f"{self.bound:.4f} +- {self.bound_error:.4f}"
        noise = f" (+- {self.trace_error:.4f})" if self.trace_error else ""
        return [
            self.model,
            f"{self.bits:.4f} +- {self.bits_error:.4f}",
            bound,
            str(self.parameters),
            "" if self.steps is None else str(self.steps),
            "" if self.training_seconds is None else f"{self.training_seconds:.0f}",
            self.trace + noise,
        ]


def main() -> int:
    """Run the example; the exit code is 0, 1 if a model failed, or 130 after Ctrl-C."""
    flags = image_flags()
    args = flags.parse_args()
    refuse_idle(flags, args.model, IMAGE_MODELS)
    runs = [with_defaults(args, name) for name in dict.fromkeys(args.model)]
    check(runs[0])
    data = open_images(args)
    for run in runs:  # what cannot be built is better known before the first is trained
        build(run, data)
    test = data.test[: runs[0].test_size]
    out = args.out or default_out("images", args.data)
    found = read_rows(out) if args.resume else {}
    baselines = [histogram(data, test), gaussian(data, test, args.seed)]
    rows: list[Row] = []
    flows: dict[str, cnf.Flow] = {}
    failed: list[str] = []
    for run in runs:
        run.resume = args.resume and (out / run.model / "last.safetensors").exists()
        if run.model in found and not goes_on(found[run.model], run):
            run.max_time = 0.0  # it has had its time
        print(f"{run.model}: up to {run.steps} steps{limit(run)}")
        try:
            flow, result = train(run, data, out / run.model)
        except (cnf.SolverError, cnf.TrainingError) as error:
            failed.append(f"{run.model} failed: {error}")
            continue
        if result.signal is not None:
            return result.exit_code
        flows[run.model] = flow
        rows.append(measure(run, flow, result, test))
        found[run.model] = dataclasses.asdict(rows[-1])
        everything = [*map(dataclasses.asdict, baselines), *found.values()]
        (out / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    rows += [Row(**row) for name, row in found.items() if name not in args.model]
    report(baselines, rows, failed, data, test, runs[0], out)
    draw(flows, rows, data, test, out)
    return 1 if failed else 0


def image_flags() -> argparse.ArgumentParser:
    """The flags; those left open have defaults by the data and the model."""
    # Few fixed steps would not do in training: flows learn to gain by the error of the solver.
    flags = parser(__doc__, fields=(), blocks=2, threads=2)
    flags.add_argument(
        "--model",
        nargs="+",
        choices=IMAGE_MODELS,
        default=["ffjord", "glow"],
        help="flows to train",
    )
    flags.add_argument(
        "--data",
        default="digits",
        help="digits, mnist, cifar10, or a class of torchvision.datasets such as FashionMNIST",
    )
    flags.add_argument("--data-dir", type=Path, help="folder of its files; digits needs none")
    flags.add_argument("--bits", type=int, help="keep so many bits of each pixel, 1 to 8")
    flags.add_argument("--flip", action="store_true", help="mirror training images at random")
    flags.add_argument(
        "--dequantization",
        choices=["uniform", "variational"],
        default="uniform",
        help="the noise between grey levels: uniform, or from a flow that is learned",
    )
    flags.add_argument("--alpha", type=float, help="of the logit, see help(cnf.Sigmoid)")
    flags.add_argument("--levels", type=int, help="scales of ffjord and glow")
    flags.add_argument("--layers", type=int, help="of realnvp; of glow, at each scale")
    flags.add_argument("--patience", type=int, default=8, help="validations without a new best")
    flags.add_argument("--validate-every", type=int, help="steps between validations")
    flags.add_argument("--test-size", type=int, help="the first so many test images")
    flags.add_argument("--draws", type=int, help="of the noise, for the tighter bound; 1 for none")
    flags.add_argument(
        "--probes", type=int, default=16, help="of Hutchinson's estimate in the test"
    )
    flags.set_defaults(model=["ffjord", "glow"])
    own = {"all": SMALL, **DIGITS}
    words = [f"{name}: {', '.join(f'{k} {v}' for k, v in d.items())}" for name, d in own.items()]
    flags.epilog = (
        "Flags that are not given (None) have defaults by data and model; of the digits, "
        f"{'; '.join(words)}. A flag that none of the models takes is refused."
    )
    return flags


def with_defaults(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """The flags for one model."""
    if args.data == "digits":
        defaults: dict[str, Any] = {"test_size": None, **SMALL, **DIGITS[model]}
    else:
        dark = args.data.lower().endswith("mnist")
        defaults = {**LARGE, "alpha": DARK if dark else 0.05}
    return complete(args, model, defaults, IMAGE_MODELS)


def check(run: argparse.Namespace) -> None:
    """Refuse what would otherwise be found after the training, or be of no use."""
    if run.test_size is not None and run.test_size < 2:
        raise ValueError(f"--test-size={run.test_size} must be 2 or more, for a standard error")
    for name, least in (("draws", 1), ("probes", 2)):
        if getattr(run, name) < least:
            raise ValueError(f"--{name}={getattr(run, name)} must be {least} or more")
    if run.flip and run.data.lower() in ("digits", "mnist"):
        raise ValueError(f"--flip is not for {run.data}: a mirrored digit is none; leave it out")


def open_images(args: argparse.Namespace) -> ImageData:
    """The images that --data names, at --bits."""
    if args.data == "digits" and args.data_dir is not None:
        raise ValueError("--data=digits needs no --data-dir: they are inside scikit-learn")
    needs = args.data in ("mnist", "cifar10") or args.data[:1].isupper()
    if needs and args.data_dir is None:
        raise ValueError(f"--data={args.data} needs --data-dir, the folder of its files")
    data = image_data(args.data, args.data_dir)
    if args.bits is None:
        return data
    if data.levels != 256:
        raise ValueError(f"--bits is for 256 grey levels, {data.name} has {data.levels}")
    return data.reduce_bits(args.bits)


def build(args: argparse.Namespace, data: ImageData) -> cnf.Flow:
    """A flow of integers: the model, a standardisation of each pixel, a sigmoid, a dequantization.

    It begins with the mean and the deviation of the training images.
    """
    model = IMAGE_MODELS[args.model].build(args, data.shape)
    standardise, sigmoid = Diagonal(data.shape), cnf.Sigmoid(args.alpha)
    dequantize: cnf.Transform = cnf.UniformDequantization(data.levels)
    if args.dequantization == "variational":
        dequantize = cnf.VariationalDequantization(noise_flow(data.shape), data.levels)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(data.train), generator=generator, device="cpu")
    with torch.no_grad():
        logits = Compose(sigmoid, dequantize).inverse(data.train[order[:TYPICAL]])
        standardise.initialize(logits + SPREAD * torch.randn_like(logits))
    return cnf.Flow(model.base, Compose(model.transform, standardise, sigmoid, dequantize))


def train(args: argparse.Namespace, data: ImageData, out: Path) -> tuple[cnf.Flow, FitResult]:
    """Train a flow for bits per dimension, validated on the same noise each time."""
    prepare(args)
    flow = build(args, data)
    trace = trace_of(flow, args)
    val = data.val[:VALIDATION]

    def validate(averaged: cnf.Flow) -> Tensor:
        return one_draw(averaged, val, trace, args.seed, CHOOSING)[0]

    return train_flow(
        args,
        cnf.MaximumLikelihood(flow, unit="bits_per_dim"),
        data.train,
        out,
        validate,
        IMAGE_MODELS,
        augment=random_horizontal_flip if args.flip else None,
        clip_grad_norm=10.0 / (math.prod(data.shape) * math.log(2)),  # 10 in nats
        patience=args.patience,
        validate_every=args.validate_every,
    )


def trace_of(flow: cnf.Flow, args: argparse.Namespace) -> cnf.Exact | cnf.Hutchinson | None:
    """The trace to test with: exact where it is cheap or asked for; None where there is none."""
    fields = [part.field for part in flow.modules() if isinstance(part, cnf.CNF)]
    if not fields:
        return None
    closed = all(getattr(field, "closed_form", False) for field in fields)
    return cnf.Exact() if closed or args.trace == "exact" else cnf.Hutchinson(probes=args.probes)


@torch.no_grad()
def one_draw(
    flow: cnf.Flow,
    x: Tensor,
    trace: cnf.Exact | cnf.Hutchinson | None,
    seed: int,
    solver: cnf.Solver,
) -> tuple[Tensor, Tensor]:
    """Bits per dimension of images (N, C, H, W), and their standard errors by the trace, (N,)."""
    device, generator = next(flow.parameters()).device, torch.Generator().manual_seed(seed)
    parts = [
        flow.log_prob(
            b.to(device), divergence=trace, solver=solver, generator=generator, return_stderr=True
        )
        for b in x.split(BATCH)
    ]
    nats = math.prod(x.shape[1:]) * math.log(2)
    log_prob, stderr = (torch.cat(values).cpu().double() for values in zip(*parts, strict=True))
    return -log_prob / nats, stderr / nats


@torch.no_grad()
def several_draws(
    flow: cnf.Flow,
    x: Tensor,
    trace: cnf.Exact | cnf.Hutchinson | None,
    seed: int,
    draws: int,
) -> Tensor:
    """The bound by importance weights, bits per dimension of images (N,)."""
    device, generator = next(flow.parameters()).device, torch.Generator().manual_seed(seed)
    choices: dict[str, Any] = {"divergence": trace, "solver": REFERENCE, "generator": generator}
    parts = [flow.bits_per_dim(b.to(device), samples=draws, **choices) for b in x.split(BATCH)]
    return torch.cat(parts).cpu().double()


def measure(args: argparse.Namespace, flow: cnf.Flow, result: FitResult, test: Tensor) -> Row:
    """The test of a trained flow."""
    start = time.perf_counter()
    trace = trace_of(flow, args)
    bits, by_trace = one_draw(flow, test, trace, args.seed, REFERENCE)
    nats = math.prod(test.shape[1:]) * math.log(2)
    print_notes(-bits * nats, f"{args.model}, nats: ")
    bound = None
    if args.draws > 1:
        bound = several_draws(flow, test, trace, args.seed, args.draws)
    return Row(
        args.model,
        bits.mean().item(),
        standard_error(bits),
        None if bound is None else bound.mean().item(),
        None if bound is None else standard_error(bound),
        args.draws,
        parameters(flow),
        name_of(trace),
        by_trace.square().mean().sqrt().item() / math.sqrt(len(test)),
        result.step,
        result.stopped,
        result.elapsed,
        time.perf_counter() - start,
    )


def name_of(trace: cnf.Exact | cnf.Hutchinson | None) -> str:
    """How the trace is computed, in words."""
    if trace is None:
        return "none needed"
    return "exact" if isinstance(trace, cnf.Exact) else f"Hutchinson, {trace.probes} probes"


def histogram(data: ImageData, test: Tensor) -> Row:
    """Each pixel on its own: how often the training images have each level, and half a time more.

    P(x) = prod_i (n_i(x_i) + 1/2) / (N + L/2)
    """
    train = data.train.flatten(1)
    pixels = torch.arange(train.shape[1], device="cpu")
    counts = pixels.new_zeros(train.shape[1] * data.levels)
    for part in train.split(2000):
        counts += (part + data.levels * pixels).flatten().bincount(minlength=len(counts))
    counts = counts.unflatten(0, (-1, data.levels)).T.double()  # (L, D)
    log_prob = ((counts + 0.5) / (len(train) + data.levels / 2)).log2()
    bits = -log_prob.gather(0, test.flatten(1).long()).mean(1)  # (N,)
    size = counts.shape[1] * (data.levels - 1)
    return Row("histogram", bits.mean().item(), standard_error(bits), None, None, None, size)


def gaussian(data: ImageData, test: Tensor, seed: int) -> Row:
    """The Gaussian of the training images' mean and covariance, dequantised uniformly."""
    generator = torch.Generator().manual_seed(seed)

    def dequantised(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu")
        return ((x + noise) / data.levels).flatten(1)

    size = math.prod(data.shape)
    total = torch.zeros(size, dtype=torch.float64, device="cpu")
    products = total.outer(total)
    for part in data.train.split(5000):
        y = dequantised(part) - 0.5
        total, products = total + y.sum(0), products.addmm_(y.T, y)
    mean = total / len(data.train)
    covariance = products / len(data.train) - mean.outer(mean)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # fewer images than pixels: as if the noise were drawn once more
        ridge = torch.eye(size, device="cpu").double() / (12 * data.levels**2)
        factor = torch.linalg.cholesky(covariance + ridge)
    normal = MultivariateNormal(mean, scale_tril=factor)
    log_prob = normal.log_prob(dequantised(test) - 0.5) - size * math.log(data.levels)
    bits = -log_prob / (size * math.log(2))
    name = "Gaussian, ridge" if failed else "Gaussian"
    found = bits.mean().item(), standard_error(bits)
    return Row(name, *found, None, None, None, size + size * (size + 1) // 2)


def limit(run: argparse.Namespace) -> str:
    """How long it may take, in words."""
    return "" if run.max_time is None else f", {run.max_time:.0f} s"


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run that was cut short: of each model trained to its end."""
    path = out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["model"]: row for row in rows if row["model"] in IMAGE_MODELS}


def report(
    baselines: list[Row],
    rows: list[Row],
    failed: list[str],
    data: ImageData,
    test: Tensor,
    run: argparse.Namespace,
    out: Path,
) -> None:
    """The table, printed and kept as report.txt."""
    how = "by importance weights (the mean of the draws where the trace is estimated)"
    lines = [
        ["", "test", f"{run.draws} draws" if run.draws > 1 else "", *[""] * 2, "training", ""],
        ["", "bits/dim", "bits/dim" if run.draws > 1 else "", "parameters", "steps", "s", "trace"],
        *(row.cells() for row in [*baselines, *rows]),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    channels, height, width = data.shape
    sizes = f"{len(data.train)} to train, {min(len(data.val), VALIDATION)} to validate"
    text = [
        f"{data.name}: {len(test)} test images of {channels} x {height} x {width}, {data.levels} "
        f"grey levels; {sizes}",
        f"{run.dequantization} dequantization, alpha {run.alpha:g}; +- is the standard error over "
        "test images",
        "",
        *(
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in lines
        ),
        "",
        "test: one draw of the noise, in the mean an upper bound; CNFs solved by dopri5 to 1e-5",
        *([f"{run.draws} draws: a tighter bound, {how}"] if run.draws > 1 else []),
        *failed,
    ]
    write_report(text, out)


@torch.no_grad()
def draw(
    flows: dict[str, cnf.Flow], rows: list[Row], data: ImageData, test: Tensor, out: Path
) -> None:
    """samples.png, interpolations.png and training.png."""
    if not flows:
        return
    titles = {row.model: f"{row.model}  {row.bits:.3f} bits/dim" for row in rows}
    samples, between = {"data": test[:64]}, {}
    for name, flow in flows.items():
        generator = torch.Generator().manual_seed(0)
        samples[titles[name]] = flow.sample((64,), generator=generator).cpu()
        between[name] = interpolations(flow, test[:12])
    plot_images(samples, levels=data.levels).savefig(out / "samples.png", dpi=100)
    figure = plot_images(between, levels=data.levels, columns=STAGES)
    figure.savefig(out / "interpolations.png", dpi=100)
    logs = {name: out / name / "log.jsonl" for name in flows}
    plot_training(logs, ylabel="bits/dim").savefig(out / "training.png", dpi=100)
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in PICTURES)}")


def interpolations(flow: cnf.Flow, x: Tensor) -> Tensor:
    """Rows of images (N/2 * STAGES, C, H, W), from each of the first half of x to the second's.

    They are halfway round in z, where lengths count as angles: a mean of two normal z would be too
    near to 0.
    """
    device, generator = next(flow.parameters()).device, torch.Generator().manual_seed(0)
    choices: dict[str, Any] = {"solver": REFERENCE}
    z = flow.transform.inverse(x.to(device), generator=generator, **choices)
    z0, z1 = z.flatten(1).unsqueeze(1).chunk(2)  # (N/2, 1, D)
    angle = torch.cosine_similarity(z0, z1, dim=-1).acos().unsqueeze(-1)
    t = torch.linspace(0, 1, STAGES, device=device).view(1, -1, 1)
    path = (((1 - t) * angle).sin() * z0 + (t * angle).sin() * z1) / angle.sin()
    return flow.transform.forward(path.flatten(0, 1).unflatten(1, x.shape[1:]), **choices).cpu()


if __name__ == "__main__":
    run_example(main)
