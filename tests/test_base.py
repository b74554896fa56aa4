"""Base densities against torch.distributions, and their state, dtype and randomness."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
from scipy import stats
from torch.distributions import (
    AffineTransform,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    StudentT,
    TransformedDistribution,
    VonMises,
)

import cnf
from cnf.base import DistributionBase, as_base


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


zeros, ones = torch.zeros(2), torch.ones(2)
DISTRIBUTIONS: dict[str, Distribution] = {
    "laplace": Independent(Laplace(zeros, ones), 1),
    "student": Independent(StudentT(3 * ones), 1),
    "full-normal": MultivariateNormal(zeros, torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "low-rank-normal": LowRankMultivariateNormal(zeros, torch.ones(2, 1), ones),
    "mixture": MixtureSameFamily(
        Categorical(torch.ones(3)), Independent(Normal(torch.arange(6.0).view(3, 2), 1.0), 1)
    ),
    "logistic-normal": TransformedDistribution(
        Independent(Normal(zeros, ones), 1), [SigmoidTransform()]
    ),
    "dirichlet": Dirichlet(ones),
    "scalar": Normal(0.0, 1.0),
    "circle": VonMises(torch.tensor(0.0), torch.tensor(1.0)),
}
each_distribution = pytest.mark.parametrize(
    "distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS
)
each_event = pytest.mark.parametrize("event", [(), (1,), (5,), (3, 4, 4)], ids=str)


@each_event
@pytest.mark.parametrize("batch", [(), (7,), (0,), (2, 3)], ids=str)
def test_standard_normal_is_torchs(event: tuple[int, ...], batch: tuple[int, ...]) -> None:
    base = cnf.StandardNormal(*event).double()
    z = torch.randn((*batch, *event), dtype=torch.float64)
    truth = Normal(0.0, 1.0).log_prob(z)
    truth = truth.reshape(*batch, math.prod(event)).sum(-1)
    assert base.log_prob(z).shape == batch
    assert torch.allclose(base.log_prob(z), truth, rtol=1e-13, atol=1e-13)


@each_event
def test_standard_normal_samples(event: tuple[int, ...]) -> None:
    z = cnf.StandardNormal(*event).rsample((4000,), seeded())
    assert z.shape == (4000, *event)
    assert z.mean().abs() < 4.5 / math.sqrt(z.numel())
    assert (z.square().mean() - 1).abs() < 4.5 * math.sqrt(2 / z.numel())


def test_standard_normal_moves_and_has_no_state() -> None:
    base = cnf.StandardNormal(2)
    assert base.double().rsample((3,)).dtype == torch.float64
    assert base.to("meta").rsample((3,)).device.type == "meta"
    assert not base.state_dict()
    assert not list(base.parameters())


@pytest.mark.parametrize("name", ["standard-normal", *DISTRIBUTIONS])
def test_a_generator_fixes_the_draw_and_leaves_the_global_one_alone(name: str) -> None:
    base = cnf.StandardNormal(2) if name == "standard-normal" else as_base(DISTRIBUTIONS[name])
    state = torch.get_rng_state()
    one, two, other = (base.rsample((4,), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    generator = seeded()
    assert not torch.equal(base.rsample((4,), generator), base.rsample((4,), generator))


@each_distribution
def test_draws_in_threads_are_those_of_their_generators(distribution: Distribution) -> None:
    """Also while others draw from the global generator, which is left alone."""
    base, seeds, rounds = as_base(distribution), range(4), 20
    alone = [base.rsample((4,), seeded(seed)) for seed in seeds]
    same: dict[int, bool] = {}

    def work(seed: int) -> None:
        same[seed] = True
        for _ in range(rounds):
            torch.rand(3)
            same[seed] &= torch.equal(base.rsample((4,), seeded(seed)), alone[seed])

    torch.manual_seed(5)
    expected = [torch.rand(3) for _ in range(rounds * len(seeds) + 1)][-1]
    torch.manual_seed(5)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == dict.fromkeys(seeds, True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["standard-normal", *DISTRIBUTIONS])
def test_without_a_generator_the_global_one_is_used(name: str) -> None:
    base = cnf.StandardNormal(2) if name == "standard-normal" else as_base(DISTRIBUTIONS[name])
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(base.rsample((4,)))
    assert torch.equal(*draws)
    assert not torch.equal(base.rsample((4,)), draws[0])


@each_distribution
def test_a_torch_distribution_is_kept_as_it_is(distribution: Distribution) -> None:
    base = DistributionBase(distribution)
    z = distribution.sample((5,))
    assert base.event_shape == tuple(distribution.event_shape)
    assert torch.equal(base.log_prob(z), distribution.log_prob(z))
    assert base.rsample((2, 3)).shape == (2, 3, *base.event_shape)


@each_distribution
def test_a_torch_distribution_converts_with_the_module(distribution: Distribution) -> None:
    before = distribution.sample((5,))
    base = DistributionBase(distribution).double()
    z = base.rsample((5,), seeded())
    assert z.dtype == base.log_prob(z).dtype == torch.float64
    assert torch.allclose(base.log_prob(before.double()).float(), distribution.log_prob(before))
    assert distribution.sample().dtype == torch.float32, "the caller's distribution was changed"


@each_distribution
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))],
    ids=["copy", "pickle"],
)
def test_a_torch_distribution_is_copied(distribution: Distribution, duplicate) -> None:
    base = DistributionBase(distribution)
    z = base.rsample((5,))
    assert torch.equal(duplicate(base).log_prob(z), base.log_prob(z))


@each_distribution
def test_a_flow_starts_from_any_torch_distribution(distribution: Distribution) -> None:
    """log p(x) = log p_0(x e^-a) - D a for the flow of dx/dt = a x."""
    event = tuple(distribution.event_shape)
    flow = cnf.Flow(
        distribution, cnf.CNF(lambda t, x: 0.5 * x, "exact", event_dims=len(event))
    ).double()
    z = flow.base.rsample((5,), seeded()) * 0.99 + 0.01 * flow.base.rsample((5,), seeded())
    x = z * math.exp(0.5)
    truth = flow.base.log_prob(z) - 0.5 * math.prod(event)
    z_back = flow.transform.inverse(x, solver=cnf.Solver(rtol=1e-10, atol=1e-10))
    if not isinstance(distribution, Dirichlet):  # whose support a solver only nearly hits
        tight = cnf.Solver(rtol=1e-10, atol=1e-10)
        assert torch.allclose(flow.log_prob(x, solver=tight), truth, atol=1e-6)
    assert torch.allclose(z_back, z, atol=1e-8)
    assert flow.sample((3,), generator=seeded()).shape == (3, *event)


def test_the_gradient_flows_through_the_draw() -> None:
    loc = torch.zeros(2, requires_grad=True)
    base = DistributionBase(Independent(Normal(loc, 1.0), 1))
    base.rsample((5,), seeded()).sum().backward()
    assert torch.equal(loc.grad, torch.full((2,), 5.0))


def test_the_implicit_gradient_of_a_seeded_draw() -> None:
    """z = z(u; a) of a gamma density: dz/da = -(dF/da) / p, here by differences of SciPy's F."""
    a = torch.tensor([1.5, 3.0], dtype=torch.float64, requires_grad=True)
    base = DistributionBase(Independent(Gamma(a, torch.ones(2, dtype=torch.float64)), 1))
    z = base.rsample((), seeded())
    z.sum().backward()
    value, shape, h = z.detach().numpy(), a.detach().numpy(), 1e-5
    slope = (stats.gamma.cdf(value, shape + h) - stats.gamma.cdf(value, shape - h)) / (2 * h)
    truth = torch.as_tensor(-slope / stats.gamma.pdf(value, shape))
    torch.testing.assert_close(a.grad, truth, rtol=1e-4, atol=1e-4)


