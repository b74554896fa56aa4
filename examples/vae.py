"""Train variational autoencoders that differ in their posterior alone, and compare their bounds.

python examples/vae.py                                  # scikit-learn's digits, a few minutes
python examples/vae.py --posterior gaussian planar radial sylvester iaf coupling ffjord
python examples/vae.py --data mnist --data-dir DIR      # about an hour on one core
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
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
from models import Model, flow_solver, number
from torch import Tensor, nn

import cnf
from cnf.data import ImageData, image_data, random_binarization
from cnf.plotting import plot_images, plot_training
from cnf.training import FitResult, linear
from cnf.variational import ELBO, VAE, Bernoulli, posterior

REFERENCE = cnf.Solver("dopri5", rtol=1e-4, atol=1e-4)  # how every final figure is computed
TEST_DRAWS = 10  # z for each test image, of the ELBO
CHUNK = 10_000  # z in memory at once
SHOWN = 32  # images in a picture
PICTURES = ("reconstructions", "samples", "training")

DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "steps": 3000,
        "batch_size": 100,
        "lr": 1e-3,
        "latent": 8,
        "hidden": [100],
        "warm_up": 500,
        "ema_decay": 0.995,
    },
    "mnist": {
        "steps": 10_000,
        "batch_size": 100,
        "lr": 2e-3,
        "latent": 10,
        "hidden": [300, 300],
        "warm_up": 1000,
        "ema_decay": 0.99,
        "test_size": 2000,
    },
}


def layered(kind: str, layers: int, /, *takes: str, **own: Any) -> Model:
    """A posterior with layers of a discrete flow."""

    def build(args: argparse.Namespace, latent: int) -> cnf.Flow:
        networks = {"hidden": args.flow_hidden} if "flow_hidden" in takes else {}
        return posterior(kind, latent, args.hidden[-1], **number(args.layers), **networks, **own)

    return Model(build, frozenset({"layers", *takes}), {"layers": layers, "flow_hidden": [64]})


def gaussian(args: argparse.Namespace, latent: int) -> cnf.Flow:
    """The posterior without a flow."""
    return posterior("gaussian", latent, args.hidden[-1])


def ffjord(args: argparse.Namespace, latent: int) -> cnf.Flow:
    """The continuous posterior that the flags describe."""
    return posterior(
        "ffjord",
        latent,
        args.hidden[-1],
        layers=args.blocks,
        hidden=args.flow_hidden,
        gates=True,  # so that the observation acts on all hidden layers
        divergence=None if args.trace == "auto" else args.trace,
        solver=flow_solver(args),
    )


CONTINUOUS = frozenset(
    "blocks flow_hidden trace method solver_steps rtol atol gradient compile".split()  # noqa: SIM905
)
MODELS = {
    "gaussian": Model(gaussian, frozenset(), {}),
    "planar": layered("planar", 8),
    "radial": layered("radial", 8),
    "sylvester": layered("sylvester", 4),
    "iaf": layered("iaf", 4, "flow_hidden"),
    "coupling": layered("coupling", 4, "flow_hidden"),
    "ffjord": Model(ffjord, CONTINUOUS, {"flow_hidden": [64]}),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, in nats; the gains are those over the Gaussian posterior.

    Attributes:
        model: the posterior.
        elbo: the mean negative ELBO of the test images.
        elbo_error: its standard error over the images.
        bound: the mean negative importance-weighted bound, of `samples` draws.
        bound_error: its standard error over the images.
        elbo_gain: how much lower the negative ELBO is than the Gaussian's, where it is known.
        elbo_gain_error: standard error of the paired differences.
        bound_gain: the same of the importance-weighted bound.
        bound_gain_error: standard error of the paired differences.
        samples: draws of the importance-weighted bound.
        parameters: how many numbers are learned.
        steps: of training.
        stopped: by what.
        training_seconds: of training and validation.
        test_seconds: of the test.
    """

    model: str
    elbo: float
    elbo_error: float
    bound: float
    bound_error: float
    elbo_gain: float | None
    elbo_gain_error: float | None
    bound_gain: float | None
    bound_gain_error: float | None
    samples: int
    parameters: int
    steps: int
    stopped: str
    training_seconds: float
    test_seconds: float

    def cells(self) -> list[str]:
        """How it reads."""
        return [
            self.model,
            f"{self.elbo:.2f} +- {self.elbo_error:.2f}",
            _gain(self.elbo_gain, self.elbo_gain_error),
            f"{self.bound:.2f} +- {self.bound_error:.2f}",
            _gain(self.bound_gain, self.bound_gain_error),
            str(self.parameters),
            str(self.steps),
            f"{self.training_seconds:.0f}",
        ]


