"""Objectives over solvers with on_failure="nan": as if the samples that fail were not there."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.objectives.terms import record_terms
from cnf.training import fit
from cnf.transforms import Compose, Coupling, Diagonal

BAD = [2, 11, 17]
GOOD = [i for i in range(20) if i not in BAD]
SOLVERS = {
    "rk4": cnf.Solver("rk4", steps=4, on_failure="nan"),
    "independent": cnf.Solver("rk4", steps=4, on_failure="nan", batch="independent"),
    "adaptive": cnf.Solver(on_failure="nan"),
    "checkpoint": cnf.Solver("rk4", steps=4, on_failure="nan", gradient="checkpoint"),
    "adjoint": cnf.Solver(on_failure="nan", gradient="adjoint"),
}


class Field(nn.Module):
    """x' = tanh(W x + c), NaN for samples whose first number is large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(2, 2))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = x @ self.weight.T
        h = h if context is None else h + context
        return torch.where(x[:, :1] > 50, torch.nan, h.tanh())


def solved(solver: cnf.Solver) -> cnf.CNF:
    return cnf.CNF(Field(), "exact", solver)


class Located(cnf.StandardNormal):
    """A base with a parameter, which failed samples meet, too."""

    def __init__(self) -> None:
        super().__init__(2)
        self.mean = nn.Parameter(torch.ones(2))

    def log_prob(self, z: Tensor) -> Tensor:
        return super().log_prob(z - self.mean)


FLOWS = {
    "alone": solved,
    "a-chain": lambda s: Compose(solved(s), solved(s)),
    "layers": lambda s: Compose(Diagonal(2), Coupling(2, "halves", hidden=(4,)), solved(s)),
}


def problem(kind: str, solver: cnf.Solver) -> tuple[cnf.Flow, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    x[BAD, 0] = 100.0
    return cnf.Flow(Located(), FLOWS[kind](solver)).double(), x


def gradients(loss: Tensor, flow: cnf.Flow) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(flow.parameters()), materialize_grads=True))


def steady(solver: cnf.Solver) -> cnf.Solver:
    return dataclasses.replace(solver, on_failure="raise")


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_loss_and_gradient_are_those_of_the_other_samples(solver, kind) -> None:
    flow, x = problem(kind, solver)
    context = torch.randn(20, 2, dtype=torch.float64) if kind == "alone" else None
    penalties = [cnf.KineticEnergy(0.1)] if kind == "layers" else []
    objective = cnf.MaximumLikelihood(flow, regularizers=penalties, unit="bits_per_dim")
    with record_terms() as terms:
        loss = objective(x, context)
    rest = None if context is None else context[GOOD]
    truth = objective(x[GOOD], rest, solver=steady(solver))
    assert terms["failed_samples"] == 3
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradients(loss, flow), gradients(truth, flow))


@pytest.mark.parametrize("gradient", ["reparameterised", "path"])
@pytest.mark.parametrize("context", [None, torch.randn(3, 2).double()], ids=["none", "context"])
def test_reverse_kl_is_over_the_samples_whose_solves_end(gradient, context) -> None:
    """A base of given samples: with and without those that fail."""
    flow, _ = problem("alone" if context is not None else "layers", SOLVERS["rk4"])
    if context is None:
        flow.transform = Compose(*list(flow.transform)[::-1])  # the layers come behind the solve
    batch = (7,) if context is None else (7, 3)
    z = torch.randn(*batch, 2, dtype=torch.float64)
    bad = torch.rand(batch) < 0.3
    bad.flatten()[0] = True
    z[bad] = 100.0

    def log_density(x: Tensor, c: Tensor | None = None) -> Tensor:
        assert x.isfinite().all()
        return -(x if c is None else x - c).square().sum(-1)

    objective = cnf.ReverseKL(flow, log_density, samples=7, gradient=gradient)
    flow.base.rsample = lambda shape, generator=None: z
    with record_terms() as terms:
        loss = objective(context)
    assert terms["failed_samples"] == bad.sum()
    flow.base.rsample = lambda shape, generator=None: z[~bad]
    rows = None if context is None else context.expand(7, 3, 2)[~bad]
    truth = objective(rows, solver=steady(SOLVERS["rk4"]))
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradients(loss, flow), gradients(truth, flow))


def test_a_chain_of_solves_gives_nan_to_the_failures_alone() -> None:
    """The second solve does not take the first one's NaN for bad data."""
    for solver in SOLVERS.values():
        flow, x = problem("a-chain", solver)
        log_prob = flow.log_prob(x)
        assert log_prob[BAD].isnan().all()
        alone = flow.log_prob(x[GOOD], solver=steady(solver))
        torch.testing.assert_close(log_prob[GOOD], alone, rtol=1e-4, atol=1e-4)
        assert flow.transform.forward(x).isnan().any(-1).nonzero().flatten().tolist() == BAD


@pytest.mark.parametrize("kind", FLOWS)
def test_data_that_are_not_finite_are_refused_all_the_same(kind: str) -> None:
    flow, x = problem(kind, SOLVERS["rk4"])
    x[5] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite values in x: 1 of 20 rows"):
        flow.log_prob(x)


@pytest.mark.parametrize("failures", [11, 20])
def test_too_many_failures_are_an_error(failures: int) -> None:
    flow, x = problem("alone", SOLVERS["rk4"])
    x[:, 0] = 0.0
    x[:10, 0] = 100.0
    assert cnf.MaximumLikelihood(flow)(x).isfinite()
    x[:failures, 0] = 100.0
    with pytest.raises(cnf.TrainingError, match=rf"gave up {failures} of the 20 samples.*50%"):
        cnf.MaximumLikelihood(flow)(x)
    with pytest.raises(cnf.SolverError):
        cnf.MaximumLikelihood(flow)(x, solver=cnf.Solver("rk4", steps=4))


def test_nan_that_no_solver_chose_stays_in_the_loss() -> None:
    flow, x = problem("layers", SOLVERS["rk4"])
    with torch.no_grad():
        flow.transform[0].amortized.shift.fill_(torch.nan)
    with pytest.raises(cnf.TrainingError, match="gave up 20 of the 20"):
        cnf.MaximumLikelihood(flow)(x)
    discrete = cnf.Flow(flow.base, Compose(*list(flow.transform)[:2]))
    assert cnf.MaximumLikelihood(discrete)(x).isnan()


@pytest.mark.filterwarnings("ignore:the data are far from the base:RuntimeWarning")
def test_a_run_goes_on_and_its_log_tells_the_failures(tmp_path) -> None:
    flow, x = problem("layers", SOLVERS["rk4"])
    fit(cnf.MaximumLikelihood(flow), x, steps=3, batch_size=20, out=tmp_path, log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [line["failed_samples"] for line in lines if "failed_samples" in line]
    assert told
    assert set(told) == {3.0}
    assert all(p.isfinite().all() for p in flow.parameters())
