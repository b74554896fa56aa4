"""The flow under comparison, and what one product with the Jacobian costs in it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cnf.divergence import BoundField, Divergence, Exact, Hutchinson, HutchPlusPlus
from cnf.fields.base import Constants
from cnf.fields.closed_form import offers
from cnf.flow import Flow
from cnf.memory import peak_memory
from cnf.ode import Solver, TorchDiffEq, record_solves
from cnf.ode.odeint import as_solver
from cnf.transforms import CNF

__all__ = ["Subject", "peak_of", "seconds_of"]


class _Scout(Divergence):
    """No divergence, but a note of where each solve first asked for it."""

    def __init__(self) -> None:
        self.points: list[tuple[BoundField, tuple[Tensor, Tensor, Tensor | None]]] = []
        self.fresh = False

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Nothing; a solve begins."""
        self.fresh = True

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and zeros (B,)."""
        if self.fresh:
            self.points.append((field, (t.detach(), x.detach(), context)))
            self.fresh = False
        with torch.enable_grad():  # a field may be the gradient of something
            dx = field(t, x.detach().requires_grad_(), context).detach()
        return dx, x.new_zeros(len(x))


class _WithoutForms:
    """A field as a function alone, whose divergence takes products."""

    def __init__(self, field: BoundField) -> None:
        self.field = field

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        dx: Tensor = self.field(t, x, context)
        return dx


class Subject:
    """A copy of the flow, its data, and what one product with the Jacobian costs in it."""

    def __init__(
        self,
        flow: Flow,
        x: Tensor,
        context: Tensor | None,
        solver: Solver | TorchDiffEq | None,
        budget: float,
    ) -> None:
        self.flow = copy.deepcopy(flow)
        self.flow.zero_grad()
        self.x = x.clone().detach()
        self.context = None if context is None else context.clone().detach()
        self.event = self.flow.event_shape
        self.dims = math.prod(self.event)
        self.budget = budget
        self.cnfs = [part for part in self.flow.modules() if isinstance(part, CNF)]
        for part in self.cnfs:
            part.solver = as_solver(solver or part.solver)
        self.parameters = [p for p in self.flow.parameters() if p.requires_grad]
        self.closed = all(offers(part.field, "closed_form") for part in self.cnfs)
        self.closed_estimate = all(offers(p.field, "closed_quadratic_form") for p in self.cnfs)
        self.product_seconds = self.product_memory = 0.0
        self._price()

    @torch.no_grad()
    def log_prob(self, divergence: Divergence, generator: torch.Generator | None = None) -> Tensor:
        """log p (*batch,), without gradient."""
        return self.flow.log_prob(self.x, self.context, divergence=divergence, generator=generator)

    def step(self, divergence: Divergence) -> None:
        """A training step's gradient, of parameters alone: those of others stay untouched."""
        loss = -self.flow.log_prob(self.x, self.context, divergence=divergence).mean()
        gradient = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        gradient[0].sum().item()  # waits for the device

    def estimators(self) -> dict[str, Divergence]:
        """What is compared by default, each with its most common settings."""
        few = max(1, min(16, self.dims // 2))
        found: dict[str, Divergence] = {}
        if self.closed:
            found["exact, closed form"] = Exact()
        found["exact, by products"] = Exact(closed_form=False)
        found["Hutchinson, 1 probe"] = Hutchinson()
        found["Hutchinson, 16 probes"] = Hutchinson(probes=16)
        found["Hutchinson, 1 Gaussian"] = Hutchinson("gaussian")
        found[f"Hutchinson, {few} orthogonal"] = Hutchinson("orthogonal", few)
        if self.dims > 1:
            rank = min(4, self.dims // 2)
            found[f"Hutch++, rank {rank}"] = HutchPlusPlus(rank, 2 * rank)
        return found

    def products(self, divergence: Divergence) -> int:
        """How many products an evaluation takes, as far as that is known."""
        if isinstance(divergence, Exact):
            return 0 if divergence.closed_form and self.closed else self.dims
        if isinstance(divergence, Hutchinson):
            return 0 if self.closed_estimate else divergence.probes
        if isinstance(divergence, HutchPlusPlus):
            return 2 * divergence.rank + divergence.probes
        return 0

    def exact(self) -> tuple[Tensor | None, str]:
        """The exact log p (*batch,), and where it is from; None where it costs too much."""
        seconds = self.product_seconds * self.products(Exact())
        if seconds > self.budget:
            return None, (
                f"none, so no bias: about {seconds:.2g} s for one value, more than "
                f"budget={self.budget:g}"
            )
        value = self.log_prob(Exact()).double()
        return value, "closed form" if self.closed else f"{self.dims} products an evaluation"

    def _price(self) -> None:
        """Let the flow judge x; then what a product costs in a log-likelihood and its graph."""
        scout, solvers = _Scout(), [part.solver for part in self.cnfs]
        for part in self.cnfs:
            if isinstance(part.solver, Solver):
                part.solver = replace(part.solver, compile=False)
        with record_solves() as solves:
            self.log_prob(scout)
        for part, solver in zip(self.cnfs, solvers, strict=True):
            part.solver = solver
        batch = min(self.dims, 64 if self.x.is_cuda else 4)
        some = Hutchinson(probes=batch)
        kept = any(solver.gradient == "backprop" for solver in solvers)  # the whole path's graph
        for (asked, at), solve in zip(scout.points, solves, strict=True):
            run = partial(some, _WithoutForms(asked), *at, some.sample_noise(at[1]))
            with torch.no_grad():
                run()
                seconds = seconds_of(lambda run=run: run()[1].sum().item())  # type: ignore[misc]
            self.product_seconds += seconds * solve.nfe / batch
            evaluations = solve.nfe if kept else max(1, solve.nfe // max(1, solve.accepted))
            self.product_memory += peak_of(run, self.x.device) * evaluations / batch


def seconds_of(run: Callable[[], object]) -> float:
    """How long a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_of(run: Callable[[], object], device: torch.device) -> float:
    """The peak of memory in bytes; NaN where it is not known."""
    try:
        return float(peak_memory(run, device)[1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # another profiler is at work, or another kind of device
        return math.nan