def _gain(gain: float | None, error: float | None) -> str:
    return "" if gain is None else f"{gain:+.2f} +- {error:.2f}"


def main() -> int:
    """Run the example; the exit code is 0, 1 if a posterior failed, or 130 after Ctrl-C."""
    flags = vae_flags()
    args = flags.parse_args()
    refuse_idle(flags, args.model, MODELS)
    defaults = DATA["digits" if args.data == "digits" else "mnist"]
    runs = [complete(args, name, defaults, MODELS) for name in dict.fromkeys(args.model)]
    check(runs[0])
    data = open_images(args)
    for run in runs:  # what cannot be built is better known before the first is trained
        build(run, data)
    test = binarised(data, data.test[: args.test_size], args.seed)
    out = args.out or default_out("vae", args.data)
    found = read_rows(out)
    vaes: dict[str, VAE] = {}
    failed: list[str] = []
    for run in runs:
        run.resume = args.resume and (out / run.model / "last.safetensors").exists()
        if run.model in found and not goes_on(found[run.model], run):
            run.max_time = 0.0  # it has had its time
        print(f"{run.model}: up to {run.steps} steps")
        try:
            vae, result = train(run, data, out / run.model)
        except (cnf.SolverError, cnf.TrainingError) as error:
            failed.append(f"{run.model} failed: {error}")
            continue
        if result.signal is not None:
            return result.exit_code
        vaes[run.model] = vae
        row = measure(run, vae, result, test, out)
        found[run.model] = dataclasses.asdict(row)
        text = json.dumps(list(found.values()), indent=2)
        (out / "results.json").write_text(text + "\n", encoding="utf-8")
        print("  ".join(row.cells()))
    order = sorted(found, key=list(MODELS).index)
    rows = [with_gains(Row(**found[name]), out) for name in order]
    text = json.dumps(list(map(dataclasses.asdict, rows)), indent=2)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    report(rows, failed, data, test, runs[0], out)
    draw(vaes, rows, test, out)
    return 1 if failed else 0


def vae_flags() -> argparse.ArgumentParser:
    """The flags; those left open have defaults by the data and the posterior."""
    # Few fixed steps are enough for a field near zero, and the test, which is exact, would tell.
    flags = parser(__doc__, fields=(), method="rk4", solver_steps=4)
    flags.add_argument(
        "--posterior",
        dest="model",
        nargs="+",
        choices=MODELS,
        default=["gaussian", "planar", "iaf", "ffjord"],
        help="posteriors to compare",
    )
    flags.add_argument(
        "--data", default="digits", help="digits, mnist, or a class of torchvision.datasets"
    )
    flags.add_argument("--data-dir", type=Path, help="folder of its files; digits needs none")
    flags.add_argument("--latent", type=int, help="dimensions of z")
    flags.add_argument("--layers", type=int, help="of a discrete flow")
    flags.add_argument(
        "--flow-hidden", type=int, nargs="+", help="hidden layers of networks in the flow"
    )
    flags.add_argument(
        "--warm-up",
        type=int,
        help="steps in which the weight of KL grows to 1, at most half of all",
    )
    flags.add_argument("--validate-every", type=int, default=500, help="steps between validations")
    flags.add_argument(
        "--samples", type=int, default=500, help="draws of the importance-weighted bound"
    )
    flags.add_argument("--test-size", type=int, help="the first so many test images")
    flags.set_defaults(model=["gaussian", "planar", "iaf", "ffjord"])
    words = [f"{name}: {', '.join(f'{k} {v}' for k, v in d.items())}" for name, d in DATA.items()]
    words += [
        f"{name}: {', '.join(f'{k} {v}' for k, v in model.defaults.items() if k in model.takes)}"
        for name, model in MODELS.items()
        if model.takes
    ]
    flags.epilog = (
        "Flags that are not given (None) have defaults by data and posterior: "
        f"{'; '.join(words)}. --hidden are the layers of the encoder, and backwards those of the "
        "decoder. A flag that none of the posteriors takes is refused."
    )
    return flags


