"""Bounds of variational autoencoders against the truth: closed forms and quadrature."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import cnf
from cnf.objectives.terms import record_terms
from cnf.variational import ELBO, POSTERIORS, VAE, Bernoulli, Gaussian, posterior

FIXED = cnf.Solver("rk4", steps=8)
SMALL = {
    "gaussian": {},
    "planar": {"layers": 3},
    "radial": {"layers": 3},
    "sylvester": {"layers": 2},
    "iaf": {"layers": 2, "hidden": (8,)},
    "coupling": {"layers": 2, "hidden": (8,)},
    "ffjord": {"layers": 1, "hidden": (8,), "solver": FIXED},
}
each_kind = pytest.mark.parametrize("kind", POSTERIORS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: nn.Module, spread: float = 1.0) -> nn.Module:
    """Every parameter drawn anew, so that nothing is the identity."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(0.0, spread / math.sqrt(fan_in))
    return module.double()


def bits_vae(kind: str) -> VAE:
    """Two latents, six bits, and random parameters."""
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    decoder = Bernoulli(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6)))
    vae = randomised(VAE(encoder, posterior(kind, 2, 5, **SMALL[kind]), decoder), 0.7)
    first = vae.posterior.transform if kind == "gaussian" else vae.posterior.transform[0]
    first.amortized.predict.bias.data[:2] = 0.3  # wide enough for importance weights
    decoder.network[2].weight.data.mul_(3.0)
    return vae


def bits(n: int = 4) -> Tensor:
    return torch.randint(2, (n, 6), generator=seeded()).double()


