"""on_failure="nan": the samples that fail become NaN, the others are as if alone."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

import cnf
from cnf.ode import Solver, odeint, record_solves

BAD = [2, 11, 17]  # the samples that fail
GOOD = [i for i in range(20) if i not in BAD]
SOLVERS = {
    "shared": Solver(on_failure="nan"),
    "independent": Solver(on_failure="nan", batch="independent"),
    "fixed": Solver("rk4", steps=20, on_failure="nan"),
    "fixed-independent": Solver("rk4", steps=20, on_failure="nan", batch="independent"),
}
GRADIENTS = ["backprop", "checkpoint", "adjoint"]
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


class Field(nn.Module):
    """x' = tanh(W x) + c, but for the samples whose first number is large: those fail."""

    def __init__(self, cause):
        super().__init__()
        self.weight = nn.Parameter(0.5 * normal(2, 2))
        self.cause = cause

    def forward(self, t, x):
        good = (x @ self.weight.T).tanh()
        bad = x[:, :1] > 50.0
        return torch.where(bad, FAULTS[self.cause](t, x), good)


FAULTS = {
    "nan": lambda t, x: torch.full_like(x, torch.nan),
    "nan-later": lambda t, x: torch.where(t > 0.5, torch.nan, x),
    "inf": lambda t, x: torch.full_like(x, torch.inf),
    "blow-up": lambda t, x: x**2,
    "overflow": lambda t, x: x**50,
    "stiff": lambda t, x: -1e6 * (x - 100 - (1e5 * t).sin()),
}
ADAPTIVE_ONLY = ("stiff",)


def batch(seed=0):
    """Twenty samples, some of which will fail."""
    x = normal(20, 2, seed=seed)
    x[BAD, 0] = 100.0
    return x


def steady(solver):
    """The solver that raises."""
    return dataclasses.replace(solver, on_failure="raise")


def flow_of(cause, solver, divergence="exact"):
    transform = cnf.Inverse(cnf.CNF(Field(cause), divergence, solver))
    return cnf.Flow(cnf.StandardNormal(2), transform).double()


def problems():
    for name, solver in SOLVERS.items():
        for cause in FAULTS:
            if solver.adaptive or cause not in ADAPTIVE_ONLY:
                choice = dataclasses.replace(solver, max_steps=200)
                yield pytest.param(cause, choice, id=f"{cause}-{name}")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("cause", "solver"), list(problems()))
