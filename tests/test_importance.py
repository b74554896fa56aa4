"""Importance sampling against known normalisers, and against the definitions by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cnf
from cnf.importance import ImportanceEstimate
from cnf.transforms import Compose, Diagonal, Interval

LOG_Z = 1.7


def log_density(x: Tensor) -> Tensor:
    """exp(1.7) N(x; 0.3, 0.8^2 I)."""
    z = (x - 0.3) / 0.8
    return LOG_Z - 0.5 * z.square().sum(-1) - x.shape[-1] * math.log(0.8 * math.sqrt(2 * math.pi))


def normal(d: int = 2) -> cnf.Flow:
    """The standard normal, with a transform that leaves it so."""
    return cnf.Flow(cnf.StandardNormal(d), Diagonal(d)).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_figure_by_hand():
    w = torch.tensor([1.0, 2, 4, 1, 0.5], dtype=torch.float64)
    estimate = ImportanceEstimate.of(w.log(), torch.zeros(5, 2))
    assert estimate.log_normalizer.item() == pytest.approx(math.log(8.5 / 5))
    assert estimate.effective_sample_size.item() == pytest.approx(8.5**2 / 22.25)
    assert estimate.stderr.item() == pytest.approx(w.std().item() / math.sqrt(5) / w.mean().item())
    assert estimate.free_energy.item() == pytest.approx(-w.log().mean().item())
    truth = w.log().std().item() / math.sqrt(5)
    assert estimate.free_energy_stderr.item() == pytest.approx(truth)
    torch.testing.assert_close(estimate.weights, w / 8.5)
    shifted = ImportanceEstimate.of(w.log() + 5000, torch.zeros(5, 2))  # exp would overflow
    assert shifted.log_normalizer.item() == pytest.approx(math.log(8.5 / 5) + 5000)
    torch.testing.assert_close(shifted.stderr, estimate.stderr)


def test_equal_weights_have_no_error():
    estimate = cnf.importance_sampling(normal(), lambda x: -x.square().sum(-1) / 2, 1000)
    assert estimate.log_normalizer.item() == pytest.approx(math.log(2 * math.pi))
    assert estimate.stderr.item() == pytest.approx(0, abs=1e-7)
    assert estimate.effective_sample_size.item() == pytest.approx(1000)
    assert estimate.free_energy.item() == pytest.approx(-math.log(2 * math.pi))


def test_a_known_normaliser_and_means_over_the_target():
    estimate = cnf.importance_sampling(normal(), log_density, 20_000, generator=seeded())
    assert abs(estimate.log_normalizer - LOG_Z) < 3 * estimate.stderr
    assert 0 < estimate.stderr < 0.01
    kl = 2 * (0.3**2 / 2 / 0.64 + 1 / 2 / 0.64 + math.log(0.8) - 0.5)
    off = estimate.free_energy - (kl - LOG_Z)
    assert abs(off) < 3 * estimate.free_energy_stderr
    # E_q[w^2] of Gaussians: ESS / S -> (E w)^2 / E w^2
    share = (2 / 0.8**2 - 1) ** 0.5 * 0.8**2 / math.exp(0.3**2 / (2 - 0.64))
    found = estimate.effective_sample_size.item() / 20_000
    assert found == pytest.approx(share**2, rel=0.02)
    mean = (estimate.weights[:, None] * estimate.samples).sum(0)
    torch.testing.assert_close(mean, torch.full((2,), 0.3).double(), atol=0.02, rtol=0)


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    runs = [cnf.importance_sampling(normal(), log_density, 500, generator=seeded(i))
            for i in range(200)]  # fmt: skip
    spread = torch.stack([run.log_normalizer for run in runs]).std().item()
    told = torch.stack([run.stderr for run in runs]).mean().item()
    assert told == pytest.approx(spread, rel=0.2)


def test_the_divergence_is_exact_whatever_the_flow_has():
    """The noise of Hutchinson's estimate would enter Z by the mean of its exponential."""
    torch.manual_seed(0)
    flow = cnf.FFJORD(2, (8,), divergence="hutchinson").double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))

    def itself(x: Tensor) -> Tensor:
        return flow.log_prob(x, divergence="exact", solver=tight)

    tight = cnf.Solver(rtol=1e-8, atol=1e-8)
    estimate = cnf.importance_sampling(flow, itself, 500, solver=tight, generator=seeded())
    assert estimate.log_weights.abs().max() < 1e-5
    assert not estimate.log_weights.requires_grad
    assert not estimate.samples.requires_grad


def test_conditions_have_estimates_of_their_own():
    torch.manual_seed(0)
    flow = cnf.RealNVP(2, layers=2, hidden=(8,), context=1).double()

    def conditional(x: Tensor, context: Tensor) -> Tensor:
        assert x.shape == (len(context), 2)
        return log_density(x) + context[:, 0]

    context = torch.tensor([[0.0], [1.0], [-2.0]]).double()
    estimate = cnf.importance_sampling(
        flow, conditional, 5000, context, batch_size=1500, generator=seeded()
    )
    assert estimate.samples.shape == (5000, 3, 2)
    for key in ("log_normalizer", "stderr", "effective_sample_size", "free_energy"):
        assert getattr(estimate, key).shape == (3,)
    truth = LOG_Z + context[:, 0]
    assert ((estimate.log_normalizer - truth).abs() < 3 * estimate.stderr).all()
    assert str(estimate).startswith("3 conditions")
    single = cnf.importance_sampling(flow, conditional, 5000, context[0], generator=seeded())
    assert single.log_normalizer.shape == ()


