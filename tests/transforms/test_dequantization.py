"""Dequantization against exact discrete probabilities, and at the edges of float32."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Laplace, Normal, Uniform

import cnf
from cnf.transforms import ConvNet, UniformDequantization, VariationalDequantization

DTYPES = [torch.float32, torch.float64]
LEVELS = [2, 3, 16, 17, 255, 256, 257, 1000, 2**16]


def randomised(module, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * scale / math.sqrt(fan_in))
    return module


def pixels(model, *ends) -> cnf.Flow:
    return cnf.Flow(model.base, cnf.Compose(model.transform, *ends))


def noise_flow(kind: str, shape, context=0, scale=1.5) -> cnf.Flow:
    """q(u | x), by couplings, a perceptron's or a convolution's ODE.

    Tails wider than the normal's keep the weights 1 / q(u | x) bounded.
    """
    given = math.prod(shape) + context
    wide = Independent(Laplace(torch.zeros(shape), torch.full(shape, scale)), len(shape))
    if kind == "ode":
        return randomised(cnf.FFJORD(shape, (8,), context=given, base=wide), 0.4)

    def network(inputs, outputs, context):
        return ConvNet(inputs, outputs, context, hidden=(8,), context_shape=shape)

    own = {"conditioner": network} if kind == "convolutions" else {"hidden": (8,)}
    return randomised(cnf.RealNVP(shape, layers=2, context=given, base=wide, **own), 0.4)


def everything(levels: int, dims: int) -> Tensor:
    """All integers (levels^dims, dims)."""
    return torch.tensor(list(itertools.product(range(levels), repeat=dims)))


def cell_probabilities(density, x: Tensor, levels: int, points: int = 200) -> Tensor:
    """P(x) of planar x (N, 2): the density's integral over each cell, by Gauss-Legendre's rule."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(points // 4))
    nodes, weights = (nodes + 1) / 2, weights / 2
    grid = torch.cartesian_prod(nodes, nodes)
    weight = torch.outer(weights, weights).flatten()
    y = (x.double().unsqueeze(1) + grid) / levels  # (N, P, 2)
    return (density(y).exp() * weight).sum(1) / levels**2


# ---------------------------------------------------------------- against exact probabilities


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4), (3, 2, 2)])
def test_a_uniform_density_has_the_bits_of_the_levels_exactly(shape, levels) -> None:
    base = Independent(Uniform(torch.zeros(shape), torch.ones(shape)), len(shape))
    flow = cnf.Flow(base, UniformDequantization(levels))
    x = torch.randint(levels, (6, *shape), dtype=torch.uint8 if levels == 256 else torch.int32)
    bits, stderr = flow.bits_per_dim(x, samples=3, return_stderr=True)
    assert (bits - math.log2(levels)).abs().max() < 1e-6
    assert stderr.max() < 1e-6
    log_prob = flow.log_prob(x)
    assert (log_prob + math.prod(shape) * math.log(levels)).abs().max() < 1e-4


