"""The ways to compute the trace of one field: as contestants, checked, priced by the product."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import _peer
import torch
from _measure import Disagreement
from _peer import Contestant, Peer
from torch import Tensor, nn

import cnf

CLOSED = "exact, closed form"
VJP = "Hutchinson, 1 probe (vjp)"
FORM = "Hutchinson, 1 probe (closed form)"
SKETCH = "Hutch++"
CHUNKS = "exact, in chunks"
ONE = "exact, one by one"
PRODUCTS = {CHUNKS: cnf.Exact(closed_form=False), ONE: cnf.Exact(1, closed_form=False)}
AGREEMENT = 1e-9
"""How far, relatively, what must be the same may be apart in float64."""


class Plain(nn.Module):
    """A field as its values alone: its trace takes vector-Jacobian products by autograd."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.event_shape = field.event_shape

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx (B, *event)."""
        return self.field(t, x)


@dataclass(frozen=True)
class Case:
    """One field, its data (B, *event), and how to solve it."""

    name: str
    field: nn.Module
    x: Tensor
    solver: cnf.Solver

    @property
    def dims(self) -> int:
        """D."""
        return math.prod(self.x.shape[1:])

    def flow(self, divergence: cnf.Divergence, *, plain: bool = False) -> cnf.Flow:
        """The flow of the field itself, not of a copy, by this trace."""
        field = Plain(self.field) if plain else self.field
        transform = cnf.CNF(field, divergence, self.solver)
        return cnf.Flow(cnf.StandardNormal(*self.x.shape[1:]), transform)

    def twin(self, rows: int) -> Case:
        """A copy in float64 with a few rows and one evaluation of the field."""
        field = copy.deepcopy(self.field).double()
        return replace(self, field=field, x=self.x[:rows].double(), solver=ONCE)


ONCE = cnf.Solver("euler", steps=1)


class FlowPeer(Peer):
    """A flow with one of the traces."""

    def __init__(self, name: str, flow: cnf.Flow) -> None:
        self.flow, self.nfe = flow, 0
        transform = flow.transform
        super().__init__(
            name,
            transform.inverse_and_log_det,
            transform.forward,
            lambda: self.nfe,
            list(flow.parameters()),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """By the flow's own method, with all its checks."""
        with cnf.record_solves() as solves:
            log_prob = self.flow.log_prob(x)
        self.nfe = sum(solve.nfe for solve in solves)
        return log_prob


def flows(case: Case) -> dict[str, cnf.Flow]:
    """The flow of each way, by name."""
    made = {CLOSED: case.flow(cnf.Exact()), VJP: case.flow(cnf.Hutchinson(), plain=True)}
    if getattr(case.field, "closed_quadratic_form", False):
        made[FORM] = case.flow(cnf.Hutchinson())
    made[SKETCH] = case.flow(cnf.HutchPlusPlus(rank=min(2, case.dims), probes=2))
    return made | {name: case.flow(divergence) for name, divergence in PRODUCTS.items()}


def contestants(case: Case, names: list[str], *, training: bool) -> list[Contestant]:
    """Log-likelihoods or training steps of those that there are."""
    make = _peer.training if training else _peer.evaluation
    made = flows(case)
    return [make(FlowPeer(name, made[name]), case.x) for name in names if name in made]


def verify(case: Case) -> float:
    """The largest relative difference of what must be the same; fail where it is not.

    In float64: the log-determinants of all exact traces, and of both of Hutchinson's estimates with
    the same noise; their gradients too, where few dimensions make that cheap.
    """
    few = case.dims <= 256
    twin = case.twin(2 if few else 1)
    made = flows(twin)
    if not few:  # in larger chunks; one by one would take minutes
        made[CHUNKS] = twin.flow(cnf.Exact(64, closed_form=False))
        del made[ONE]
    groups = [[CLOSED, CHUNKS, ONE], [VJP, FORM]]
    worst = 0.0
    for reference, *others in [[n for n in group if n in made] for group in groups]:
        truth = _outcome(made[reference], twin.x, gradient=few)
        for name in others:
            outcome = _outcome(made[name], twin.x, gradient=few)
            gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(outcome, truth, strict=True)]
            if not all(gap <= AGREEMENT for gap in gaps):
                raise Disagreement(
                    f"{case.name}: {name} computes something else than {reference}: values and "
                    f"gradients differ by {gaps} of their norms (limit {AGREEMENT:.0e})"
                )
            worst = max(worst, *gaps)
    return worst


def _outcome(flow: cnf.Flow, x: Tensor, *, gradient: bool) -> list[Tensor]:
    """The log-determinant (B,), and the gradient of its mean as one vector."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradient), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the exact divergence takes")
        log_det = flow.transform.inverse_and_log_det(x)[1]
    if not gradient:
        return [log_det]
    parameters = list(flow.parameters())
    slopes = torch.autograd.grad(log_det.mean(), parameters, materialize_grads=True)
    return [log_det.detach(), torch.cat([slope.flatten() for slope in slopes])]


@dataclass(frozen=True)
class FirstProducts(cnf.Divergence):
    """The first terms of the sum that `Exact` takes, to see what one of them costs."""

    number: int
    chunk: int

    def __call__(
        self,
        field: Callable[..., Tensor],
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """dx (B, *event) and e_1^T J e_1 + ... (B,)."""
        graph, dims = torch.is_grad_enabled(), x[0].numel()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            dx = field(t, x, context)
            div = x.new_zeros(len(x))
            for start in range(0, self.number, self.chunk):
                e = torch.eye(dims, dtype=x.dtype, device=x.device)[start : start + self.chunk]
                e = e.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)  # (K, B, *event)
                batched = self.chunk > 1
                options = {"create_graph": graph, "retain_graph": True, "is_grads_batched": batched}
                rows = torch.autograd.grad(dx, x, e if batched else e[0], **options)[0]
                rows = rows.reshape(-1, len(x), dims)  # (K, B, D)
                for k, row in enumerate(rows, start):
                    div = div + row[:, k]
        return (dx, div) if graph else (dx.detach(), div.detach())


def extrapolated(case: Case, name: str, *, training: bool, repeat: int = 3) -> float:
    """Seconds of an exact trace by D products: those of one evaluation with few of them, scaled.

    seconds = NFE (s(k) + (D - k) (s(k) - s(j)) / (k - j)), with j and k products.
    """
    chunk = 1
    if name == CHUNKS:  # as many at once as `Exact` takes
        chunk = max(1, 2**24 // case.x.numel()) if case.x.is_cuda else 4
        chunk = min(chunk, max(1, case.dims // 3))
    few, more = chunk, 3 * chunk
    once = replace(case, solver=ONCE)
    make = _peer.training if training else _peer.evaluation
    runs = [make(FlowPeer(name, once.flow(FirstProducts(n, chunk))), case.x) for n in (few, more)]
    seconds = [[_seconds(run, case.x) for _ in range(repeat + 1)][1:] for run in runs]
    low, high = (min(each) for each in seconds)
    with torch.no_grad(), cnf.record_solves() as solves:
        case.flow(cnf.Hutchinson()).log_prob(case.x)
    slope = max(0.0, high - low) / (more - few)
    return solves[0].nfe * (high + (case.dims - more) * slope)


def _seconds(contestant: Contestant, x: Tensor) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else time.perf_counter
    wait()
    start = time.perf_counter()
    contestant.run()
    wait()
    return time.perf_counter() - start
