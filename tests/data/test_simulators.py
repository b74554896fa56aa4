"""Simulators: posteriors against brute force, Bayes' rule by weights, and their own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cnf.data import LinearGaussian, TwoMoons
from cnf.data.two_moons import _explained

PROBLEMS = {"linear-gaussian": LinearGaussian.random(3, 2, seed=1), "two-moons": TwoMoons()}
OBSERVED = {  # what is special about it
    "whole": (-0.3, 0.2),
    "moons that touch": (0.3, -0.05),
    "cut by a corner": (-1.1, 0.05),
    "cut by a side": (-0.4, 0.8),
    "cut twice": (-1.04, -0.1),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def problem(request):
    return request.param


def test_shapes_and_dtypes(problem):
    d, k = problem.features, problem.context
    for dtype in (torch.float32, torch.float64):
        x, c = problem.sample(12, generator(), dtype=dtype)
        assert (x.shape, c.shape, x.dtype, c.dtype) == ((12, d), (12, k), dtype, dtype)
        grid = c.reshape(3, 4, k)
        draws = problem.posterior_sample(grid, 5, generator())
        assert draws.shape == (5, 3, 4, d)
        assert draws.dtype == dtype
        log_prob = problem.posterior_log_prob(draws, grid)
        assert log_prob.shape == (5, 3, 4)
        assert log_prob.isfinite().all()
        one = problem.posterior_log_prob(draws[0, 0, 0], grid[0, 0])
        torch.testing.assert_close(one, log_prob[0, 0, 0], rtol=1e-4, atol=1e-4)
    none, observed = problem.sample(0)
    assert problem.posterior_log_prob(none, observed).shape == (0,)
    assert problem.posterior_sample(observed, 3).shape == (3, 0, d)
    assert problem.posterior_sample(c, 0).shape == (0, 12, d)


def test_a_seed_repeats_a_draw_and_the_global_generator_is_left_alone(problem):
    before = torch.get_rng_state()
    x, c = problem.sample(7, generator(3))
    again = problem.sample(7, generator(3))
    assert torch.equal(x, again[0])
    assert torch.equal(c, again[1])
    draws = [problem.posterior_sample(c, 4, generator(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(problem.sample(7)[0], problem.sample(7)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_joint_is_that_of_posterior_draws_for_simulated_observations(problem):
    """(x, c) and (x', c) with x' from the posterior have one distribution: by its density's rank.

    The rank of log p(x | c) among posterior draws is uniform.
    """
    x, c = problem.sample(2000, generator(1), dtype=torch.float64)
    if problem.name == "two-moons":  # a few take long
        kept = _explained(c) > 0.02
        x, c = x[kept], c[kept]
    own = problem.posterior_log_prob(x, c)
    draws = problem.posterior_log_prob(problem.posterior_sample(c, 99, generator(2)), c)
    ranks = (draws < own).sum(0)
    assert stats.chisquare(np.bincount(ranks // 5, minlength=20)).pvalue > 1e-3


def test_linear_gaussian_is_bayes_rule():
    """The posterior is prior times likelihood over evidence, all by torch's own densities."""
    problem = PROBLEMS["linear-gaussian"]
    x, c = problem.sample(50, generator(), dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    eye = torch.eye(3).double()
    prior = normal(torch.zeros(3).double(), eye).log_prob(x)
    a, noise = problem.matrix, problem.noise**2 * torch.eye(2).double()
    likelihood = normal(x @ a.T, noise).log_prob(c)
    evidence = normal(torch.zeros(2).double(), a @ a.T + noise).log_prob(c)
    got = problem.posterior_log_prob(x, c)
    torch.testing.assert_close(got, prior + likelihood - evidence, rtol=0, atol=1e-12)


def test_linear_gaussian_samples_have_its_moments_and_entropy():
    problem = PROBLEMS["linear-gaussian"]
    n, c = 200_000, torch.tensor([0.7, -1.2], dtype=torch.float64)
    x = problem.posterior_sample(c, n, generator())
    sd = problem.posterior_covariance.diagonal().sqrt()
    assert ((x.mean(0) - problem.posterior_mean(c)) / sd).abs().max() < 4.5 / math.sqrt(n)
    torch.testing.assert_close(x.T.cov(), problem.posterior_covariance, rtol=0, atol=0.01)
    nats = -problem.posterior_log_prob(x, c)
    error = (nats.mean() - problem.posterior_entropy) / (nats.std() / math.sqrt(n))
    assert abs(float(error)) < 4.5


def test_linear_gaussian_pairs_follow_the_simulator():
    problem = PROBLEMS["linear-gaussian"]
    x, c = problem.sample(200_000, generator(), dtype=torch.float64)
    a = problem.matrix
    joint = torch.cat((x, c), 1).T.cov()
    truth = torch.cat(
        (
            torch.cat((torch.eye(3).double(), a.T), 1),
            torch.cat((a, a @ a.T + problem.noise**2 * torch.eye(2).double()), 1),
        )
    )
    torch.testing.assert_close(joint, truth, rtol=0, atol=0.03)


def test_linear_gaussian_by_weights():
    """Prior draws weighted by the likelihood have the posterior's mean."""
    problem, c = PROBLEMS["linear-gaussian"], torch.tensor([0.7, -0.4], dtype=torch.float64)
    x, _ = problem.sample(400_000, generator(), dtype=torch.float64)
    weights = (-0.5 * ((c - x @ problem.matrix.T) / problem.noise).square().sum(-1)).softmax(0)
    torch.testing.assert_close(weights @ x, problem.posterior_mean(c), rtol=0, atol=0.01)


def test_a_random_linear_gaussian_is_that_of_its_seed():
    one, same, other = (LinearGaussian.random(seed=s).matrix for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_two_moons_is_the_benchmark_s_simulator():
    """Turned by -pi/4 as the benchmark writes it, what is left is the crescent."""
    x, c = TwoMoons().sample(100_000, generator(), dtype=torch.float64)
    assert x.abs().max() <= 1
    turn = torch.tensor(-math.pi / 4, dtype=torch.float64)
    z0 = turn.cos() * x[:, 0] - turn.sin() * x[:, 1]
    z1 = turn.sin() * x[:, 0] + turn.cos() * x[:, 1]
    p = c - torch.stack((-z0.abs(), z1), -1) - torch.tensor([0.25, 0.0])
    r, a = p.norm(dim=-1), torch.atan2(p[:, 1], p[:, 0])
    assert stats.kstest(r.numpy(), stats.norm(0.1, 0.01).cdf).pvalue > 1e-3
    assert stats.kstest(a.numpy(), stats.uniform(-math.pi / 2, math.pi).cdf).pvalue > 1e-3
    assert stats.kstest(x.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(torch.cat((x, p), 1).T)[:2, 2:]).max() < 0.02


@pytest.mark.parametrize("c", OBSERVED.values(), ids=OBSERVED)
def test_two_moons_posterior_is_normalised_and_sampled(c):
    """On a fine grid it sums to 1, and draws are in its coarse cells as often as it says."""
    problem, c = TwoMoons(), torch.tensor(c, dtype=torch.float64)
    side, cell, n = 3200, 80, 50_000
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    mass = torch.zeros(side, side, dtype=torch.float64)
    for i in range(0, side, 400):
        points = torch.cartesian_prod(line[i : i + 400], line)
        density = problem.posterior_log_prob(points, c).exp() * (2 / side) ** 2
        mass[i : i + 400] = density.reshape(400, side)
    assert float(mass.sum()) == pytest.approx(1, abs=5e-3)  # of the ends of the crescents
    blocks = mass.reshape(side // cell, cell, side // cell, cell).sum((1, 3)).numpy() * n
    x = problem.posterior_sample(c, n, generator(1)).numpy()
    seen = np.histogram2d(x[:, 0], x[:, 1], bins=side // cell, range=[[-1, 1]] * 2)[0]
    full = blocks > 10
    expected = np.append(blocks[full], n - blocks[full].sum())
    counts = np.append(seen[full], n - seen[full].sum())
    kept = expected > 10
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert stats.chi2.sf(statistic, kept.sum() - 1) > 1e-3


@pytest.mark.parametrize("c", OBSERVED.values(), ids=OBSERVED)
def test_two_moons_share_that_explains_an_observation_by_counting(c):
    n, c = 1_000_000, torch.tensor(c, dtype=torch.float64)
    x = torch.zeros(n, 2, dtype=torch.float64)  # the simulator at 0 draws p
    p = TwoMoons().sample(n, generator(), dtype=torch.float64)
    del x
    s = (p[0][:, 0] + p[0][:, 1]).abs() / math.sqrt(2)
    d = (p[0][:, 1] - p[0][:, 0]) / math.sqrt(2)
    crescent = p[1] - torch.stack((-s, d), -1)
    length = crescent[:, 0] - c[0]
    inside = (length >= 0) & (length + (c[1] - crescent[:, 1]).abs() <= math.sqrt(2))
    share = inside.double().mean()
    error = math.sqrt(share * (1 - share) / n)
    assert abs(float(_explained(c[None])[0] - share)) < 4.5 * error + 1e-4


def test_two_moons_by_simulations_that_come_near():
    """Parameters whose simulated observation comes near c have the posterior's moments."""
    problem, c = TwoMoons(), torch.tensor([-0.4, 0.8])
    near = []
    for seed in range(8):
        x, simulated = problem.sample(1_000_000, generator(seed))
        near.append(x[(simulated - c).abs().amax(-1) < 0.02])
    found = torch.cat(near)
    exact = problem.posterior_sample(c, 100_000, generator())
    for statistic in (lambda x: x, torch.abs, torch.square, lambda x: x.prod(-1)):
        a, b = statistic(found), statistic(exact)
        error = a.std(0) / math.sqrt(len(a)) + 2e-3  # of sampling, and of coming near only
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all()


def test_two_moons_gradient_is_that_of_its_density():
    problem, c = TwoMoons(), torch.tensor([-0.3, 0.2], dtype=torch.float64)
    x = problem.posterior_sample(c, 20, generator()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: problem.posterior_log_prob(x, c), (x,))
    outside = torch.full((1, 2), 1.5).requires_grad_()
    value = problem.posterior_log_prob(outside, c.float())
    assert value.item() == -math.inf


@pytest.mark.parametrize("c", [(0.6, 0.0), (-2.0, 0.0), (0.0, 3.0), (0.39, 0.0)])
def test_an_observation_that_cannot_be_is_refused(c):
    rows = torch.tensor([(-0.3, 0.2), c])
    with pytest.raises(ValueError, match=r"1 of 2 rows.*first index 1.*sample\(\)"):
        TwoMoons().posterior_sample(rows, 3)


def test_the_density_of_an_impossible_observation_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        TwoMoons().posterior_log_prob(torch.zeros(2), torch.tensor([0.6, 0.0]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p, c: p.sample(-1), ValueError, "n must be 0 or more"),
        (lambda p, c: p.sample(2.0), TypeError, "n must be an integer"),
        (lambda p, c: p.sample(2, dtype=torch.float16), TypeError, "float16"),
        (lambda p, c: p.sample(2, 7), TypeError, "torch.Generator"),
        (lambda p, c: p.sample(2, torch.Generator(), device="meta"), ValueError, "generator is on"),
        (lambda p, c: p.posterior_sample(c, -1), ValueError, "n must be 0 or more"),
        (lambda p, c: p.posterior_sample(c.tolist(), 1), TypeError, "as_tensor"),
        (lambda p, c: p.posterior_sample(c.half(), 1), TypeError, "float16"),
        (lambda p, c: p.posterior_sample(c[:, :1], 1), ValueError, r"\(5, 1\)"),
        (lambda p, c: p.posterior_sample(c * math.nan, 1), ValueError, "5 of 5 rows"),
        (lambda p, c: p.posterior_log_prob(c[:, :1], c), ValueError, r"x has shape \(5, 1\)"),
        (
            lambda p, c: p.posterior_log_prob(torch.zeros(4, p.features), c),
            ValueError,
            "do not broadcast",
        ),
    ],
)
def test_bad_input_is_told(problem, call, error, words):
    with pytest.raises(error, match=words):
        call(problem, problem.sample(5)[1])


@pytest.mark.parametrize(
    ("matrix", "noise", "error", "words"),
    [
        ([[1.0]], 1.0, TypeError, "matrix"),
        (torch.ones(2), 1.0, ValueError, r"\(2,\)"),
        (torch.ones(2, 0), 1.0, ValueError, r"\(2, 0\)"),
        (torch.full((1, 1), math.inf), 1.0, ValueError, "finite"),
        (torch.ones(1, 1), 0.0, ValueError, "noise=0.0"),
        (torch.ones(1, 1), "1", TypeError, "noise='1'"),
    ],
)
def test_a_wrong_linear_gaussian_is_told(matrix, noise, error, words):
    with pytest.raises(error, match=words):
        LinearGaussian(matrix, noise)
