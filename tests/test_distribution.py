"""A flow as a torch distribution: shapes, gradients, divergences, and use by other code."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
    kl_divergence,
)

import cnf

A = torch.tensor([[0.4, -0.7], [0.2, -0.5]])


class Shifted(nn.Module):
    """dx/dt = A x + context: a Gaussian with a known mean and covariance."""

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        dx = x @ A.T.to(x)
        return dx if context is None else dx + context


def gaussian(**choices) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(2), cnf.CNF(Shifted(), "exact"))


def truth(context: Tensor) -> MultivariateNormal:
    m = torch.linalg.matrix_exp(A)
    mean = context @ torch.linalg.solve(A, m - torch.eye(2)).T
    return MultivariateNormal(mean, m @ m.T)


@pytest.fixture
def context() -> Tensor:
    return torch.randn(4, 2)


def test_shapes(context: Tensor) -> None:
    q = gaussian().distribution(context)
    assert isinstance(q, Distribution)
    assert q.batch_shape == (4,)
    assert q.event_shape == (2,)
    assert q.has_rsample
    assert q.sample().shape == (4, 2)
    assert q.rsample((7, 3)).shape == (7, 3, 4, 2)
    assert q.log_prob(q.sample((7,))).shape == (7, 4)
    assert gaussian().distribution().batch_shape == ()


def test_density_and_samples_are_the_flows(context: Tensor) -> None:
    q, p = gaussian().distribution(context), truth(context)
    x = torch.randn(50, 4, 2)
    assert torch.allclose(q.log_prob(x), p.log_prob(x), atol=1e-3)
    samples = q.sample((20_000,))
    assert torch.allclose(samples.mean(0), p.mean, atol=4.5 * 1.6 / math.sqrt(20_000))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (7, 1, 2), (4, 2), (3, 7, 4, 2)], ids=str)
def test_log_prob_broadcasts_as_torchs_does(shape: tuple[int, ...], context: Tensor) -> None:
    x = torch.randn(shape)
    expected = truth(context).log_prob(x)
    log_prob = gaussian().distribution(context).log_prob(x)
    assert log_prob.shape == expected.shape
    assert torch.allclose(log_prob, expected, atol=1e-3)


def test_values_that_do_not_fit_are_refused(context: Tensor) -> None:
    q = gaussian().distribution(context)
    with pytest.raises(ValueError, match=r"value has shape \(7, 2\).*batch \(4,\).*event \(2,\)"):
        q.log_prob(torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        q.log_prob(torch.zeros(4, 3))


@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no-context"])
def test_expand(conditional: bool, context: Tensor) -> None:
    q = gaussian().distribution(context if conditional else None).expand((6, 4))
    assert q.batch_shape == (6, 4)
    x = q.rsample((3,))
    assert x.shape == (3, 6, 4, 2)
    expected = truth(context if conditional else torch.zeros(4, 2)).log_prob(x)
    assert q.log_prob(x).shape == (3, 6, 4)
    assert torch.allclose(q.log_prob(x), expected, atol=1e-3)
    assert not torch.allclose(x[:, 0], x[:, 1]), "an expanded batch holds independent samples"


def test_independent(context: Tensor) -> None:
    q = gaussian().distribution(context)
    wrapped = Independent(q, 1)
    assert wrapped.event_shape == (4, 2)
    x = wrapped.rsample((5,))
    assert torch.allclose(wrapped.log_prob(x), q.log_prob(x).sum(-1), atol=1e-5)


def test_as_the_base_of_a_transformed_distribution(context: Tensor) -> None:
    q = gaussian().distribution(context)
    moved = TransformedDistribution(q, [AffineTransform(1.0, 2.0)])
    assert (moved.batch_shape, moved.event_shape) == ((4,), (2,))
    x = moved.rsample((5,))
    expected = q.log_prob((x - 1) / 2) - 2 * math.log(2)
    assert torch.allclose(moved.log_prob(x), expected, atol=1e-5)
    assert moved.expand((3, 4)).rsample().shape == (3, 4, 2)


def test_the_support_is_all_of_space(context: Tensor) -> None:
    q = gaussian().distribution(context)
    assert q.support.event_dim == 1
    assert q.support.check(torch.randn(5, 4, 2)).shape == (5, 4)
    assert biject_to(q.support) is not None


def test_gradients_by_reparameterisation(context: Tensor) -> None:
    """E|x|^2 falls with the mean's distance, so its gradient in context is known."""
    context.requires_grad_()
    q = gaussian().distribution(context)
    q.rsample((4000,)).square().sum(-1).mean(0).sum().backward()
    found = context.grad.clone()
    (expected,) = torch.autograd.grad(truth(context).mean.square().sum(), context)
    assert torch.allclose(found, expected, atol=0.25)
    assert not q.sample().requires_grad


PAIRS = {
    "flow-normal": lambda q, p: (q, p),
    "normal-flow": lambda q, p: (p, q),
    "flow-flow": lambda q, p: (q, q),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no-context"])
def test_kl_divergence_in_both_directions(pair, conditional: bool, context: Tensor) -> None:
    """40 Monte Carlo estimates against the closed form for Gaussians, within 4.5 errors."""
    condition = context if conditional else torch.zeros(2)
    q = gaussian().distribution(context if conditional else None)
    p = MultivariateNormal(torch.tensor([0.3, -0.2]), torch.tensor([[1.5, 0.4], [0.4, 0.8]]))
    exact = kl_divergence(*pair(truth(condition), p))
    with torch.no_grad():
        estimates = torch.stack([kl_divergence(*pair(q, p)) for _ in range(40)])
    assert estimates.shape == (40, *exact.shape)
    error = 4.5 * estimates.std(0) / math.sqrt(40) + 1e-4
    assert ((estimates.mean(0) - exact).abs() <= error).all()


def test_the_gradient_of_kl_divergence_is_that_of_the_closed_form(context: Tensor) -> None:
    """Through the samples too: without them the gradient would be zero on average."""
    context.requires_grad_()
    p = MultivariateNormal(torch.zeros(2), torch.eye(2))
    q = gaussian().distribution(context.expand(16, 4, 2))
    kl_divergence(q, p).mean(0).sum().backward()
    found = context.grad.clone()
    (expected,) = torch.autograd.grad(kl_divergence(truth(context), p).sum(), context)
    assert expected.abs().max() > 0.3
    assert torch.allclose(found, expected, atol=0.15)


def test_kl_divergence_refuses_other_events() -> None:
    with pytest.raises(ValueError, match=r"event shapes \(2,\) and \(\)"):
        kl_divergence(gaussian().distribution(), Normal(0.0, 1.0))


def test_kl_divergence_of_other_distributions_is_as_before() -> None:
    gaussian().distribution()
    p, q = Normal(0.0, 1.0), Normal(1.0, 2.0)
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2) + 2 / 8 - 0.5)


def test_choices_hold_for_every_call(context: Tensor) -> None:
    flow = cnf.FFJORD(2, context=2)
    q = flow.distribution(context, divergence="exact", solver=cnf.Solver("rk4", steps=3))
    x = torch.randn(4, 2)
    with cnf.record_solves() as solves:
        assert torch.equal(q.log_prob(x), q.log_prob(x))
        q.expand((2, 4)).rsample()
    assert [(s.method, s.accepted) for s in solves] == [("rk4", 3)] * 3


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"]
)
def test_copies(duplicate, context: Tensor) -> None:
    q = gaussian().distribution(context)
    x = q.sample()
    assert torch.equal(duplicate(q).log_prob(x), q.log_prob(x))
