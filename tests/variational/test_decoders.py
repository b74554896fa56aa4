"""The likelihoods of decoders against torch's distributions, and as distributions themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Independent, Normal

from cnf.variational import Bernoulli, Decoder, DiscretizedLogistic, Gaussian


class Constant(nn.Module):
    """A network whose output does not depend on its input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, z: Tensor) -> Tensor:
        return self.value.expand(len(z), *self.value.shape)


def network(outputs: int, *shape: int) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))
    return nn.Sequential(made, nn.Unflatten(1, shape or (outputs,))).double()


def latents(*batch: int) -> Tensor:
    return torch.randn(*batch, 2, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.bool])
def test_bernoulli_is_torchs(shape, dtype) -> None:
    net, z = network(6, *shape), latents(5, 4)
    x = torch.randint(2, (4, *shape)).to(dtype)
    truth = Independent(
        TorchBernoulli(logits=net(z.flatten(0, 1)).unflatten(0, (5, 4))), len(shape)
    )
    decoder = Bernoulli(net)
    assert torch.allclose(decoder.log_prob(x, z), truth.log_prob(x.double()), rtol=1e-12)
    assert torch.allclose(decoder.mean(z), truth.mean, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.3, None])
def test_gaussian_is_torchs(scale) -> None:
    net, z, x = network(3), latents(5, 4), torch.randn(4, 3, dtype=torch.float64)
    decoder = Gaussian(net, scale).double()
    if scale is None:
        decoder.log_scale.data.fill_(-0.7)
    mean = net(z.flatten(0, 1)).unflatten(0, (5, 4))
    truth = Independent(Normal(mean, scale or math.exp(-0.7)), 1)
    assert torch.allclose(decoder.log_prob(x, z), truth.log_prob(x), rtol=1e-12)
    assert torch.equal(decoder.mean(z), truth.mean)
    assert len(list(decoder.parameters())) == len(list(net.parameters())) + (scale is None)


LOGISTIC = [(0.5, -1.0), (0.1, -4.0), (-3.0, 0.5), (1.2, -2.0), (0.7, 3.0), (0.5001, -20.0)]


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize(("mean", "log_scale"), LOGISTIC)
def test_masses_of_levels_are_differences_of_the_cdf_and_sum_to_one(
    levels, mean, log_scale
) -> None:
    decoder = DiscretizedLogistic(
        Constant(torch.tensor([mean, log_scale], dtype=torch.float64)), levels
    )
    x, z = torch.arange(levels).unsqueeze(1), latents(levels)
    log_mass = decoder.log_prob(x, z)
    assert log_mass.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    scale = max(math.exp(log_scale), math.exp(-5) / levels)
    edges = (torch.arange(1, levels).double() / levels - mean) / scale
    cdf = torch.cat([torch.zeros(1), edges.sigmoid(), torch.ones(1)]).double()
    assert torch.allclose(log_mass.exp(), cdf.diff(), atol=1e-11)
    expected = (log_mass.exp() * torch.arange(levels)).sum().item()
    assert decoder.mean(z)[0].item() == pytest.approx(expected, abs=1e-9)


def test_masses_far_in_the_tails_keep_their_digits() -> None:
    """In float32, against float64 formulas of what is left: of 1 - 1 nothing would be."""
    value = torch.tensor([0.5, math.log(1e-3)], requires_grad=True)
    decoder = DiscretizedLogistic(Constant(value.detach()), 256)
    x = torch.tensor([[0], [1], [20], [235], [254], [255]])
    log_mass = decoder.log_prob(x, torch.zeros(6, 2))
    s, w = 1e-3, 1 / 256e-3
    near = torch.tensor([1, 2, 21]).double() / 256  # the edge towards the mean
    below = (near - 0.5) / s + torch.tensor([0.0, 1.0, 1.0]) * math.log(-math.expm1(-w))
    assert torch.allclose(log_mass[:3].double(), below, rtol=1e-5)
    assert torch.allclose(log_mass[3:].flip(0), log_mass[:3], rtol=1e-5)
    (gradient,) = torch.autograd.grad(log_mass.sum(), decoder.network.value)
    assert gradient.isfinite().all()