def test_the_failing_samples_are_nan_and_the_others_as_without_them(cause, solver):
    flow, x = flow_of(cause, solver), batch()
    start = time.process_time()
    with torch.no_grad(), record_solves() as solves:
        found = flow.log_prob(x)
        z = flow.transform.forward(torch.zeros(0, 2).double())
    assert time.process_time() - start < 5.0
    assert z.shape == (0, 2)
    assert found[BAD].isnan().all()
    assert (solves[0].failed, solves[0].status) == (3, "partly_failed")
    with torch.no_grad():
        alone = flow.log_prob(x[GOOD], solver=steady(solver))
    if solver.batch == "independent":
        assert torch.equal(found[GOOD], alone)
    elif solver.adaptive:
        torch.testing.assert_close(found[GOOD], alone, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(found[GOOD], alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(cnf.SolverError):
        flow.log_prob(x, solver=steady(solver))


@each_solver
def test_the_state_of_a_failed_sample_is_nan_in_every_dimension(solver):
    def f(t, x):
        dx = torch.cat((x[:, :1].sqrt() - 1, -x[:, 1:]), 1)  # NaN in one dimension of three
        return dx, torch.stack((x[:, 1], x[:, 2]), -1)

    x = 1 + normal(5, 3).abs()
    x[3, 0] = -1.0
    end = odeint(f, x, 0.0, 1.0, solver)
    assert end.x[3].isnan().all()
    assert end.quadratures[3].isnan().all()
    others = [0, 1, 2, 4]
    torch.testing.assert_close(
        end.x[others, 1:], x[others, 1:] * torch.tensor(-1.0).exp(), rtol=1e-4, atol=0
    )
    assert end.quadratures[others].isfinite().all()
    assert end.stats.failed == 1


@each_solver
def test_a_quadrature_alone_can_fail(solver):
    def f(t, x):
        return -x, x.log()

    x = torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    end = odeint(f, x, 0.0, 1.0, solver)
    assert end.quadratures[1].isnan().all()
    assert end.x[1].isnan().all()
    expected = x[[0, 2]].log() - 0.5
    torch.testing.assert_close(end.quadratures[[0, 2]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shared", "independent"])
def test_too_many_steps_of_one_sample(name):
    rate = torch.ones(20, 1, dtype=torch.float64)
    rate[BAD] = 3000.0
    solver = dataclasses.replace(SOLVERS[name], max_steps=60)

    def f(t, x, rate):
        return (rate * t).cos() * rate

    x = normal(20, 1)
    end = odeint(f, x, 0.0, 1.0, solver, args=(rate,))
    assert end.x[BAD].isnan().all()
    assert end.stats.failed == 3
    torch.testing.assert_close(end.x[GOOD], (x + rate.sin())[GOOD], rtol=1e-4, atol=1e-4)


@each_solver
def test_no_sample_fails(solver):
    flow, x = flow_of("nan", solver), normal(20, 2)
    with torch.no_grad(), record_solves() as solves:
        found = flow.log_prob(x)
        expected = flow.log_prob(x, solver=steady(solver))
    assert torch.equal(found, expected)
    assert [(s.failed, s.status) for s in solves] == [(0, "converged")] * 2
    assert solves[0].nfe == solves[1].nfe


@each_solver
@each_gradient
@pytest.mark.parametrize("n", [1, 5, 17])
def test_every_sample_fails(n, gradient, solver):
    flow = flow_of("nan", dataclasses.replace(solver, gradient=gradient))
    x = torch.full((n, 2), 100.0, dtype=torch.float64, requires_grad=True)
    with record_solves() as solves:
        found = flow.log_prob(x)
    assert found.shape == (n,)
    assert found.isnan().all()
    assert solves[0].failed == n
    if found.requires_grad:
        found.nan_to_num(0.0).sum().backward()
        assert x.grad is None or not x.grad.any()


@each_solver
def test_an_empty_batch(solver):
    flow = flow_of("nan", solver)
    assert flow.log_prob(torch.zeros(0, 2).double()).shape == (0,)


def test_every_sample_fails_in_a_way_of_its_own():
    """More causes, one after the other, than a shared solve is repeated."""
    x = torch.linspace(0.5, 30, 24, dtype=torch.float64)[:, None]

    def f(t, x):
        return x**2  # blows up at t = 1/x, later than 1 only for the first

    for name in ("shared", "independent"):
        end = odeint(f, x, 0.0, 1.0, SOLVERS[name])
        assert end.x[1:].isnan().all()
        torch.testing.assert_close(end.x[0], x[0] / (1 - x[0]), rtol=1e-3, atol=0)
        assert end.stats.failed == 23


def test_causes_that_show_one_after_the_other():
    """Each of nine samples fails at a time of its own; the last one is well."""
    x = torch.ones(10, 1, dtype=torch.float64)
    until = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    until = torch.cat((until, torch.tensor([2.0]).double()))[:, None]

    def f(t, x, until):
        return torch.where(t < until, -x, torch.nan)

    for solver in SOLVERS.values():
        end = odeint(f, x, 0.0, 1.0, solver, args=(until,))
        assert end.x[:9].isnan().all()
        torch.testing.assert_close(end.x[9], x[9] * torch.tensor(-1.0).exp(), rtol=1e-4, atol=0)


# ---------------------------------------------------------------- gradients


@each_gradient
@pytest.mark.parametrize("cause", ["nan-later", "blow-up"])
@each_solver
def test_the_gradient_is_that_of_the_others_alone(solver, cause, gradient):
    tol = 1e-7 if gradient == "adjoint" else 1e-5
    solver = dataclasses.replace(solver, gradient=gradient, rtol=tol, atol=tol, max_steps=200)
    flow = flow_of(cause, solver)
    x = batch().requires_grad_()
    found = flow.log_prob(x)
    kept = found[~found.isnan()]
    assert len(kept) == len(GOOD)
    gx, gw = torch.autograd.grad(kept.sin().sum(), (x, flow.transform.transform.field.weight))
    few = batch()[GOOD].requires_grad_()
    flow = flow_of(cause, steady(solver))
    wanted = (few, flow.transform.transform.field.weight)
    ex, ew = torch.autograd.grad(flow.log_prob(few).sin().sum(), wanted)
    close = {"rtol": 1e-5, "atol": 1e-5} if gradient == "adjoint" else {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(gx[GOOD], ex, **close)
    torch.testing.assert_close(gw, ew, **close)
    assert not gx[BAD].any()


@each_solver
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_nanmean_is_a_loss(solver, gradient):
    flow = flow_of("blow-up", dataclasses.replace(solver, gradient=gradient))
    x = batch().requires_grad_()
    flow.log_prob(x).nanmean().backward()
    assert x.grad.isfinite().all()
    assert flow.transform.transform.field.weight.grad.isfinite().all()
    assert flow.transform.transform.field.weight.grad.any()


# ---------------------------------------------------------------- context and noise


class Conditional(nn.Module):
    """x' = c tanh(W x), NaN where c is large."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.5 * normal(2, 2))

    def forward(self, t, x, context):
        return torch.where(context > 50, torch.nan, context * (x @ self.weight.T).tanh())


@each_solver
def test_context_and_noise_stay_with_their_samples(solver):
    context = 1 + normal(20, 1, seed=1).abs()
    context[BAD] = 100.0
    x = normal(20, 2)
    estimate = cnf.Hutchinson("gaussian", probes=2)
    flow = cnf.CNF(Conditional(), estimate, solver)
    z, log_det = flow.inverse_and_log_det(x, context, generator=torch.Generator().manual_seed(4))
    assert z[BAD].isnan().all()
    assert log_det[BAD].isnan().all()
    noise = estimate.sample_noise(x, torch.Generator().manual_seed(4))

    class Known(cnf.Hutchinson):
        def sample_noise(self, x, generator=None):
            return noise[GOOD]

    alone = cnf.CNF(flow.field, Known("gaussian", probes=2), steady(solver))
    ends = alone.inverse_and_log_det(x[GOOD], context[GOOD])
    for found, expected in zip((z, log_det), ends, strict=True):
        torch.testing.assert_close(found[GOOD], expected, rtol=1e-4, atol=1e-4)
    assert log_det[GOOD].std() > 0.1


def test_more_batch_dimensions_and_both_directions():
    flow = cnf.FFJORD(2, hidden=(8,), divergence="exact", solver=SOLVERS["shared"]).double()
    x = normal(4, 5, 2)
    expected = flow.log_prob(x, solver=Solver())
    assert torch.equal(flow.log_prob(x), expected)
    assert flow.sample((3,)).isfinite().all()


def test_a_row_of_the_caller_that_is_not_finite_is_still_refused():
    flow, x = flow_of("nan", SOLVERS["shared"]), normal(20, 2)
    x[4, 0] = torch.nan
    with pytest.raises(ValueError, match="non-finite"):
        flow.log_prob(x)
    found = flow.log_prob(x, on_nonfinite="nan")
    assert found.isnan().nonzero().flatten().tolist() == [4]
