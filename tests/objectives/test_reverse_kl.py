"""Reverse KL against closed forms of Gaussians, its two gradients against each other."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import cnf
from cnf.data import potential
from cnf.objectives.terms import record_terms
from cnf.transforms import Compose, Diagonal, Interval, LULinear

GRADIENTS = ("reparameterised", "path")
LOG_Z = 1.7  # of the targets below: what an unnormalised density is off by
MEAN, SD = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double()


def randomised(module: nn.Module, scale: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn_like(p))
    return module


class Whitened(cnf.StandardNormal):
    """Draws of mean 0 and mean square 1: means of squares over them are those of the density."""

    def rsample(self, shape, generator=None):
        z = super().rsample(shape, generator)
        return (z - z.mean(0)) / z.std(0, correction=0)


def gaussian_flow() -> cnf.Flow:
    """x = exp(s) z + b in float64."""
    return randomised(cnf.Flow(Whitened(2), Diagonal(2)).double())


def gaussian_target(x: Tensor) -> Tensor:
    z = (x - MEAN.to(x)) / SD.to(x)
    return LOG_Z - 0.5 * z.square().sum(-1) - (SD.log().sum() + math.log(2 * math.pi)).to(x)


def moments(flow: cnf.Flow) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Gaussian flow, with their gradients."""
    mean = flow.transform.forward(torch.zeros(2).double())
    return mean, flow.transform.forward(torch.ones(2).double()) - mean


def free_energy(flow: cnf.Flow, beta: float) -> Tensor:
    """In closed form: minus the entropy of q, and beta times its cross-entropy to p~."""
    mean, sd = moments(flow)
    entropy = sd.log().sum() + math.log(2 * math.pi) + 1
    squares = (((mean - MEAN) / SD).square() + (sd / SD).square()).sum()
    cross = 0.5 * squares + SD.log().sum() + math.log(2 * math.pi) - LOG_Z
    return beta * cross - entropy


def gradients(loss: Tensor, module: nn.Module) -> Tensor:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0, 2])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_value_and_gradient_of_gaussians_are_the_closed_form(gradient, beta):
    flow = gaussian_flow()
    objective = cnf.ReverseKL(flow, gaussian_target, samples=64, gradient=gradient)
    with record_terms() as terms:
        loss = objective(beta=beta, generator=seeded())
    truth = free_energy(flow, beta)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradients(loss, flow), gradients(truth, flow))
    mean, sd = (moment.detach() for moment in moments(flow))
    q, p = (MultivariateNormal(m, s.square().diag()) for m, s in ((mean, sd), (MEAN, SD)))
    assert terms["free_energy"] == pytest.approx(kl_divergence(q, p).item() - LOG_Z)
    assert terms["entropy"] == pytest.approx(q.entropy().item())


def test_values_of_both_gradients_agree_to_rounding():
    flow = gaussian_flow()
    losses = [
        cnf.ReverseKL(flow, gaussian_target, gradient=g)(generator=seeded()) for g in GRADIENTS
    ]
    torch.testing.assert_close(*losses)
    assert losses[0] != cnf.ReverseKL(flow, gaussian_target)(generator=seeded(1))