def test_logistic_parameters_stand_one_behind_the_other_in_the_first_dimension() -> None:
    net, z = network(12, 2, 2, 3), latents(4)
    x = torch.randint(8, (4, 1, 2, 3))
    image = DiscretizedLogistic(net, 8).log_prob(x, z)
    mean, log_scale = net(z)[:, :1], net(z)[:, 1:]
    edges = [((x + i) / 8 - mean) / log_scale.exp() for i in (0, 1)]
    low = torch.where(x == 0, 0.0, edges[0].sigmoid())
    high = torch.where(x == 7, 1.0, edges[1].sigmoid())
    assert torch.allclose(image, (high - low).log().sum((1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("kind", [Bernoulli, DiscretizedLogistic, Gaussian])
def test_samples_have_the_mean_and_the_likelihood_of_the_decoder(kind) -> None:
    options = {"levels": 5} if kind is DiscretizedLogistic else {}
    value = torch.tensor([0.4, 0.7] if options else [0.3])  # a wide logistic
    decoder = kind(Constant(value), **options).double()
    if kind is Gaussian:
        decoder.log_scale.data.fill_(-0.7)
    z = latents(20_000)
    x = decoder.sample(z, seeded())
    assert x.shape == decoder.mean(z).shape == (20_000, 1)
    assert not x.requires_grad
    assert torch.equal(x, decoder.sample(z, seeded()))
    error = x.std() / math.sqrt(len(x))
    assert (x.mean() - decoder.mean(z)[0]).abs() < 4 * error
    log_prob = decoder.log_prob(x, z)
    if kind is not Gaussian:
        values = torch.arange(5 if options else 2).unsqueeze(1)
        masses = decoder.log_prob(values, latents(len(values))).exp()
        counts = x.long().flatten().bincount(minlength=len(values)) / len(x)
        assert (counts - masses).abs().max() < 0.015
    else:
        entropy = 0.5 * math.log(2 * math.pi * math.e) - 0.7
        assert log_prob.mean().item() == pytest.approx(-entropy, abs=0.03)


@pytest.mark.parametrize("kind", [Bernoulli, DiscretizedLogistic, Gaussian])
def test_shapes_broadcast_and_are_differentiable(kind) -> None:
    decoder = kind(network(6, 6)).double() if kind is DiscretizedLogistic else kind(network(3))
    decoder.double()
    z = latents(5, 4).requires_grad_()
    x = torch.randint(2, (4, 3)).double()
    log_prob = decoder.log_prob(x, z)
    assert log_prob.shape == (5, 4)
    assert torch.allclose(log_prob[3, 2], decoder.log_prob(x[2], z[3, 2]), rtol=1e-12)
    assert torch.allclose(log_prob, decoder.log_prob(x.expand(5, 4, 3), z), rtol=1e-12)
    assert decoder.log_prob(x[:0], z[:, :0]).shape == (5, 0)
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    assert torch.autograd.gradcheck(lambda z: decoder.log_prob(x, z), z, fast_mode=True)
    mapped = torch.func.vmap(decoder.log_prob)(x, z.transpose(0, 1))
    assert torch.allclose(mapped.T, log_prob, rtol=1e-12)


def test_a_decoder_of_ones_own_needs_three_methods() -> None:
    class Half(Decoder):
        def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
            return -(x - self.parameters_at(z)).abs().sum(-1)

        def mean(self, z: Tensor) -> Tensor:
            return self.parameters_at(z)

        def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return self.mean(z)

    assert Half(network(3)).log_prob(torch.zeros(4, 3), latents(5, 4)).shape == (5, 4)


def test_refusals() -> None:
    z, bits = latents(4), torch.ones(4, 3)
    for wrong in (0.5 * bits, bits * math.nan):
        with pytest.raises(ValueError, match=r"whole numbers from 0 to 1.*random_binarization"):
            Bernoulli(network(3)).log_prob(wrong, z)
        levels = DiscretizedLogistic(network(6), 2)
        with pytest.raises(ValueError, match=r"whole numbers from 0 to 1, got"):
            levels.log_prob(wrong, z)
    for kind in (Bernoulli, Gaussian):
        for wrong in (torch.ones(4, 2), torch.ones(3, 3), torch.ones(2, 4, 3), torch.ones(())):
            with pytest.raises(ValueError, match=r"x has shape .*, expected \(4, 3\)"):
                kind(network(3)).log_prob(wrong, z)
        with pytest.raises(TypeError, match=r"network must be an nn.Module .* got function"):
            kind(lambda z: z)
        with pytest.raises(ValueError, match=r"returned the shape \(3,\) for latents \(4, 2\)"):
            kind(nn.Sequential(nn.Linear(2, 3).double(), Sum())).log_prob(bits, z)
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            kind(network(3)).log_prob([1.0], z)
    with pytest.raises(ValueError, match=r"\(3,\) for each sample; expected means and log-scales"):
        DiscretizedLogistic(network(3)).log_prob(bits, z)
    for levels in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="levels="):
            DiscretizedLogistic(network(6), levels)
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=r"scale=.* must be positive"):
            Gaussian(network(3), scale)
    with pytest.raises(ValueError, match="non-finite values in x: 4 of 4"):
        Gaussian(network(3)).log_prob(bits * math.nan, z)


@pytest.mark.parametrize("kind", ["bernoulli", "logistic"])
def test_what_is_no_level_has_no_probability(kind) -> None:
    """In eager mode and mapped; a fraction too, where values cannot be looked at."""
    decoder = Bernoulli(network(3)) if kind == "bernoulli" else DiscretizedLogistic(network(6), 2)
    z, x = latents(4), torch.ones(4, 3)
    truth = decoder.log_prob(x, z)
    x[1, 0], x[2, 2] = 2.0, -1.0
    log_prob = decoder.log_prob(x, z)
    assert torch.equal(log_prob[::3], truth[::3])
    assert log_prob[1] == log_prob[2] == -math.inf
    log_prob.clamp(min=-9).sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    mapped = torch.func.vmap(lambda x, z: decoder.log_prob(x[None], z[None])[0])
    torch.testing.assert_close(mapped(x, z), log_prob)
    x[0, 0] = 0.5
    assert mapped(x, z)[0] == -math.inf


class Sum(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.sum(0)
