"""What the discrete flows have in common: the architecture, a model of a library, its contestants.

Every layer is a coupling that changes half of the features, then the other half, and so on (where
they are odd in number, the larger half first), or a MADE of the features in ascending, then in
descending order; the conditioner is a plain MLP. Splines are of rational quadratics with linear
tails. Data go to noise in one pass; the base is a fixed standard normal.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _peer import Contestant
from torch import Tensor, nn

FLOWS = {
    "affine": "affine coupling (RealNVP)",
    "spline": "rational-quadratic spline coupling (NSF)",
    "maf": "masked affine autoregressive (MAF)",
}
TASKS = {"training": "training step", "log_prob": "log_prob", "sampling": "sampling"}
LIBRARIES = {
    "cnf": "_discrete_cnf",
    "zuko": "_zuko_discrete",
    "nflows": "_nflows",
    "normflows": "_normflows",
}
FLOOR = "bare conditioners"
_said: set[str] = set()


@dataclass(frozen=True)
class Architecture:
    """One flow, the same for every library."""

    kind: str  # one of FLOWS
    features: int
    layers: int
    hidden: tuple[int, ...]
    bins: int = 8
    bound: float = 5.0  # of the splines

    def mask(self, layer: int) -> Tensor:
        """Which features a coupling layer changes, bool (D,): the even ones, then the odd."""
        return torch.arange(self.features) % 2 == layer % 2

    @property
    def per_feature(self) -> int:
        """Numbers that the conditioner gives for each feature that is transformed."""
        return 3 * self.bins - 1 if self.kind == "spline" else 2

    def conditioner_sizes(self, layer: int) -> tuple[int, int]:
        """Inputs and outputs of the conditioner."""
        if self.kind == "maf":
            return self.features, self.features * self.per_feature
        changed = int(self.mask(layer).sum())
        return self.features - changed, changed * self.per_feature

    def made(self) -> dict[str, Any]:
        """The arguments of a MADE of feedforward layers, for nflows and for normflows.

        Raises:
            NotImplementedError: hidden layers of several widths.
        """
        width, *more = self.hidden
        if any(other != width for other in more):
            raise NotImplementedError("the hidden layers of its MADE have one width")
        return {
            "features": self.features,
            "hidden_features": width,
            "num_blocks": len(more),
            "use_residual_blocks": False,
        }


@dataclass
class Model:
    """A library's flow: log q(x) (B,) of x (B, D), samples (n, D), and both at once."""

    name: str
    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    sample_and_log_prob: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.module.parameters())


class Plain(nn.Module):
    """The conditioner, for the libraries that are given one; nflows and normflows add a context."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """The parameters of a layer."""
        return self.layers(x)


def models(architecture: Architecture, only: str | None, device: str) -> Iterator[Model]:
    """The flow of each library; a printed line, once, where one is missing or cannot build it."""
    names = [n for n in LIBRARIES if only is None or any(p.strip() in n for p in only.split(","))]
    if not names:
        raise SystemExit(f"--only {only}: there is {[*LIBRARIES]}")
    for name in names:
        try:
            model = importlib.import_module(LIBRARIES[name]).model(architecture)
        except ModuleNotFoundError as error:
            line = f"{name} skipped: {error.name} is not installed"
        except (NotImplementedError, ImportError) as error:
            line = f"{name} skipped: {error}"
        else:
            randomise(model.module)
            model.module.to(device)
            yield model
            continue
        if line not in _said:
            _said.add(line)
            print(line)


def randomise(module: nn.Module) -> None:
    """The same kind of weights for all: some libraries begin with the identity, others do not."""
    for parameter in module.parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        nn.init.uniform_(parameter, -size, size)


def check(model: Model, x: Tensor) -> float:
    """The largest relative gap between log q of own samples, told with them and asked for later.

    Raises:
        SystemExit: it is large, or a sample, a value or a gradient is not finite.
    """
    model.log_prob(x).mean().backward()
    grads = torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])
    with torch.no_grad():
        log_prob, sample = model.log_prob(x), model.sample(len(x))
        own, told = model.sample_and_log_prob(len(x))
        asked = model.log_prob(own)
    for what, value in (("log_prob", log_prob), ("a gradient", grads), ("a sample", sample)):
        if not value.isfinite().all():
            raise SystemExit(f"{model.name}: {what} is not finite")
    if log_prob.shape != x.shape[:1] or sample.shape != x.shape:
        raise SystemExit(f"{model.name}: log_prob {log_prob.shape}, a sample {sample.shape}")
    gap = ((told - asked).abs() / asked.abs().clamp_min(1)).max().item()
    if not gap <= 1e-3:
        raise SystemExit(
            f"{model.name}: log_prob of its own samples is off by {gap:.2g} of its value (limit "
            "0.001): its two directions are not inverses, or one log-determinant is wrong"
        )
    return gap


def contestant(model: Model, task: str, x: Tensor) -> Contestant:
    """A task of a model, its aten operations counted as those of one evaluation."""

    def training() -> None:
        model.module.zero_grad()
        (-model.log_prob(x).mean()).backward()

    def log_prob() -> None:
        with torch.no_grad():
            model.log_prob(x)

    def sampling() -> None:
        with torch.no_grad():
            model.sample(len(x))

    run = {"training": training, "log_prob": log_prob, "sampling": sampling}[task]
    return Contestant(model.name, run, nfe=(1, None), forward=run)


def floor(architecture: Architecture, x: Tensor) -> Model:
    """One pass of the conditioners alone, unmasked: in sampling too, though a MAF takes D of them,
    or D parts of one.
    """
    sizes = [architecture.conditioner_sizes(i) for i in range(architecture.layers)]
    nets = nn.ModuleList([Plain(*size, architecture.hidden) for size in sizes]).to(x.device)
    inputs = [x[:, :size].contiguous() for size, _ in sizes]

    def log_prob(_: Tensor) -> Tensor:
        return torch.stack([net(y).sum(1) for net, y in zip(nets, inputs, strict=True)]).sum(0)

    def sample(_: int) -> Tensor:
        return [net(y) for net, y in zip(nets, inputs, strict=True)][-1]

    return Model(FLOOR, nets, log_prob, sample, lambda n: (sample(n), log_prob(x)))
