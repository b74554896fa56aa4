"""torch.func over a flow: vmap, grad, Jacobians, Hessians and ensembles, with every solver."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import cnf

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # jacfwd's

A = torch.tensor([[0.3, -0.8], [0.5, -0.2]], dtype=torch.float64)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SOLVERS = {
    "dopri5": cnf.Solver(**TIGHT),
    "dopri8": cnf.Solver("dopri8", **TIGHT),
    "rk4": cnf.Solver("rk4", steps=40),
    "rk4, independent": cnf.Solver("rk4", steps=40, batch="independent"),
    "compiled": cnf.Solver(compile=True, **TIGHT),
}


class Affine(nn.Module):
    """f = A x, without a closed form: its trace takes products."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(A.clone())

    def forward(self, t, x):
        return x @ self.a.T


def affine(solver: cnf.Solver) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(2), cnf.CNF(Affine(), "exact", solver)).double()


def deep(solver: cnf.Solver) -> cnf.Flow:
    """Three hidden layers, which have no closed form of the trace."""
    return cnf.FFJORD(2, hidden=(8, 8, 8), divergence="exact", solver=solver).double()


def data(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 2, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_gaussian_has_its_density_score_and_curvature(solver: cnf.Solver) -> None:
    flow, x = affine(solver), data()
    scale = torch.linalg.matrix_exp(A)
    truth = torch.distributions.MultivariateNormal(torch.zeros(2).to(A), scale @ scale.T)
    precision = truth.precision_matrix

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        return flow.log_prob(x[None])[0]

    found = {
        "log_prob": (vmap(log_prob)(x), truth.log_prob(x)),
        "score": (vmap(grad(log_prob))(x), -x @ precision),
        "jacrev": (jacrev(flow.log_prob)(x).diagonal(dim1=0, dim2=1).T, -x @ precision),
        "jacfwd": (jacfwd(flow.log_prob)(x).diagonal(dim1=0, dim2=1).T, -x @ precision),
        "hessian": (vmap(hessian(log_prob))(x), -precision.expand(4, 2, 2)),
        "nested": (vmap(vmap(log_prob))(x.reshape(2, 2, 2)).flatten(), truth.log_prob(x)),
        "samples": (vmap(lambda z: flow.transform(z[None])[0])(x), x @ scale.T),
    }
    for name, (value, expected) in found.items():
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [affine, deep])
def test_an_ensemble_of_stacked_parameters_is_that_of_a_loop(make) -> None:
    flows = [make(cnf.Solver(**TIGHT)) for _ in range(3)]
    for flow in flows:
        for parameter in flow.parameters():
            nn.init.normal_(parameter, 0.0, 0.4)
    stacked = {
        name: torch.stack([dict(f.named_parameters())[name] for f in flows]).detach()
        for name, _ in flows[0].named_parameters()
    }
    x = data()

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(flows[0], parameters, (x,)).mean()

    gradients = vmap(grad(loss))(stacked)
    values = vmap(lambda p: functional_call(flows[0], p, (x,)))(stacked)
    for i, flow in enumerate(flows):
        flow.log_prob(x).mean().backward()
        torch.testing.assert_close(values[i], flow.log_prob(x), rtol=1e-6, atol=1e-6)
        for name, parameter in flow.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, rtol=1e-5, atol=1e-6)


def test_mapped_samples_take_the_steps_of_a_batch() -> None:
    flow, x = deep(cnf.Solver()), data()
    with cnf.record_solves() as batch:
        expected = flow.log_prob(x)
    with cnf.record_solves() as mapped:
        found = vmap(lambda x: flow.log_prob(x[None])[0])(x)
    assert (mapped[0].nfe, mapped[0].accepted) == (batch[0].nfe, batch[0].accepted)
    torch.testing.assert_close(found, expected)


REFUSED = {
    "checkpoint": cnf.Solver(gradient="checkpoint"),
    "adjoint": cnf.Solver("rk4", gradient="adjoint"),
    "independent": cnf.Solver(batch="independent"),
    "nan": cnf.Solver(on_failure="nan"),
    "TorchDiffEq": cnf.TorchDiffEq(),
}


@pytest.mark.parametrize(("word", "solver"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_mapped_is_refused_at_once(word: str, solver) -> None:
    flow, x = deep(solver), data()
    remedy = r"gradient='backprop'|Solver\('rk4', steps=\.\.\.\)"
    with cnf.record_solves() as solves, pytest.raises(ValueError, match=remedy) as caught:
        vmap(grad(lambda x: flow.log_prob(x[None])[0]))(x)
    assert word in str(caught.value)
    assert not solves


@pytest.mark.parametrize("choice", [{"batch": "independent"}, {"on_failure": "nan"}])
def test_derivatives_without_vmap_know_the_samples(choice) -> None:
    flow, x = deep(dataclasses.replace(cnf.Solver(), **choice)), data()
    for derivative in (jacrev, jacfwd):
        found = derivative(flow.log_prob)(x).diagonal(dim1=0, dim2=1).T
        torch.testing.assert_close(found, flow.score(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [cnf.Solver(), cnf.Solver("rk4")], ids=["dopri5", "rk4"])
def test_a_failure_under_vmap_says_so(solver: cnf.Solver) -> None:
    explodes = cnf.CNF(lambda t, x: 50 * x**3, "exact", solver)
    with pytest.raises(cnf.SolverError, match=r"torch\.func\.vmap hides") as caught:
        vmap(lambda x: explodes.forward(x[None])[0])(torch.tensor([[0.0], [2.0]]))
    assert caught.value.samples == ()


def test_fixed_steps_give_nan_to_the_mapped_sample_that_fails() -> None:
    explodes = cnf.CNF(lambda t, x: 50 * x**3, "exact", cnf.Solver("rk4", on_failure="nan"))
    found = vmap(lambda x: explodes.forward(x[None])[0])(torch.tensor([[0.0], [2.0]]))
    assert found[0] == 0
    assert found[1].isnan()


def test_noise_under_vmap_names_the_choice_that_it_needs() -> None:
    flow, x = deep(cnf.Solver()), data()

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        return flow.log_prob(x[None], divergence="hutchinson")[0]

    with pytest.raises(RuntimeError, match=r"randomness='different'"):
        vmap(log_prob)(x)
    assert vmap(log_prob, randomness="different")(x).isfinite().all()


def test_anomaly_detection_finds_nothing_in_a_correct_flow() -> None:
    """A trial of a batched backward pass, which anomaly detection stops, would be reported."""
    flow, x = deep(cnf.Solver()), data()
    expected = flow.log_prob(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True):
            found = flow.log_prob(x)
            found.sum().backward()
    assert not [w for w in caught if "Error detected" in str(w.message)]
    assert torch.equal(found, expected)