def test_repr_names_the_distribution() -> None:
    assert repr(cnf.StandardNormal(1, 28, 28)) == "StandardNormal(1, 28, 28)"
    assert "Laplace" in repr(as_base(DISTRIBUTIONS["laplace"]))


def shaped(scale: float) -> dict[str, Distribution]:
    ones, eye = torch.ones(2), torch.eye(2)
    components = Independent(Normal(torch.arange(6.0).reshape(3, 2), scale * torch.ones(3, 2)), 1)
    stretched = [AffineTransform(ones, scale * ones, event_dim=1)]
    return {
        "normal": Independent(Normal(torch.zeros(2), torch.tensor(scale)), 1),
        "multivariate": MultivariateNormal(torch.zeros(2), scale * eye),
        "mixture": MixtureSameFamily(Categorical(torch.ones(3)), components),
        "transformed": TransformedDistribution(Independent(Normal(0 * ones, ones), 1), stretched),
    }


@pytest.mark.parametrize("name", shaped(1.0))
def test_a_loaded_base_is_the_saved_one(name: str) -> None:
    saved, loaded = (DistributionBase(shaped(scale)[name]) for scale in (3.0, 1.0))
    x = torch.randn(5, 2)
    assert not torch.allclose(saved.log_prob(x), loaded.log_prob(x))  # and fills its caches
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded.log_prob(x), saved.log_prob(x), rtol=0, atol=0)
    assert loaded.double().log_prob(x.double()).dtype == torch.float64