@pytest.mark.parametrize("noise", ["uniform", "coupling", "ode"])
def test_weights_are_unbiased_and_bounds_tighten(noise) -> None:
    """2 pixels of 4 levels: every probability by quadrature of the density over its cell."""
    torch.manual_seed(0)
    levels, draws = 4, 4000
    model = randomised(cnf.RealNVP(2, layers=4, hidden=(8,)), 0.7).double()
    end = (
        UniformDequantization(levels)
        if noise == "uniform"
        else VariationalDequantization(noise_flow(noise, (2,)), levels)
    )
    flow = pixels(model, cnf.Sigmoid(0.05), end).double()
    x = everything(levels, 2)
    dense = cnf.Flow(model.base, cnf.Compose(model.transform, cnf.Sigmoid(0.05)))
    with torch.no_grad():
        truth = cell_probabilities(dense.log_prob, x, levels)
        each = x.expand(draws, *x.shape)
        solver = cnf.Solver("rk4", steps=4)
        log_w = flow.log_prob(each, solver=solver)  # (draws, 16)
    w = log_w.exp()
    error = w.std(0) / math.sqrt(draws)
    assert truth.max() > 3 * truth.min()  # no uniform one
    assert ((w.mean(0) - truth).abs() < 4.5 * error + 1e-12).all()
    total = w.sum(1)  # the draws of one row are independent of those of others
    assert truth.sum() <= 1 + 1e-9
    assert total.mean() <= 1 + 3 * total.std() / math.sqrt(draws)
    means = []
    for k in (1, 10, 100):
        bound = log_w.reshape(-1, k, len(x)).logsumexp(1) - math.log(k)
        means.append(bound.mean(0))
        slack = 4 * bound.std(0) / math.sqrt(len(bound))
        assert (means[-1] <= truth.log() + slack).all()
    gaps = [(truth.log() - m).mean().item() for m in means]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_known_probabilities_are_reached() -> None:
    """A normal density in logits: P(x) is a product of differences of its distribution function."""
    levels, alpha = 4, 0.05
    flow = cnf.Flow(
        cnf.StandardNormal(2), cnf.Compose(cnf.Sigmoid(alpha), UniformDequantization(levels))
    ).double()
    edges = torch.logit(alpha + (1 - 2 * alpha) * torch.linspace(0, 1, levels + 1).double())
    masses = Normal(0.0, 1.0).cdf(edges).diff()
    x = everything(levels, 2)
    truth = -masses[x].log2().mean(1)
    generator = torch.Generator().manual_seed(0)
    bits, stderr = flow.bits_per_dim(x, samples=20_000, generator=generator, return_stderr=True)
    assert ((bits - truth).abs() < 4 * stderr).all()
    assert stderr.max() < 4e-3
    loose = flow.bits_per_dim(x.expand(4000, 16, 2), generator=generator).mean(0)
    assert (loose > truth).all()
    assert (loose - truth).max() > 0.01


def test_the_standard_error_is_that_of_repeated_calls() -> None:
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(cnf.Sigmoid(), UniformDequantization(3)))
    x = torch.tensor([[0, 2]]).expand(2000, 2)
    bits, stderr = flow.bits_per_dim(x, samples=30, return_stderr=True)
    assert bits.std() == pytest.approx(stderr.mean().item(), rel=0.1)


def test_estimated_divergences_are_averaged_not_weighted() -> None:
    """Weights by e^(noise) would overstate the likelihood by half the variance of the noise."""
    torch.manual_seed(0)
    field = randomised(cnf.MLPField(6, (16,)), 4.0)
    model = cnf.Flow(cnf.StandardNormal(6), cnf.CNF(field, solver=cnf.Solver("rk4", steps=4)))
    flow = pixels(model, cnf.Sigmoid(0.05), UniformDequantization(8))
    x = torch.randint(8, (1, 6)).expand(200, 6)
    nats = 6 * math.log(2)
    with torch.no_grad():
        exact = torch.stack([flow.log_prob(x) for _ in range(50)])
        noisy = torch.stack([flow.log_prob(x, divergence="hutchinson") for _ in range(50)])
        bits = flow.bits_per_dim(x, samples=50, divergence="hutchinson")
        tight = flow.bits_per_dim(x, samples=50)
    truth = -(exact.logsumexp((0, 1)) - math.log(exact.numel())) / nats
    weighted = -(noisy.logsumexp((0, 1)) - math.log(noisy.numel())) / nats
    assert weighted < truth - 0.05  # what must not be
    assert bits.mean() > truth
    assert bits.mean().item() == pytest.approx(-exact.mean().item() / nats, abs=0.05)
    assert truth - 1e-3 < tight.mean() < bits.mean()


def test_a_q_that_starts_as_a_normal_starts_as_uniform_noise() -> None:
    x = torch.randint(17, (5, 4))
    end = VariationalDequantization(cnf.RealNVP(4, context=4), 17)  # networks begin at zero
    y, log_det = end.inverse_and_log_det(x)
    torch.testing.assert_close(log_det, torch.full((5,), -4 * math.log(17)), rtol=0, atol=1e-4)
    v = (17 * y - x).detach()
    assert 0 < v.min() < v.max() < 1