class Shared(nn.Module):
    """A field that has one layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(2, 2)
        self.network = nn.Sequential(layer, nn.Tanh(), layer)

    def forward(self, t, x):
        return self.network(x)


def shared() -> cnf.Flow:
    """One field in two blocks: `torch.func.functional_call` by itself leaves it broken."""
    field, solver = Shared(), cnf.Solver("rk4", steps=16, gradient="checkpoint")
    blocks = Compose(*(cnf.CNF(field, "exact", solver) for _ in range(2)))
    return cnf.Flow(cnf.StandardNormal(2), blocks)


FLOWS = {
    "shared": shared,
    "linear": lambda: cnf.Flow(cnf.StandardNormal(2), LULinear(2)),
    "cnf": lambda: cnf.FFJORD(2, (8,), solver=cnf.Solver("rk4", steps=16)),
    "checkpoint": lambda: cnf.FFJORD(
        2, (8,), solver=cnf.Solver("rk4", steps=16, gradient="checkpoint")
    ),
    "blocks": lambda: cnf.FFJORD(2, (8,), blocks=2, solver=cnf.Solver("rk4", steps=16)),
    "planar": lambda: cnf.PlanarFlow(2, layers=2),
    "radial": lambda: cnf.RadialFlow(2, layers=2),
    "realnvp": lambda: cnf.RealNVP(2, layers=2, hidden=(8,)),
    "interval": lambda: cnf.Flow(
        cnf.StandardNormal(2), Compose(LULinear(2), Interval(-4, 4, columns=(0,)))
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_at_the_optimum_the_path_gradient_is_zero_and_the_other_is_not(name):
    """The target is the flow itself, frozen: zero of every draw, not only in the mean."""
    flow = randomised(FLOWS[name]().double())
    target = copy.deepcopy(flow).requires_grad_(False)
    slopes = {}
    for gradient in GRADIENTS:
        objective = cnf.ReverseKL(flow, target, samples=16, gradient=gradient)
        loss = objective(generator=seeded())
        assert loss.item() == pytest.approx(0, abs=1e-4)  # of the solver in two directions
        slopes[gradient] = gradients(loss, flow).abs().max().item()
    assert slopes["path"] < 1e-4
    assert slopes["reparameterised"] > 1e-2


@pytest.mark.parametrize("name", ["linear", "cnf", "planar"])
def test_both_gradients_have_the_same_mean(name):
    flow = randomised(FLOWS[name]().double())
    slopes = [
        gradients(
            cnf.ReverseKL(flow, gaussian_target, samples=10_000, gradient=g)(generator=seeded()),
            flow,
        )
        for g in GRADIENTS
    ]
    scale = max(1.0, slopes[0].abs().max().item())
    torch.testing.assert_close(slopes[0] / scale, slopes[1] / scale, atol=0.05, rtol=0)
    assert (slopes[0] - slopes[1]).abs().max() > 1e-6  # two estimators, not one


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_hutchinsons_estimate_has_the_mean_of_the_exact_divergence(gradient):
    flow = randomised(FLOWS["cnf"]().double())
    objective = cnf.ReverseKL(flow, gaussian_target, samples=5_000, gradient=gradient)
    exact, estimate = (objective(generator=seeded(), divergence=d) for d in ("exact", "hutchinson"))
    assert exact != estimate
    torch.testing.assert_close(exact, estimate, atol=0.05, rtol=0)
    slopes = [gradients(loss, flow) for loss in (exact, estimate)]
    torch.testing.assert_close(*slopes, atol=0.1, rtol=0.05)


# p(x | c) = N(x; A c, S S^T): what the conditional flow below can be exactly.
MATRIX = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]]).double()


def conditional_target(x: Tensor, context: Tensor) -> Tensor:
    assert x.shape == (len(context), 2)
    return gaussian_target(x - context @ MATRIX.to(x).T)


class Shift(cnf.transforms.DiscreteTransform):
    """x = exp(s) z + A c + b."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.matrix = nn.Parameter(torch.randn(2, 3))
        self.bias = nn.Parameter(torch.randn(2))
        self.log_scale = nn.Parameter(0.3 * torch.randn(2))

    def to_data(self, z, context):
        x = z * self.log_scale.exp() + context @ self.matrix.T + self.bias
        return x, self.log_scale.sum().expand(len(z))

    def to_base(self, x, context):
        z = (x - context @ self.matrix.T - self.bias) / self.log_scale.exp()
        return z, -self.log_scale.sum().expand(len(x))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_conditional_target_is_averaged_over_conditions(gradient):
    """Values and gradients, those in the context too, of E_c KL in closed form."""
    flow = cnf.Flow(Whitened(2), Shift()).double()
    context = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    objective = cnf.ReverseKL(flow, conditional_target, samples=64, gradient=gradient)
    loss = objective(context, generator=seeded())
    f = flow.transform
    mean, sd = f.bias + context @ (f.matrix - MATRIX).T, f.log_scale.exp()  # (5, 2), (2,)
    squares = (((mean - MEAN) / SD).square() + (sd / SD).square()).sum(-1).mean()
    kl = 0.5 * squares + SD.log().sum() - sd.log().sum() - 1
    torch.testing.assert_close(loss, kl - LOG_Z)
    wanted = [*flow.parameters(), context]
    for found, truth in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(kl, wanted), strict=True
    ):
        torch.testing.assert_close(found, truth)


def test_at_the_optimum_the_path_gradient_in_the_context_is_that_of_the_target_alone():
    """The posterior's context is a parameter of q: held fixed in log q, as the others are."""
    flow = cnf.Flow(cnf.StandardNormal(2), Shift()).double()
    target = copy.deepcopy(flow).requires_grad_(False)
    context = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    fixed = context.detach()

    def log_density(x: Tensor, _: Tensor) -> Tensor:
        return target.log_prob(x, fixed.expand(8, 5, 3).reshape(40, 3))

    loss = cnf.ReverseKL(flow, log_density, samples=8, gradient="path")(context)
    assert torch.autograd.grad(loss, context)[0].abs().max() < 1e-9


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_gets_a_gradient(name, gradient):
    """As DDP asks."""
    objective = cnf.ReverseKL(randomised(FLOWS[name]()), gaussian_target, gradient=gradient)
    objective(beta=0.5).backward()
    for key, p in objective.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_target_with_parameters_is_trained_unless_it_is_frozen(gradient):
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(MEAN.clone())

        def forward(self, x: Tensor) -> Tensor:
            return -0.5 * (x - self.mean).square().sum(-1)

    flow = gaussian_flow()
    objective = cnf.ReverseKL(flow, Target(), samples=64, gradient=gradient)
    assert len(list(objective.parameters())) == len(list(flow.parameters())) + 1
    loss = objective(generator=seeded())
    (slope,) = torch.autograd.grad(loss, objective.log_density.mean)
    truth = MEAN - moments(flow)[0].detach()
    torch.testing.assert_close(slope, truth)
    objective.log_density.requires_grad_(False)
    objective(generator=seeded()).backward()
    assert objective.log_density.mean.grad is None


