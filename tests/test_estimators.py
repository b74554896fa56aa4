"""The estimators of the divergence, and the standard error of a log-density, against theory."""

from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf import Exact, Hutchinson, HutchPlusPlus

DRAWS = 100_000
D = 6
T = torch.tensor(0.3, dtype=torch.float64)


def matrix(seed=0, dims=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dims, dims, dtype=torch.float64, generator=generator)


def draws(estimate, a, number=DRAWS, seed=1):
    """Estimates of tr A, one for each row of a batch (number,)."""
    x = torch.zeros(number, len(a), dtype=torch.float64)
    noise = estimate.sample_noise(x, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return estimate(lambda t, x, c: x @ a.T, T, x, None, noise)[1]


ESTIMATORS = {
    "rademacher": Hutchinson(),
    "gaussian": Hutchinson("gaussian"),
    "orthogonal": Hutchinson("orthogonal"),
    "orthogonal, 3": Hutchinson("orthogonal", 3),
    "orthogonal, 8 in 6 dimensions": Hutchinson("orthogonal", 8),
    "hutch++": HutchPlusPlus(2, 1),
    "hutch++, 3": HutchPlusPlus(1, 3),
}


@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
def test_estimates_are_unbiased(estimate):
    a = matrix()
    found = draws(estimate, a)
    z = (found.mean() - a.trace()) / (found.std() / math.sqrt(DRAWS))
    assert abs(z) < 4.5
    assert found.std() > 0.1


def test_the_variance_of_an_orthogonal_probe():
    """2 D / (D + 2) (||S||_F^2 - tr^2 / D), of e uniform on the sphere of radius sqrt(D)."""
    a = matrix()
    s = (a + a.T) / 2
    theory = 2 * D / (D + 2) * (s.square().sum() - s.trace() ** 2 / D)
    assert draws(Hutchinson("orthogonal"), a).var() / theory == pytest.approx(1, abs=0.05)


def test_orthogonal_probes_are_better_together():
    """Three of them beat three independent ones; as many as dimensions are exact."""
    a = matrix()
    alone = draws(Hutchinson("orthogonal"), a).var()
    assert draws(Hutchinson("orthogonal", 3), a).var() < 0.8 * alone / 3
    exact = draws(Hutchinson("orthogonal", D), a, number=100)
    torch.testing.assert_close(exact, a.trace().expand(100))


def test_orthogonal_probes_are_orthogonal():
    x = torch.zeros(50, 2, 3, dtype=torch.float64)
    e = Hutchinson("orthogonal", 8).sample_noise(x)
    assert e.shape == (50, 8, 2, 3)
    first, second = e.flatten(2).split(6, 1)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(first @ first.mT, (6 * identity).expand(50, 6, 6))
    torch.testing.assert_close(second @ second.mT, (6 * identity[:2, :2]).expand(50, 2, 2))


def low_rank(dims=24):
    """A Jacobian of three large directions and a small rest."""
    left, right = matrix(1, dims)[:, :3], matrix(2, dims)[:, :3]
    return left @ right.T + 0.02 * matrix(3, dims)


def test_hutch_plus_plus_beats_hutchinson_where_few_directions_dominate():
    """At equal products, 2 r + k: the variance is far below."""
    a = low_rank()
    ours, theirs = draws(HutchPlusPlus(4, 4), a, 4000), draws(Hutchinson(probes=12), a, 4000)
    assert ours.var() < 0.01 * theirs.var()
    assert abs((ours.mean() - a.trace()) / (ours.std() / math.sqrt(4000))) < 4.5


def test_hutch_plus_plus_of_full_rank_is_exact():
    a = matrix()
    found = draws(HutchPlusPlus(D, 1), a, number=50)
    torch.testing.assert_close(found, a.trace().expand(50))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_hutch_plus_plus_of_a_jacobian_of_small_rank(rank):
    """QR alone would have no derivative here."""
    factor = matrix()[:, :rank].clone().requires_grad_()
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    estimate = HutchPlusPlus(3, 2)
    noise = estimate.sample_noise(x)

    def div():
        return estimate(lambda t, x, c: x.sin() @ factor @ factor.T, T, x, None, noise)[1]

    truth = Exact()(lambda t, x, c: x.sin() @ factor @ factor.T, T, x)[1]
    torch.testing.assert_close(div(), truth, rtol=1e-4, atol=1e-6)
    for g in torch.autograd.grad(div().sum(), [x, factor], allow_unused=rank == 0):
        assert g is None or bool(g.isfinite().all())
    if rank:
        (g,) = torch.autograd.grad(div().sum(), factor)
        v, h = torch.randn_like(factor), 1e-5
        with torch.no_grad():
            up, down = (factor.add_(s * v) is None or div().sum() for s in (h, -2 * h))
        assert (g * v).sum() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-5)


def test_hutch_plus_plus_of_a_rank_above_the_dimension_is_refused():
    with pytest.raises(ValueError, match=r"rank=4 must be at most D=3; use cnf\.Exact"):
        cnf.FFJORD(3).log_prob(torch.randn(2, 3), divergence=HutchPlusPlus())


