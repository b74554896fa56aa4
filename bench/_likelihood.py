"""Training and scoring a flow of any library, by one loop for all of them."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _discrete import LIBRARIES, Architecture
from torch import Tensor, nn

import cnf
from cnf.data import Table
from cnf.training import fit

EXACT = cnf.Solver("dopri5", rtol=1e-6, atol=1e-6)  # of the figures of a continuous flow


@dataclass(frozen=True)
class Plan:
    """How every flow is trained."""

    steps: int
    batch: int
    lr: float
    seed: int
    clip: float = 10.0
    ema_decay: float = 0.99
    validate_every: int = 100
    max_time: float | None = None  # seconds


@dataclass(frozen=True)
class Score:
    """A trained flow: log q (N,) of the test points, in the units of the data."""

    kind: str
    library: str
    seed: int
    parameters: int
    log_prob: Tensor
    val: float
    seconds: float
    steps: int
    best_step: int

    @property
    def mean(self) -> float:
        """The test log-likelihood, nats."""
        return self.log_prob.mean().item()

    @property
    def error(self) -> float:
        """The standard error of that."""
        return standard_error(self.log_prob)


class Loss(nn.Module):
    """The mean of -log q(x) over a batch, for the flow of any library.

    zuko's are called first, to give the density; the others have a `log_prob` themselves.
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        """A scalar."""
        return -self.log_prob(x).mean()

    def log_prob(self, x: Tensor, **choices: Any) -> Tensor:
        """log q(x) (B,)."""
        density = self.flow if hasattr(self.flow, "log_prob") else self.flow()
        return density.log_prob(x, **choices)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """log q (N,) of many points, in float64; of a continuous flow, with an exact trace."""
        continuous = any(isinstance(part, cnf.CNF) for part in self.flow.modules())
        choices = {"divergence": "exact", "solver": EXACT} if continuous else {}
        return torch.cat([self.log_prob(part, **choices) for part in x.split(2000)]).double()


def build(library: str, architecture: Architecture) -> nn.Module:
    """A library's flow with the weights that it begins with."""
    return importlib.import_module(LIBRARIES[library]).model(architecture).module


def run(kind: str, library: str, make: Callable[[], nn.Module], table: Table, plan: Plan) -> Score:
    """Train a flow, keep the averaged weights of the lowest validation loss, score the test."""
    torch.manual_seed(plan.seed)
    loss = Loss(make())
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=plan.lr)
    best = _Best()

    def validate(model: nn.Module) -> float:
        with torch.no_grad():
            value = -torch.cat([model.log_prob(x) for x in table.val.split(2000)]).mean().item()
        return best.offer(value, model)

    start = time.process_time()
    result = fit(
        loss,
        table.train,
        steps=plan.steps,
        batch_size=plan.batch,
        optimizer=optimizer,
        scheduler=schedule(optimizer, plan.steps),
        clip_grad_norm=plan.clip,
        ema_decay=plan.ema_decay,
        validate=validate,
        validate_every=plan.validate_every,
        max_time=plan.max_time,
        seed=plan.seed,
        progress=False,
    )
    seconds = time.process_time() - start  # of the processor, which others may share
    if best.model is None:
        raise SystemExit(f"{library}'s {kind} has no finite validation loss")
    return Score(
        kind,
        library,
        plan.seed,
        sum(p.numel() for p in parameters),
        best.model.score(table.test) + table.log_det_standardisation,
        table.log_det_standardisation - best.value,
        seconds,
        result.step,
        result.best_step or 0,
    )


class _Best:
    """A copy of the model of the lowest validation loss."""

    def __init__(self) -> None:
        self.value, self.model = math.inf, None

    def offer(self, value: float, model: nn.Module) -> float:
        """Keep the model if it is the best so far; the value as it came."""
        if value < self.value:
            self.value, self.model = value, copy.deepcopy(model)
        return value


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A warm-up over 5% of the steps, then half a cosine down to 1%."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def standard_error(values: Tensor) -> float:
    """Of the mean of values (N,)."""
    return (values.std() / math.sqrt(len(values))).item()