def test_a_target_without_gradient_is_told():
    objective = cnf.ReverseKL(gaussian_flow(), lambda x: gaussian_target(x.detach()))
    with pytest.warns(RuntimeWarning, match="log_density has no gradient in x"):
        objective()
    with torch.no_grad():
        objective()


SOLVERS = {
    "checkpoint": cnf.Solver("dopri5", gradient="checkpoint", rtol=1e-8, atol=1e-8),
    "adjoint": cnf.Solver("dopri5", gradient="adjoint", rtol=1e-9, atol=1e-9),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_way_to_solve_gives_the_same(name, gradient):
    """The path gradient swaps the parameters for fixed ones: no backward may use the others."""
    flow = randomised(cnf.FFJORD(2, (8,), solver=cnf.Solver(rtol=1e-8, atol=1e-8)).double())
    objective = cnf.ReverseKL(flow, gaussian_target, samples=8, gradient=gradient)
    found, truth = (objective(generator=seeded(), solver=s) for s in (SOLVERS[name], None))
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-6)
    slopes = gradients(found, flow), gradients(truth, flow)
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore", "error:compile=True")
def test_compiled_steps_take_the_fixed_parameters_too():
    """The same compiled step serves the parameters and, in log q, their detached values."""
    solver = cnf.Solver("euler", steps=2)
    flow = randomised(cnf.FFJORD(2, (4,), solver=solver))
    objective = cnf.ReverseKL(flow, gaussian_target, samples=8, gradient="path")
    compiled = dataclasses.replace(solver, compile=True)
    found, truth = (objective(generator=seeded(), solver=s) for s in (compiled, None))
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(gradients(found, flow), gradients(truth, flow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_dtypes_and_repeated_draws(gradient, dtype):
    flow = cnf.Flow(cnf.StandardNormal(2), LULinear(2)).to(dtype)
    objective = cnf.ReverseKL(flow, gaussian_target, gradient=gradient)
    first, again = (objective(generator=seeded()) for _ in range(2))
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert first.ndim == 0


def test_planar_flow_comes_near_the_normaliser_of_a_potential():
    """A few seconds of training; with a wrong sign anywhere it would go away from it."""
    torch.manual_seed(0)
    target = potential(2)
    flow = cnf.PlanarFlow(2, layers=8)
    flow = cnf.Flow(flow.base, Compose(flow.transform, Interval(-4, 4, columns=(0,))))
    objective = cnf.ReverseKL(flow, target.log_density, samples=128)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    with torch.no_grad():
        before = objective().item()
    for step in range(300):
        optimizer.zero_grad()
        objective(beta=min(1.0, 0.1 + step / 100)).backward()
        optimizer.step()
    with torch.no_grad():
        objective.samples = 10_000
        after = objective().item()
    assert before > 1
    assert -target.log_normalizer - 0.02 < after < -target.log_normalizer + 0.5


def test_a_target_beyond_the_support_is_told_with_its_remedy():
    objective = cnf.ReverseKL(cnf.FFJORD(2, (4,)), potential(2).log_density, samples=50_000)
    with pytest.raises(ValueError, match=r"not finite at \d+ of 50000 samples .*Interval"):
        objective(generator=seeded())


SQUARES = functools.partial(torch.sum, dim=-1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: cnf.ReverseKL(f.transform, SQUARES), TypeError, "flow must be a cnf.Flow"),
        (lambda f: cnf.ReverseKL(f, torch.zeros(2)), TypeError, "log_density must be a function"),
        (lambda f: cnf.ReverseKL(f, SQUARES, samples=0), ValueError, "samples=0"),
        (lambda f: cnf.ReverseKL(f, SQUARES, gradient="stl"), ValueError, "gradient='stl'.*path"),
        (lambda f: cnf.ReverseKL(f, SQUARES)(beta=-1), ValueError, "beta=-1 must be 0 or more"),
        (lambda f: cnf.ReverseKL(f, SQUARES)(beta=math.nan), ValueError, "beta=nan"),
        (lambda f: cnf.ReverseKL(f, SQUARES)(beta="1"), TypeError, "beta='1' must be a number"),
        (
            lambda f: cnf.ReverseKL(f, lambda x: x)(),
            ValueError,
            r"log_density returned shape \(256, 2\).* expected .*\(256,\); sum",
        ),
        (lambda f: cnf.ReverseKL(f, lambda x: 0.0)(), TypeError, "log_density returned a float"),
        (
            lambda f: cnf.ReverseKL(f, lambda x: x.sum(-1) * math.nan)(),
            ValueError,
            "not finite at 256 of 256",
        ),
        (lambda f: cnf.ReverseKL(f, SQUARES)(torch.zeros(3, 2)), ValueError, "context"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(cnf.FFJORD(2, (4,)))


def test_a_flow_of_integers_is_refused():
    ends = Compose(cnf.Sigmoid(), cnf.UniformDequantization(4))
    with pytest.raises(TypeError, match="flow is of integers"):
        cnf.ReverseKL(cnf.Flow(cnf.StandardNormal(2), ends), SQUARES)