def check(run: argparse.Namespace) -> None:
    """Refuse what would otherwise be found after the training."""
    if run.test_size is not None and run.test_size < 2:
        raise ValueError(f"--test-size={run.test_size} must be 2 or more, for a standard error")
    for name in ("samples", "latent", "warm_up"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(run, name)} must be 1 or more")


def open_images(args: argparse.Namespace) -> ImageData:
    """The images that --data names."""
    if args.data == "digits" and args.data_dir is not None:
        raise ValueError("--data=digits needs no --data-dir: they are inside scikit-learn")
    if (args.data == "mnist" or args.data[:1].isupper()) and args.data_dir is None:
        raise ValueError(f"--data={args.data} needs --data-dir, the folder of its files")
    return image_data(args.data, args.data_dir)


def binarised(data: ImageData, images: Tensor, seed: int) -> Tensor:
    """Validation and test images, binarised once."""
    return random_binarization(images, torch.Generator().manual_seed(seed), data.levels)


def build(args: argparse.Namespace, data: ImageData) -> VAE:
    """The autoencoder; encoder and decoder begin with the same weights for each posterior."""
    size = math.prod(data.shape)
    encoder = nn.Sequential(nn.Flatten(), *perceptron([size, *args.hidden]), nn.SiLU())
    network = nn.Sequential(
        *perceptron([args.latent, *reversed(args.hidden), size]), nn.Unflatten(1, data.shape)
    )
    return VAE(encoder, MODELS[args.model].build(args, args.latent), Bernoulli(network))


def perceptron(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.SiLU()]
    return layers[:-1]