def plane(reach: float = 8.0, steps: int = 321) -> tuple[Tensor, float]:
    """Points of a square (N, 2), and the area of each."""
    axis = torch.linspace(-reach, reach, steps, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (2 * reach / (steps - 1)) ** 2


def evidence(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) (B,) by quadrature over the two latents."""
    z, area = plane()
    joint = vae.decoder.log_prob(x[:, None], z.expand(len(x), -1, -1)) + vae.prior.log_prob(z)
    return joint.logsumexp(1) + math.log(area)


@each_kind
@torch.no_grad()
def test_a_posterior_is_a_density_and_its_samples_have_it(kind: str) -> None:
    vae = bits_vae(kind)
    h = vae.encoder(bits(2))
    z, area = plane(18.0, 301)
    mass = vae.posterior.log_prob(z, h[:1]).exp().sum().item() * area
    assert mass == pytest.approx(1.0, abs=1e-3)
    tight = {"solver": cnf.Solver("dopri8", rtol=1e-9, atol=1e-9)} if kind == "ffjord" else {}
    drawn, own = vae.posterior.rsample_and_log_prob((50,), h, generator=seeded(), **tight)
    assert torch.allclose(own, vae.posterior.log_prob(drawn, h, **tight), atol=1e-6)
    at_origin = vae.posterior.transform.forward(torch.zeros(2, 2).double(), h)
    assert (at_origin[0] - at_origin[1]).abs().min() > 0.01, "h changes nothing"


@each_kind
def test_layers_start_near_the_identity_behind_the_gaussian(kind: str) -> None:
    torch.manual_seed(0)
    q, h, eps = posterior(kind, 4, 5, **SMALL[kind]), torch.randn(64, 5), torch.randn(64, 4)
    z = q.transform.forward(eps, h)
    first = q.transform if kind == "gaussian" else q.transform[0]
    behind = (z - first.forward(eps, h)).detach()
    assert behind.square().mean().sqrt() < 0.5
    if kind in ("gaussian", "iaf", "coupling"):
        assert behind.abs().max() < 1e-6
    predict = first.amortized.predict
    assert not predict.bias.any()
    assert predict.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 5), rel=0.3)


@each_kind
@torch.no_grad()
def test_bounds_lie_below_the_evidence_and_weights_are_unbiased(kind: str) -> None:
    vae, x = bits_vae(kind), bits()
    truth = evidence(vae, x)
    log_likelihood, kl = vae.terms(x, samples=10_000, generator=seeded(1))
    log_weights = log_likelihood - kl
    error = log_weights.std(0) / math.sqrt(len(log_weights))
    assert (log_weights.mean(0) < truth - 5 * error).all(), "a random posterior is not exact"
    elbo = vae.elbo(x, samples=2000, generator=seeded())
    assert (elbo - log_weights.mean(0)).abs().le(12 * error).all()
    ratio = (log_weights - truth).exp()
    assert (ratio.mean(0) - 1).abs().le(4.5 * ratio.std(0) / math.sqrt(len(ratio))).all()
    assert ratio.std(0).max() < 10, "weights of such a spread test nothing"
    many = x.repeat(300, 1)
    two, ten = (vae.iwae(many, k, generator=seeded()).reshape(300, -1) for k in (2, 10))
    assert (log_weights.mean(0) < two.mean(0)).all()
    assert (two.mean(0) < ten.mean(0)).all()
    assert (ten.mean(0) < truth + 4.5 * ten.std(0) / math.sqrt(300)).all()
    assert (vae.iwae(x, 5000, generator=seeded()) - truth).abs().max() < 0.15


@each_kind
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    vae = bits_vae(kind)
    objective = ELBO(vae, samples=2)
    objective(bits(), beta=0.5).backward()
    silent = [
        name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert silent == []


def test_the_compiled_solver_gives_the_same_bound() -> None:
    vae, x = bits_vae("ffjord"), bits()
    values, gradients = [], []
    for compile_ in (False, True):
        solver = cnf.Solver("euler", steps=2, compile=compile_)
        loss = ELBO(vae)(x, generator=seeded(), solver=solver)
        vae.zero_grad()
        loss.backward()
        values.append(loss.item())
        gradients.append([p.grad.clone() for p in vae.parameters()])
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_random_divergence_reaches_the_flow_but_not_the_importance_weights() -> None:
    vae, x = bits_vae("ffjord"), bits()
    exact = vae.elbo(x, generator=seeded())
    z_generator = seeded()
    noisy = vae.elbo(x, generator=z_generator, divergence="hutchinson")
    assert (exact - noisy).abs().max() > 1e-4
    vae.posterior.transform[1].divergence = cnf.Hutchinson()
    bound = vae.iwae(x, 30, generator=seeded())
    vae.posterior.transform[1].divergence = cnf.Exact()
    assert torch.equal(bound, vae.iwae(x, 30, generator=seeded()))


class Linear:
    """The linear-Gaussian model x = W z + b + s eps, and what is known of it."""

    def __init__(self, data: int = 4, latent: int = 2, scale: float = 0.5) -> None:
        torch.manual_seed(1)
        self.network = nn.Linear(latent, data).double()
        self.decoder = Gaussian(self.network, scale)
        w, b = self.network.weight.detach(), self.network.bias.detach()
        unit = torch.eye(latent, dtype=torch.float64)
        self.evidence = MultivariateNormal(b, w @ w.T + scale**2 * torch.eye(data).double())
        self.covariance = torch.linalg.inv(unit + w.T @ w / scale**2)
        self.towards = self.covariance @ w.T / scale**2  # the posterior mean is this (x - b)
        self.b = b

    def posterior_of(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal((x - self.b) @ self.towards.T, self.covariance)

    def vae(self) -> VAE:
        """With the exact posterior: shifts by the encoder, then the Cholesky factor.

        z = mu(x) + L eps is written as L (L^-1 mu(x) + eps): the Gaussian layer adds, a linear
        layer multiplies.
        """
        factor = torch.linalg.cholesky(self.covariance)
        encoder = nn.Linear(len(self.b), 2).double()
        flow = posterior("gaussian", 2, 2).double()
        multiply = cnf.transforms.Linear(2).double()
        with torch.no_grad():
            before = torch.linalg.solve(factor, self.towards)
            encoder.weight.copy_(before)
            encoder.bias.copy_(-before @ self.b)
            predict = flow.transform.amortized.predict
            predict.weight.copy_(torch.cat([torch.zeros(2, 2), torch.eye(2)]))
            predict.bias.zero_()
            multiply.bias.zero_()
            multiply.matrix.load_state_dict({next(iter(multiply.matrix.state_dict())): factor})
        transform = cnf.Compose(flow.transform, multiply)
        return VAE(encoder, cnf.Flow(flow.base, transform), self.decoder)


def test_with_the_exact_posterior_every_sample_gives_the_evidence() -> None:
    model, x = Linear(), torch.randn(6, 4, dtype=torch.float64)
    vae, truth = model.vae(), model.evidence.log_prob(x)
    log_likelihood, kl = vae.terms(x, samples=5)
    assert torch.allclose(log_likelihood - kl, truth.expand(5, 6), rtol=0, atol=1e-9)
    assert torch.allclose(vae.elbo(x), truth, rtol=0, atol=1e-9)
    assert torch.allclose(vae(x), truth, rtol=0, atol=1e-9)
    assert torch.allclose(vae.iwae(x, 7), truth, rtol=0, atol=1e-9)
    both = vae.elbo(x, samples=3, beta=0.3, generator=seeded())
    log_likelihood, kl = vae.terms(x, samples=3, generator=seeded())
    assert torch.allclose(both, (log_likelihood - 0.3 * kl).mean(0), atol=1e-12)
    with record_terms() as terms:
        loss = ELBO(vae, samples=3)(x, beta=0.3, generator=seeded())
    assert loss.item() == pytest.approx(-both.mean().item(), abs=1e-9)
    assert terms["reconstruction"] == pytest.approx(-log_likelihood.mean().item(), abs=1e-9)
    assert terms["kl"] == pytest.approx(kl.mean().item(), abs=1e-9)


@torch.no_grad()
def test_a_wrong_posterior_falls_short_by_its_divergence_from_the_exact_one() -> None:
    model, x = Linear(), torch.randn(6, 4, dtype=torch.float64)
    vae = model.vae()
    vae.posterior.transform[0].amortized.predict.bias.copy_(torch.tensor([0.3, -0.4, 0.5, -0.2]))
    matrix = torch.linalg.cholesky(model.covariance)
    s, shift = torch.tensor([0.3, -0.4]).double().exp(), torch.tensor([0.5, -0.2]).double()
    exact = model.posterior_of(x)
    wrong = MultivariateNormal(exact.mean + matrix @ shift, scale_tril=matrix * s)
    truth = model.evidence.log_prob(x) - kl_divergence(wrong, exact)
    log_likelihood, kl = vae.terms(x, samples=20_000, generator=seeded())
    values = log_likelihood - kl
    error = values.std(0) / math.sqrt(len(values))
    assert (values.mean(0) - truth).abs().le(4.5 * error).all()
    assert (values.mean(0) < model.evidence.log_prob(x) - 0.3).all()
    own = kl_divergence(wrong, MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))
    assert (kl.mean(0) - own).abs().le(4.5 * kl.std(0) / math.sqrt(len(kl))).all()


@torch.no_grad()
def test_the_importance_weighted_bound_rises_to_the_evidence() -> None:
    model, x = Linear(), torch.randn(3, 4, dtype=torch.float64)
    vae, truth = model.vae(), model.evidence.log_prob(x)
    vae.posterior.transform[0].amortized.predict.bias.copy_(torch.tensor([0.4, 0.4, 0.5, -0.5]))
    gaps = []
    for k in (1, 4, 16, 64, 1000):
        draws = vae.iwae(x.repeat(400, 1), k, generator=seeded()).reshape(400, 3)
        gaps.append((truth - draws.mean(0)).mean().item())
    assert all(later < 0.7 * earlier for earlier, later in pairwise(gaps)), gaps
    assert abs(gaps[-1]) < 0.01


def test_a_trained_linear_gaussian_vae_reaches_the_evidence() -> None:
    torch.manual_seed(0)
    model = Linear(data=4, latent=1)
    x = model.evidence.sample((256,))
    decoder = copy.deepcopy(model.decoder).requires_grad_(requires_grad=False)
    vae = VAE(nn.Linear(4, 3), posterior("gaussian", 1, 3), decoder).double()
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    objective, generator = ELBO(vae), seeded()
    for step in range(400):
        optimizer.zero_grad()
        objective(x, beta=min(1.0, 0.1 + step / 50), generator=generator).backward()
        optimizer.step()
        scheduler.step()
    truth = model.evidence.log_prob(x)
    elbo = vae.elbo(x, samples=200, generator=generator)
    assert (truth - elbo).mean().abs() < 2e-3
    assert (truth - elbo).abs().max() < 0.02


def test_chunks_change_the_order_of_draws_and_no_more() -> None:
    vae, x = bits_vae("gaussian"), bits(5)
    truth = evidence(vae, x)
    for chunk in (3, 12, 10_000):
        bound = vae.iwae(x, 200, chunk=chunk, generator=seeded())
        assert bound.shape == (5,)
        assert not bound.requires_grad
        assert (bound - truth).abs().max() < 0.4, chunk
    sizes = []
    vae.decoder.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    vae.iwae(x, 7, chunk=12)
    assert sizes == [10, 10, 10, 5]
    log_likelihood, kl = vae.terms(x, samples=50, generator=seeded())
    whole = (log_likelihood - kl).logsumexp(0) - math.log(50)
    assert torch.allclose(vae.iwae(x, 50, chunk=250, generator=seeded()), whole)


def test_the_importance_weighted_bound_can_be_trained() -> None:
    vae, x = bits_vae("coupling"), bits()
    vae.iwae(x, 5, differentiable=True).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    with torch.no_grad():
        assert not vae.iwae(x, 5, differentiable=True).requires_grad


def test_priors() -> None:
    x = bits()
    made = bits_vae("planar")
    scaled = Normal(torch.zeros(2).double(), 2 * torch.ones(2).double())
    wide = torch.distributions.Independent(scaled, 1)
    learned = randomised(cnf.FFJORD(2, hidden=(8,), solver=FIXED), 0.5)
    for prior in (wide, learned):
        vae = VAE(made.encoder, made.posterior, made.decoder, prior).double()
        log_likelihood, kl = vae.terms(x, samples=3, generator=seeded())
        z, log_q = vae.posterior.rsample_and_log_prob((3,), vae.encoder(x), generator=seeded())
        assert torch.allclose(kl, log_q - prior.log_prob(z), atol=1e-12)
        assert torch.allclose(log_likelihood, made.decoder.log_prob(x, z))
        assert vae.sample(5, generator=seeded()).shape == (5, 6)
        assert vae.sample_prior((2, 3)).shape == (2, 3, 2)
    ELBO(vae)(x).backward()
    assert all(p.grad.any() for p in learned.parameters())


def test_reconstructions_and_samples() -> None:
    vae, x = bits_vae("iaf"), bits()
    means = vae.reconstruct(x, generator=seeded())
    z = vae.posterior.sample((), vae.encoder(x), generator=seeded())
    assert torch.equal(means, vae.decoder.mean(z))
    assert not means.requires_grad
    drawn = vae.sample((3000,), generator=seeded())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn, vae.sample(3000, generator=seeded()))
    z, area = plane()
    truth = (vae.decoder.mean(z) * vae.prior.log_prob(z).exp().unsqueeze(1)).sum(0) * area
    assert (drawn.mean(0) - truth).abs().max() < 0.05
    assert vae.sample().shape == (6,)


def test_integers_no_data_and_repeated_draws() -> None:
    vae, x = bits_vae("coupling"), bits()
    expected = vae.elbo(x, generator=seeded())
    assert torch.equal(expected, vae.elbo(x.to(torch.uint8), generator=seeded()))
    assert torch.equal(
        vae.iwae(x, 4, generator=seeded()), vae.iwae(x.long(), 4, generator=seeded())
    )
    assert vae.elbo(x[:0]).shape == vae.iwae(x[:0]).shape == (0,)
    single = copy.deepcopy(vae).float()
    assert single.elbo(x.float()).dtype == torch.float32


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "state_dict": lambda thing: loaded(bits_vae("iaf"), thing.state_dict()),
}


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_after_use_is_the_same(duplicate) -> None:
    vae, x = bits_vae("iaf"), bits()
    nn.init.normal_(vae.encoder[0].weight)
    value = vae.elbo(x, generator=seeded())
    value.sum().backward()
    twin = duplicate(vae)
    assert torch.equal(twin.elbo(x, generator=seeded()), value)
    assert repr(twin) == repr(vae)


def test_refusals() -> None:
    vae, x = bits_vae("gaussian"), bits()
    encoder, q, decoder = vae.encoder, vae.posterior, vae.decoder
    for parts, words in (
        ((abs, q, decoder), "encoder must be a Module, got builtin"),
        ((encoder, nn.Linear(2, 2), decoder), "posterior must be a Flow, got Linear"),
        ((encoder, q, nn.Linear(2, 6)), "decoder must be a Decoder, got Linear"),
        ((encoder, q, decoder, nn.Linear(2, 2)), "prior must be a cnf base, a cnf.Flow"),
    ):
        with pytest.raises(TypeError, match=words):
            VAE(*parts)
    pixels = cnf.Glow((1, 4, 4), levels=2, steps=1, hidden=(4,), context=5)
    for parts, words in (
        ((encoder, cnf.RealNVP(2), decoder), r"takes no context.* context=C"),
        ((encoder, pixels, decoder), r"samples of \(1, 4, 4\), expected real vectors"),
        ((encoder, q, decoder, cnf.StandardNormal(3)), r"prior has samples of \(3,\).*\(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            VAE(*parts)
    for name, value in (("samples", 0), ("samples", 2.0), ("chunk", 0)):
        with pytest.raises(ValueError, match=f"{name}={value} must be a positive integer"):
            vae.iwae(x, **{name: value})
    with pytest.raises(ValueError, match="samples=0"):
        vae.elbo(x, samples=0)
    with pytest.raises(TypeError, match="beta='1' must be a number"):
        vae.elbo(x, beta="1")
    with pytest.raises(TypeError, match="differentiable=1 must be True or False"):
        vae.iwae(x, differentiable=1)
    with pytest.raises(TypeError, match=r"vae must be a cnf.variational.VAE, got Sequential"):
        ELBO(encoder)
    for call in (vae.elbo, vae.iwae, vae.reconstruct):
        with pytest.raises(TypeError, match=r"x must be a tensor, got list; use torch.as_tensor"):
            call([1.0])
    odd = VAE(nn.Unflatten(1, (2, 3)), q, decoder)
    with pytest.raises(ValueError, match=r"encoder returned the shape \(4, 2, 3\)"):
        odd.elbo(x)
    with pytest.raises(ValueError, match="context has 6 features, expected context=5"):
        VAE(nn.Identity(), q, decoder).elbo(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: posterior("normal", 2, 3), ValueError, "kind='normal' is not known"),
        (lambda: posterior("iaf", 0, 3), ValueError, "latent=0"),
        (lambda: posterior("iaf", 2, 0), ValueError, "context=0"),
        (lambda: posterior("iaf", 2, 3, layers=0), ValueError, "layers=0"),
        (lambda: posterior("ffjord", 2, 3, layers=0), ValueError, "layers=0"),
        (lambda: posterior("ffjord", 2, 3, layers=2, blocks=1), ValueError, "are the same"),
        (lambda: posterior("gaussian", 2, 3, layers=2), ValueError, "layers concern the layers"),
        (lambda: posterior("gaussian", 2, 3, hidden=(4,)), ValueError, "hidden concern"),
        (lambda: posterior("iaf", 2, 3, width=4), TypeError, "width"),
        (lambda: posterior("coupling", 1, 3), ValueError, "one"),
    ],
)
def test_posteriors_refuse(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
