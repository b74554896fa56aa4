"""The Pareto shape of weights: on draws of known shape, and against SciPy's likelihood fit."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from cnf.pareto import pareto_shape


def log_weights(k: float, *shape: int, seed: int = 0) -> Tensor:
    """log(1 + y) for y of a generalized Pareto distribution: its tail has the shape k anywhere."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(*shape, dtype=torch.float64, generator=generator)
    y = -u.log() if k == 0 else torch.expm1(-k * u.log()) / k
    return torch.log1p(y)


@pytest.mark.parametrize("k", [-0.4, 0.0, 0.3, 0.7, 1.0, 2.0])
def test_draws_of_a_known_shape_have_it(k: float) -> None:
    """Within the spread (1 + k) / sqrt(M) of a likelihood fit, and the pull of the weak prior."""
    found = pareto_shape(log_weights(k, 20_000, 50))
    n = math.ceil(3 * math.sqrt(20_000))
    expected, spread = (n * k + 5) / (n + 10), (1 + k) / math.sqrt(n)
    assert found.shape == (50,)
    assert abs(found.mean().item() - expected) < 4 * spread / math.sqrt(50) + 0.02
    assert found.std().item() == pytest.approx(spread, rel=0.4)


@pytest.mark.parametrize("k", [-0.2, 0.4, 1.1])
def test_the_fit_is_near_the_likelihoods_maximum(k: float) -> None:
    log_w = log_weights(k, 10_000, seed=3)
    n = 300
    w = log_w.exp().sort().values
    ml = stats.genpareto.fit((w[-n:] - w[-n - 1]).numpy(), floc=0)[0]
    assert pareto_shape(log_w).item() == pytest.approx((n * ml + 5) / (n + 10), abs=0.02)


def test_a_constant_does_not_matter_and_zero_weights_count() -> None:
    log_w = log_weights(0.6, 2000, 3)
    k = pareto_shape(log_w)
    torch.testing.assert_close(pareto_shape(log_w + 5000), k)
    torch.testing.assert_close(pareto_shape(log_w - 5000), k)
    torch.testing.assert_close(pareto_shape(log_w.flip(0).reshape(2000, 1, 3)), k[None])
    log_w[log_w.argsort(0)[:1000, 0], 0] = -math.inf  # the small half: the tail is the same
    torch.testing.assert_close(pareto_shape(log_w), k)


def test_what_has_no_tail_to_fit() -> None:
    assert pareto_shape(torch.zeros(100)) == -math.inf
    half = torch.zeros(100).masked_fill(torch.arange(100) < 50, -math.inf)
    assert pareto_shape(half) == -math.inf
    assert pareto_shape(torch.full((100,), -math.inf)).isnan()
    for count in (1, 2, 20):
        assert pareto_shape(torch.randn(count)).isnan()
    assert pareto_shape(torch.randn(25)).isfinite()
    few = torch.zeros(1000).masked_fill(torch.arange(1000) > 3, -math.inf)
    assert pareto_shape(few).isnan()
    assert pareto_shape(torch.randn(100, 0)).shape == (0,)