def train(args: argparse.Namespace, data: ImageData, out: Path) -> tuple[VAE, FitResult]:
    """Train that autoencoder, by the flags; return it with its best averaged weights."""
    prepare(args)
    vae = build(args, data)
    torch.manual_seed(args.seed + 1)  # the same noise for each posterior
    val = binarised(data, data.val, args.seed)

    @torch.no_grad()
    def validate(averaged: VAE) -> Tensor:
        generator = torch.Generator().manual_seed(args.seed)
        device = next(averaged.parameters()).device
        parts = [averaged.elbo(b.to(device), generator=generator) for b in val.split(1000)]
        return -torch.cat(parts)

    of_training = {k: v for k, v in vars(args).items() if k != "samples"}
    return train_flow(
        argparse.Namespace(**of_training),
        ELBO(vae),
        data.train,
        out,
        validate,
        MODELS,
        part="vae",
        anneal={"beta": linear(0.0, 1.0, max(1, min(args.warm_up, args.steps // 2)))},
        augment=partial(random_binarization, levels=data.levels),
        clip_grad_norm=100.0,
        validate_every=args.validate_every,
    )


@torch.no_grad()
def bounds(vae: VAE, test: Tensor, samples: int, seed: int) -> Tensor:
    """ELBO and importance-weighted bound of each test image (2, N)."""
    device, generator = next(vae.parameters()).device, torch.Generator().manual_seed(seed)
    choices: dict[str, Any] = {"solver": REFERENCE, "generator": generator}
    parts = []
    for x in test.split(500):
        x = x.to(device)
        elbo = vae.elbo(x, samples=TEST_DRAWS, divergence="exact", **choices)
        parts.append(torch.stack([elbo, vae.iwae(x, samples, chunk=CHUNK, **choices)]))
    return torch.cat(parts, 1).cpu().double()


def measure(args: argparse.Namespace, vae: VAE, result: FitResult, test: Tensor, out: Path) -> Row:
    """The test of a trained autoencoder; its values of each image are kept beside its weights."""
    start = time.perf_counter()
    values = bounds(vae, test, args.samples, args.seed)
    torch.save(values, out / args.model / "bounds.pt")
    print_notes(values[1], f"{args.model}: ")
    elbo, bound = -values
    row = Row(
        args.model,
        elbo.mean().item(),
        standard_error(elbo),
        bound.mean().item(),
        standard_error(bound),
        *[None] * 4,
        args.samples,
        parameters(vae),
        result.step,
        result.stopped,
        result.elapsed,
        time.perf_counter() - start,
    )
    return with_gains(row, out)


def with_gains(row: Row, out: Path) -> Row:
    """The row with its gains over the Gaussian posterior, image by image, where it was tested."""
    paths = [out / name / "bounds.pt" for name in (row.model, "gaussian")]
    if row.model == "gaussian" or not all(path.exists() for path in paths):
        return row
    own, plain = (torch.load(path, weights_only=True) for path in paths)
    if own.shape != plain.shape:  # of another --test-size
        return row
    gains: dict[str, float] = {}
    for name, difference in zip(("elbo_gain", "bound_gain"), own - plain, strict=True):
        gains |= {name: difference.mean().item(), f"{name}_error": standard_error(difference)}
    return dataclasses.replace(row, **gains)


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run that was cut short: of each posterior trained to its end."""
    path = out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["model"]: row for row in rows if row["model"] in MODELS}


def report(
    rows: list[Row],
    failed: list[str],
    data: ImageData,
    test: Tensor,
    run: argparse.Namespace,
    out: Path,
) -> None:
    """The table, printed and kept as report.txt."""
    lines = [
        ["", "negative ELBO", "gain", f"{run.samples} samples", "gain", "parameters", "steps", "s"],
        *(row.cells() for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    channels, height, width = data.shape
    text = [
        f"{data.name}: {len(test)} test images of {channels} x {height} x {width}, binarised at "
        f"random; {run.latent} latents",
        "",
        *(
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in lines
        ),
        "",
        f"nats, lower is better; {run.samples} samples: the negative importance-weighted bound",
        "gain: by how much it is lower than the Gaussian posterior's, image by image",
        "+-: the standard error over test images; s: seconds of training",
        *failed,
    ]
    write_report(text, out)


@torch.no_grad()
def draw(vaes: dict[str, VAE], rows: list[Row], test: Tensor, out: Path) -> None:
    """reconstructions.png, samples.png and training.png."""
    if not vaes:
        return
    titles = {row.model: f"{row.model}  {row.bound:.2f}" for row in rows}
    shown = {"data": grey(test[:SHOWN])}
    samples = {"data": grey(test[:SHOWN])}
    for name, vae in vaes.items():
        device, generator = next(vae.parameters()).device, torch.Generator().manual_seed(0)
        x = test[:SHOWN].to(device)
        shown[titles[name]] = grey(vae.reconstruct(x, generator=generator, solver=REFERENCE))
        z = vae.sample_prior(SHOWN, generator=generator)
        samples[titles[name]] = grey(vae.decoder.mean(z))
    plot_images(shown).savefig(out / "reconstructions.png", dpi=100)
    plot_images(samples).savefig(out / "samples.png", dpi=100)
    logs = {name: out / name / "log.jsonl" for name in vaes}
    terms = ("reconstruction", "kl")  # the loss has another weight while it warms up
    figure = plot_training(logs, ylabel="negative ELBO, nats", terms=terms)
    figure.savefig(out / "training.png", dpi=100)
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in PICTURES)}")


def grey(probabilities: Tensor) -> Tensor:
    """Pixels in 256 grey levels."""
    return (255 * probabilities.float()).round().cpu()


if __name__ == "__main__":
    run_example(main)