@pytest.mark.parametrize("kind", ["coupling", "ode"])
def test_a_learned_q_is_nearer_than_uniform_noise(kind) -> None:
    """The density is steep within the cells, so that uniform noise loses a known part."""
    torch.manual_seed(0)
    levels = 3
    base = Independent(Normal(torch.tensor([-1.5, 0.0]), torch.tensor([0.3, 0.2])), 1)
    x = everything(levels, 2)[[1, 4]]  # (0, 1) and (1, 1), where nearly all the mass is
    q = noise_flow(kind, (2,))
    flow = cnf.Flow(base, cnf.Compose(cnf.Sigmoid(0.05), VariationalDequantization(q, levels)))
    uniform = cnf.Flow(base, cnf.Compose(cnf.Sigmoid(0.05), UniformDequantization(levels)))
    dense = cnf.Flow(base, cnf.Sigmoid(0.05)).double()
    truth = cell_probabilities(dense.log_prob, x, levels).log()
    flow.float()
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-2)
    for _ in range(200):
        loss = -flow.log_prob(x.repeat(32, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned, flat = (f.log_prob(x.repeat(2000, 1)).reshape(2000, 2) for f in (flow, uniform))
    error = learned.std(0) / math.sqrt(2000)
    assert (learned.mean(0) < truth + 4 * error).all()
    assert (truth - flat.mean(0)).min() > 0.5
    assert ((truth - learned.mean(0)) < 0.5 * (truth - flat.mean(0))).all()


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_noise_never_reaches_the_next_integer(levels, dtype) -> None:
    x = torch.arange(levels).repeat(200_000 // levels + 1).reshape(-1, 1)
    q = noise_flow("coupling", (2,)).to(dtype)
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(5)
    ends = UniformDequantization(levels).to(dtype), VariationalDequantization(q, levels).to(dtype)
    for end, integers in zip(ends, (x, x[: len(x) // 2 * 2].reshape(-1, 2)), strict=True):
        with torch.no_grad():
            y, log_det = end.inverse_and_log_det(integers)
        assert y.dtype == log_det.dtype == dtype
        assert y.min() > 0
        assert y.max() < 1
        assert log_det.isfinite().all()
        assert torch.equal(end.forward(y).long(), integers)


def test_a_q_far_out_stays_inside_the_cell() -> None:
    """What a q at the edge of its cell would give: u of all ones, with a finite density."""
    q = cnf.RealNVP(2, context=2)
    for shift in (-1e4, -30.0, 30.0, 1e4):
        base = Independent(Normal(torch.full((2,), shift), torch.ones(2)), 1)
        end = VariationalDequantization(cnf.Flow(base, q.transform), 256)
        x = torch.tensor([[0, 255], [254, 255]], dtype=torch.uint8)
        y, log_det = end.inverse_and_log_det(x)
        assert torch.equal(end.forward(y), x)
        assert log_det.isfinite().all()
        assert 0 < y.min() < y.max() < 1


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_white_images_have_no_infinities(alpha) -> None:
    """1e5 draws; (255 + u) / 256 rounds to 1 in 0.6 % of white digits if u is any float32."""
    f = cnf.Compose(cnf.Sigmoid(alpha), UniformDequantization(256))
    for value in (0, 255):
        x = torch.full((100_000, 12), value, dtype=torch.uint8)
        z, log_det = f.inverse_and_log_det(x)
        assert z.isfinite().all()
        assert log_det.isfinite().all()
        assert torch.equal(f.forward(z), x)


def test_noise_is_uniform() -> None:
    end = UniformDequantization(3)
    y, _ = end.inverse_and_log_det(torch.full((200_000, 1), 1))
    u = (3 * y - 1).flatten().sort().values
    distance = (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()  # Kolmogorov's
    assert distance < 1.95 / math.sqrt(len(u))


# ---------------------------------------------------------------- the interface


@pytest.mark.parametrize("kind", ["uniform", "coupling", "convolutions", "ode"])
def test_both_directions_belong_together(kind) -> None:
    """Of the y that noise made, the way back tells the integers and minus the log-determinant."""
    shape = (1, 2, 2)
    end = (
        UniformDequantization(17)
        if kind == "uniform"
        else VariationalDequantization(noise_flow(kind, shape, scale=0.3), 17)
    ).double()
    x = torch.randint(17, (3, 5, *shape))
    tight = {"solver": cnf.Solver(rtol=1e-10, atol=1e-10)} if kind == "ode" else {}
    y, log_det = end.inverse_and_log_det(x, **tight)
    back, minus = end.forward_and_log_det(y, **tight)
    assert torch.equal(back.long(), x)
    assert log_det.shape == (x.shape if kind == "uniform" else (3, 5))
    torch.testing.assert_close(minus, -log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64]
)
def test_any_integers_give_the_same_draw(dtype) -> None:
    flow = pixels(randomised(cnf.RealNVP(3)), cnf.Sigmoid(), UniformDequantization(100))
    x = torch.randint(100, (4, 2, 3), generator=torch.Generator().manual_seed(0))
    seeded = [
        flow.log_prob(v, generator=torch.Generator().manual_seed(1)) for v in (x, x.to(dtype))
    ]
    assert torch.equal(*seeded)
    assert not torch.equal(flow.log_prob(x), seeded[0])


def test_samples_are_integers_of_the_distribution_of_the_density() -> None:
    torch.manual_seed(0)
    model = randomised(cnf.RealNVP(2, layers=4, hidden=(8,)), 0.7).double()
    flow = pixels(model, cnf.Sigmoid(0.05), UniformDequantization(3)).double()
    x = flow.sample((20_000,))
    assert x.dtype == torch.uint8
    assert (
        pixels(model, cnf.Sigmoid(), UniformDequantization(300)).sample((2,)).dtype == torch.int64
    )
    dense = cnf.Flow(model.base, cnf.Compose(model.transform, cnf.Sigmoid(0.05)))
    values = everything(3, 2)
    with torch.no_grad():
        inner = cell_probabilities(dense.log_prob, values, 3)
    middle = (values == 1).all(1)  # those at the edge also get what lies beyond
    found = (x == 1).all(1).double().mean()
    p = inner[middle].item()
    assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


def test_sample_and_log_prob_draws_the_noise_anew() -> None:
    """The noise that a sample was made with would overstate its likelihood."""
    torch.manual_seed(0)
    base = Independent(Normal(torch.zeros(2), torch.full((2,), 0.2)), 1)
    flow = cnf.Flow(base, cnf.Compose(cnf.Sigmoid(), UniformDequantization(3)))
    x, log_prob = flow.sample_and_log_prob((4000,))
    again = flow.log_prob(x)
    error = (log_prob - again).std() / math.sqrt(4000)
    assert abs(log_prob.mean() - again.mean()) < 4 * error
    z = base.rsample((4000,))
    with_own_noise = base.log_prob(z) - flow.transform.forward_and_log_det(z)[1].sum(1)
    assert with_own_noise.mean() > log_prob.mean() + 10 * error


def test_columns_of_counts_beside_real_ones() -> None:
    levels = (3, None, 1000)
    flow = cnf.Flow(cnf.StandardNormal(3), UniformDequantization(levels))
    x = torch.tensor([[0.0, -2.5, 999.0], [2.0, 7.25, 0.0]])
    y, log_det = flow.transform.inverse_and_log_det(x)
    assert torch.equal(y[:, 1], x[:, 1])
    assert torch.equal(flow.transform.forward(y), x)
    torch.testing.assert_close(log_det, torch.full((2,), -math.log(3000)))
    assert flow.log_prob(x).shape == (2,)
    counts = UniformDequantization((3, 1000))
    x = torch.tensor([[0, 999], [2, 0]])
    y, _ = counts.inverse_and_log_det(x)
    assert torch.equal(counts.forward(y), x)


def test_a_whole_flow_of_a_table() -> None:
    """Two counts and a real column: the density of the real one, times exact probabilities."""
    levels = (3, None, 5)
    ends = cnf.Sigmoid(0.05, columns=(0, 2)), UniformDequantization(levels)
    flow = cnf.Flow(cnf.StandardNormal(3), cnf.Compose(*ends)).double()
    x = torch.tensor([[0.0, -1.5, 4.0], [2.0, 0.3, 1.0]]).double()
    truth = Normal(0.0, 1.0).log_prob(x[:, 1])
    for column in (0, 2):
        grid = torch.linspace(0, 1, levels[column] + 1).double()
        masses = Normal(0.0, 1.0).cdf(torch.logit(0.05 + 0.9 * grid)).diff()
        truth = truth + masses[x[:, column].long()].log()
    weights = flow.log_prob(x.expand(20_000, 2, 3)).exp()
    error = weights.std(0) / math.sqrt(20_000)
    assert ((weights.mean(0) - truth.exp()).abs() < 4 * error).all()
    assert flow.sample((5,)).shape == (5, 3)


def test_a_forgotten_sigmoid_is_told() -> None:
    flow = cnf.Flow(cnf.StandardNormal(4), UniformDequantization(17))
    with pytest.warns(RuntimeWarning, match=r"put a cnf.Sigmoid\(\)"):
        flow.sample((100,))
    pixels(cnf.RealNVP(4), cnf.Sigmoid(), UniformDequantization(17)).sample((1000,))


def test_context_reaches_the_flow_and_q() -> None:
    model = randomised(cnf.RealNVP(2, context=3))
    q = noise_flow("coupling", (2,), context=3)
    x, c = torch.randint(4, (5, 2)), torch.randn(5, 3)
    for end in (UniformDequantization(4), VariationalDequantization(q, 4, context=3)):
        flow = pixels(model, cnf.Sigmoid(), end)

        def seeded(context, flow=flow):
            return flow.log_prob(x, context, generator=torch.Generator().manual_seed(0))

        assert not torch.isclose(seeded(c), seeded(c + 1)).any()
        torch.testing.assert_close(seeded(c)[:1], seeded(c.clone())[:1])
        assert flow.sample((7,), c).shape == (7, 5, 2)
    y = flow.transform[-1].inverse_and_log_det
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (y(x, v, generator=g)[0] for v, g in zip((c, c + 1), seeds, strict=True))
    assert not torch.equal(first, second)


def test_the_choices_of_a_call_reach_q() -> None:
    q = noise_flow("ode", (4,))
    flow = pixels(randomised(cnf.RealNVP(4)), cnf.Sigmoid(), VariationalDequantization(q, 4))
    x = torch.randint(4, (6, 4))
    with cnf.record_solves() as solves:
        flow.log_prob(x, solver=cnf.Solver("euler", steps=3))
    assert [s.nfe for s in solves] == [3]
    estimate = cnf.Hutchinson(probes=8)
    _, stderr = flow.log_prob(x, divergence=estimate, return_stderr=True)
    assert (stderr > 0).all()
    flow.log_prob(x).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in q.transform.field.network.parameters())


def test_as_a_distribution() -> None:
    flow = pixels(randomised(cnf.RealNVP(2)), cnf.Sigmoid(), UniformDequantization(4))
    d = flow.distribution()
    x = d.sample((50,))
    assert not d.has_rsample
    assert d.support.check(x).all()
    assert not d.support.check(x + 4).any()
    table = cnf.Flow(cnf.StandardNormal(2), UniformDequantization((4, None))).distribution()
    rows = torch.tensor([[1.0, -2.5], [4.0, 0.0], [0.5, 0.0]])
    assert table.support.check(rows).tolist() == [True, False, False]
    assert d.log_prob(x).shape == (50,)
    assert torch.distributions.kl_divergence(d, d).isfinite()
    with pytest.raises(TypeError, match="no gradient"):
        d.rsample()


def test_log_prob_compiles() -> None:
    flow = pixels(randomised(cnf.RealNVP(4)), cnf.Sigmoid(), UniformDequantization(17))
    x = torch.randint(17, (6, 4))
    compiled = torch.compile(flow.log_prob, backend="aot_eager")
    for rows in (x, x[:4], x[:5]):  # another size makes shapes symbolic
        torch.manual_seed(0)
        truth = flow.log_prob(rows)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(rows), truth)


@pytest.mark.parametrize("kind", ["uniform", "coupling", "ode"])
@pytest.mark.parametrize("batch", [(0,), (0, 2), (2, 0)], ids=str)
def test_empty_batches(kind, batch) -> None:
    q = cnf.RealNVP(4, context=4) if kind == "coupling" else cnf.FFJORD(4, (8,), context=4)
    end = UniformDequantization(17) if kind == "uniform" else VariationalDequantization(q, 17)
    flow = pixels(cnf.RealNVP(4), cnf.Sigmoid(), end)
    x = torch.zeros(*batch, 4, dtype=torch.uint8)
    assert flow.log_prob(x).shape == batch
    bits, stderr = flow.bits_per_dim(x, samples=2, return_stderr=True)
    assert bits.shape == stderr.shape == batch
    assert flow.sample(batch).shape == x.shape


def test_built_on_meta_and_materialised_it_knows_its_levels() -> None:
    with torch.device("meta"):
        flow = cnf.Flow(cnf.StandardNormal(3), UniformDequantization((3, None, 9)))
    flow = flow.to_empty(device="cpu")
    assert torch.equal(flow.transform.forward(torch.ones(1, 3)), torch.tensor([[2.0, 1.0, 8.0]]))


def test_levels_beyond_float32_work_in_float64() -> None:
    levels = 2**24 + 1
    end = UniformDequantization(levels).double()
    x = torch.tensor([0, levels - 2, levels - 1]).repeat(1000)
    y, _ = end.inverse_and_log_det(x)
    assert torch.equal(end.forward(y), x)


def test_levels_may_be_numpys() -> None:
    assert UniformDequantization(np.int64(17)).levels == 17
    assert UniformDequantization([np.uint8(17), None]).levels == (17, None)


def test_a_failed_q_gives_nan_where_its_solver_says_so() -> None:
    def spoilt(t, x, context):
        return torch.where(context[:, :1] > 0, math.nan, 0.0) - x

    solver = cnf.Solver("rk4", steps=4, on_failure="nan")
    q = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(spoilt, "exact", solver))
    end = VariationalDequantization(q, 4)
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(cnf.Sigmoid(), end))
    log_prob = flow.log_prob(torch.tensor([[0, 1], [3, 1]]))
    assert log_prob.isnan().tolist() == [False, True]


class PerNumber(cnf.Transform):
    """x = 2 z, with the log-determinant of each number."""

    def forward_and_log_det(self, z, context=None, **choices):
        return 2 * z, torch.full_like(z, math.log(2))

    def inverse_and_log_det(self, x, context=None, **choices):
        return x / 2, torch.full_like(x, -math.log(2))


class OneForAll(cnf.Transform):
    """x = z + 1, with one log-determinant for the whole batch."""

    def forward_and_log_det(self, z, context=None, **choices):
        return z + 1, z.new_zeros(())

    def inverse_and_log_det(self, x, context=None, **choices):
        return x - 1, x.new_zeros(())


def test_log_dets_are_summed_over_samples_and_never_over_the_batch() -> None:
    base = cnf.StandardNormal(4)
    x = torch.randn(5, 4)
    truth = base.log_prob(x / 2) - 4 * math.log(2)
    torch.testing.assert_close(cnf.Flow(base, PerNumber()).log_prob(x), truth)
    shifted = base.log_prob((x - 1) / 2) - 4 * math.log(2)
    for parts in ([PerNumber(), OneForAll()], [PerNumber(), cnf.Compose(OneForAll())]):
        torch.testing.assert_close(cnf.Flow(base, cnf.Compose(*parts)).log_prob(x), shifted)
    mixed = cnf.Compose(cnf.transforms.Diagonal(4), PerNumber(), OneForAll())
    torch.testing.assert_close(cnf.Flow(base, mixed).log_prob(x), shifted)
    torch.testing.assert_close(cnf.Flow(base, OneForAll()).log_prob(x), base.log_prob(x - 1))


def test_a_q_of_log_dets_per_number() -> None:
    class Given(PerNumber):
        takes_context = True

    end = VariationalDequantization(cnf.Flow(cnf.StandardNormal(4), Given()), 17).double()
    x = torch.randint(17, (4, 4))
    y, log_det = end.inverse_and_log_det(x)
    assert log_det.shape == (4,)
    torch.testing.assert_close(end.forward_and_log_det(y)[1], -log_det)