def test_weights_of_zero_count():
    """A flow on the line, a target on its half."""

    def half(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, -x[:, 0].square() / 2, -math.inf)

    estimate = cnf.importance_sampling(normal(1), half, 10_000, generator=seeded())
    truth = math.log(math.sqrt(2 * math.pi) / 2)
    assert abs(estimate.log_normalizer.item() - truth) < 3 * estimate.stderr.item()
    assert estimate.effective_sample_size.item() == pytest.approx(5000, abs=200)
    assert estimate.free_energy.item() == math.inf


def test_batches_and_dtypes():
    flow = normal().float()
    estimate = cnf.importance_sampling(flow, log_density, 25, batch_size=10, generator=seeded())
    assert estimate.log_weights.shape == (25,)
    assert estimate.log_weights.dtype == torch.float64
    assert estimate.samples.dtype == torch.float32
    truth = log_density(estimate.samples) - flow.log_prob(estimate.samples)
    torch.testing.assert_close(estimate.log_weights.float(), truth)


def test_the_summary():
    text = str(cnf.importance_sampling(normal(), log_density, 1000, generator=seeded()))
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "log normalizer", "free energy", "effective samples", "Pareto shape",
    ]  # fmt: skip
    assert " of 1000" in text
    assert "+-" in text


def test_few_effective_samples_are_told():
    def narrow(x: Tensor) -> Tensor:
        return -0.5 * ((x - 3) / 0.01).square().sum(-1)

    with pytest.warns(RuntimeWarning, match="effective sample size is .* of 2000: neither"):
        cnf.importance_sampling(normal(), narrow, 2000, generator=seeded())


@pytest.mark.parametrize(
    ("degrees", "d", "seed", "words"),
    [(3.0, 5, 0, "variance may be infinite"), (1.0, 2, 5, "no figure of this estimate")],
)
def test_heavy_tailed_weights_are_told(degrees, d, seed, words):
    """A normal flow under targets of heavier tails: the variance of the weights is infinite."""
    target = torch.distributions.StudentT(torch.tensor(degrees).double())
    with pytest.warns(RuntimeWarning, match=f"Pareto shape of .*{words}"):
        estimate = cnf.importance_sampling(
            normal(d), lambda x: target.log_prob(x).sum(-1), 1000, generator=seeded(seed)
        )
    assert estimate.pareto_shape > 0.5
    assert estimate.effective_sample_size > 20  # which tells nothing of it


def test_weights_of_light_tails_are_not_suspected():
    """Of a target narrower than the flow, whose weights are bounded; a warning is an error here."""
    for seed in range(20):
        estimate = cnf.importance_sampling(normal(), log_density, 100, generator=seeded(seed))
        assert estimate.pareto_shape < 0.5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: (f.transform, log_density, 10), TypeError, "flow must be a cnf.Flow"),
        (lambda f: (f, None, 10), TypeError, "log_density must be a function"),
        (lambda f: (f, log_density, 1), ValueError, "samples=1 must be 2 or more"),
        (lambda f: (f, log_density, 2.5), ValueError, "samples=2.5 must be a positive integer"),
        (lambda f: (f, lambda x: x, 10), ValueError, r"returned shape \(10, 2\)"),
        (lambda f: (f, lambda x: x[:, 0] / 0, 10), ValueError, "NaN or infinite at"),
        (lambda f: (f, lambda x: x[:, 0] * math.nan, 10), ValueError, "at 10 of 10 samples"),
        (lambda f: (f, lambda x: x[:, 0] * 0 - math.inf, 10), ValueError, "all 10 samples"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        cnf.importance_sampling(*call(normal()))


def test_other_bad_input():
    with pytest.raises(ValueError, match="batch_size=0"):
        cnf.importance_sampling(normal(), log_density, 10, batch_size=0)
    ends = Compose(cnf.Sigmoid(), cnf.UniformDequantization(4))
    with pytest.raises(TypeError, match="flow is of integers"):
        cnf.importance_sampling(cnf.Flow(cnf.StandardNormal(2), ends), log_density, 10)


def test_a_bounded_target():
    """The area under the strip's density, by a flow of its support."""
    flow = cnf.Flow(cnf.StandardNormal(1), Compose(Diagonal(1), Interval(-4, 4))).double()
    with pytest.warns(RuntimeWarning, match="Pareto shape"):  # the variance is infinite
        estimate = cnf.importance_sampling(flow, lambda x: 0 * x[:, 0], 20_000, generator=seeded())
    assert abs(estimate.log_normalizer.item() - math.log(8)) < 3 * estimate.stderr.item()
