"""The flow under audit: a copy of it that meets the same noise in every solve."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.divergence import BoundField, Divergence, as_divergence
from cnf.fields.base import Constants
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq
from cnf.ode.odeint import as_solver
from cnf.transforms import CNF
from cnf.transforms.base import over_samples
from cnf.transforms.context import expand_context

__all__ = ["Point", "Replay", "Subject"]

_FIXED = ("euler", "midpoint", "heun", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


class Point(NamedTuple):
    """Where a field was asked for its divergence, and with what noise."""

    field: BoundField
    t: Tensor
    x: Tensor
    context: Tensor | None
    noise: Tensor | None

    def value(self) -> Tensor:
        """dx (B, *event)."""
        with torch.enable_grad():  # a field may be the gradient of something
            return self.field(self.t, self.x.clone().requires_grad_(), self.context).detach()


class Replay(Divergence):
    """A divergence that draws its noise once for all solves, and notes where it was asked."""

    def __init__(self, inner: Divergence) -> None:
        self.inner = inner
        self.draws: list[Tensor | None] = []  # one for each solve of a log_prob
        self.points: list[Point] = []
        self.used = self.calls = 0
        self.row: int | None = None  # where one is solved alone

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The draw of this solve (B, ...), of one row where it is alone."""
        if self.used == len(self.draws):
            self.draws.append(self.inner.sample_noise(x, generator))
        noise = self.draws[self.used]
        self.used += 1
        return None if noise is None else _row(noise, self.row).to(x)

    def constants(self, field: BoundField, x: Tensor, noise: Tensor | None) -> Constants:
        """What the inner divergence computes once."""
        return self.inner.constants(field, x, noise)

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the inner divergence gives."""
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:  # the 1st, 2nd, 4th, ...: few, but along the path
            self.points.append(Point(field, t.detach(), x.detach(), context, noise))
        return self.inner(field, t, x, context, noise, constants)


@dataclass
class Subject:
    """A copy of a flow, the rows it is tried on, and choices in the place of the flow's own.

    `dataclasses.replace` makes another copy, which meets other noise.
    """

    original: Flow
    x: Tensor
    context: Tensor | None
    divergence: str | Divergence | None
    solver: Solver | TorchDiffEq | None
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.flow = copy.deepcopy(self.original)
        self.flow.zero_grad()
        self.cnfs = [part for part in self.flow.modules() if isinstance(part, CNF)]
        self.replays = []
        for part in self.cnfs:
            part.divergence = Replay(as_divergence(self.divergence or part.divergence))
            part.solver = as_solver(self.solver or part.solver)
            self.replays.append(part.divergence)

    def flatten(self) -> None:
        """x (*batch, *event) -> (B, *event), context likewise; once the flow has accepted them."""
        event = self.flow.event_shape
        batch = self.x.shape[: self.x.ndim - len(event)]
        self.x = self.x.clone().detach().reshape(batch.numel(), *event)
        if self.context is not None:
            context = expand_context(self.context, batch).clone().detach()
            self.context = context.reshape(batch.numel(), context.shape[-1])

    def share_noise(self, other: Subject) -> None:
        """Meet the noise that another meets."""
        for replay, theirs in zip(self.replays, other.replays, strict=True):
            replay.draws = theirs.draws

    def solve(self, x: Tensor | None = None, row: int | None = None) -> tuple[Tensor, Tensor]:
        """z (B, *event) and log p (B,), always with the same noise; of one row where asked."""
        for replay in self.replays:
            replay.used, replay.row = 0, row
        x = _row(self.x if x is None else x, row)
        context = None if self.context is None else _row(self.context, row)
        z, log_det = self.flow.transform.inverse_and_log_det(x, context, generator=self.generator)
        log_det = over_samples(log_det, x.ndim - len(self.flow.event_shape))
        return z, self.flow.base.log_prob(z) + log_det

    def variables(self) -> list[Tensor]:
        """x and the parameters, what gradients are taken in."""
        return [self.x, *(p for p in self.flow.parameters() if p.requires_grad)]

    def gradient(self) -> list[Tensor]:
        """The gradient of mean log p in the variables."""
        x, *parameters = self.variables()
        x = x.detach().requires_grad_()
        mean = self.solve(x)[1].mean()
        return list(torch.autograd.grad(mean, [x, *parameters], materialize_grads=True))

    def tolerances(self) -> tuple[float, float]:
        """The largest rtol and atol; fixed steps, which have none, are held to 1e-5."""
        solvers = [part.solver for part in self.cnfs]
        pairs = [(1e-5, 1e-5) if s.method in _FIXED else (s.rtol, s.atol) for s in solvers]
        return max(rtol for rtol, _ in pairs), max(atol for _, atol in pairs)

    def remedy(self) -> str:
        """What makes its solves more accurate."""
        fixed = any(part.solver.method in _FIXED for part in self.cnfs)
        return "raise steps or use dopri5" if fixed else "tighten rtol and atol"


def _row(values: Tensor, row: int | None) -> Tensor:
    return values if row is None else values[row : row + 1]