# ---------------------------------------------------------------- standard errors


def linear_flow(dims=D):
    a = 0.3 * matrix(dims=dims)
    return cnf.Flow(cnf.StandardNormal(dims), cnf.CNF(lambda t, x: x @ a.T, "exact")).double()


@pytest.mark.parametrize(
    "estimate",
    [Hutchinson(probes=64), Hutchinson("gaussian", 64), HutchPlusPlus(2, 64)],
    ids=["rademacher", "gaussian", "hutch++"],
)
def test_standard_errors_are_calibrated(estimate):
    """(estimate - exact) / stderr over 500 points: mean 0, variance that of Student's t."""
    flow, n, k = linear_flow(), 500, 64
    x = torch.randn(n, D, dtype=torch.float64)
    log_prob, stderr = flow.log_prob(x, divergence=estimate, return_stderr=True)
    z = (log_prob - flow.log_prob(x)) / stderr
    assert abs(z.mean()) * math.sqrt(n) < 4.5
    variance = (k - 1) / (k - 3)
    assert abs(z.var() / variance - 1) < 4.5 * math.sqrt(3 / n)  # wider than a normal's sqrt(2/n)


def test_standard_errors_of_a_network_in_several_blocks():
    """Over 500 points, by vector-Jacobian products and in closed form; variances add up."""
    torch.manual_seed(3)
    flow = cnf.FFJORD(4, (16,), blocks=2).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.7)
    x = torch.randn(500, 4, dtype=torch.float64)
    with torch.no_grad():
        truth = flow.log_prob(x, divergence="exact")
        log_prob, stderr = flow.log_prob(x, divergence=Hutchinson(probes=64), return_stderr=True)
        z = (log_prob - truth) / stderr
        assert stderr.min() > 1e-3
        assert 0.8 < z.std() < 1.2
        assert abs(z.mean()) * math.sqrt(500) < 4.5
        parts: list[torch.Tensor] = []
        first = flow.transform.transforms[0]
        first.forward_and_log_det(x, divergence=Hutchinson(probes=4), variances=parts)
    assert [p.shape for p in parts] == [(500,)]


def test_the_estimate_is_the_one_without_a_standard_error():
    """The same noise, steps and value, to the rounding; and probes' own spread out of the norm."""
    flow = cnf.FFJORD(3, (8,)).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    found = []
    for return_stderr in (False, True):
        with cnf.record_solves() as solves:
            value = flow.log_prob(
                x,
                divergence=Hutchinson(probes=3),
                generator=torch.Generator().manual_seed(0),
                return_stderr=return_stderr,
            )
        found.append((value, solves[0].nfe))
    (plain, nfe), ((log_prob, stderr), nfe_too) = found
    torch.testing.assert_close(plain, log_prob, rtol=1e-12, atol=1e-12)
    assert nfe == nfe_too
    assert stderr.shape == (7, 2)
    assert not stderr.requires_grad
    assert log_prob.requires_grad


@pytest.mark.parametrize("batch", ["shared", "independent"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_standard_error_in_every_mode(gradient, batch):
    flow = cnf.FFJORD(3, (8,), solver=cnf.Solver(gradient=gradient, batch=batch)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    log_prob, stderr = flow.log_prob(x, divergence=Hutchinson(probes=3), return_stderr=True)
    log_prob.sum().backward()
    assert bool((stderr > 0).all())
    assert all(p.grad is not None for p in flow.parameters())


def test_standard_errors_of_rows_that_are_not_finite():
    flow, x = linear_flow(), torch.randn(4, D, dtype=torch.float64)
    x[1, 2] = torch.nan
    log_prob, stderr = flow.log_prob(
        x, divergence=Hutchinson(probes=4), return_stderr=True, on_nonfinite="nan"
    )
    assert log_prob.isnan().tolist() == stderr.isnan().tolist() == [False, True, False, False]


def test_an_exact_density_has_no_standard_error():
    log_prob, stderr = linear_flow().log_prob(
        torch.randn(4, D, dtype=torch.float64), return_stderr=True
    )
    assert torch.equal(stderr, torch.zeros_like(log_prob))


class Own(cnf.Divergence):
    def sample_noise(self, x, generator=None):
        return Hutchinson().sample_noise(x, generator)

    def __call__(self, field, t, x, context=None, noise=None, constants=None):
        return Hutchinson()(field, t, x, context, noise)


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (Hutchinson(), r"at least two probes, got probes=1; use Hutchinson\(probes=16\)"),
        (HutchPlusPlus(1, 1), "at least two probes, got probes=1"),
        (Hutchinson("orthogonal", 4), "orthogonal probes are not independent.*rademacher"),
        (Own(), r"an Estimator, got Own; use cnf\.Hutchinson"),
    ],
    ids=["one probe", "hutch++", "orthogonal", "own"],
)
def test_standard_errors_that_there_are_not(divergence, message):
    with pytest.raises(ValueError, match=message):
        linear_flow().log_prob(
            torch.randn(4, D, dtype=torch.float64), divergence=divergence, return_stderr=True
        )
