"""The discrete models: densities that integrate to one, samples that follow them, their parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

import cnf
from cnf.transforms import ActNorm, Conv1x1, Coupling, LULinear, Permutation

SMALL = {"hidden": (8, 8), "activation": "tanh"}  # smooth: a grid integrates it to many digits


class Plane(NamedTuple):
    """A model of the plane, and how fine a grid its density needs."""

    make: Callable[..., cnf.Flow]
    nodes: int = 600
    scale: float = 0.8  # of the parameters, by the root of the fan-in


def spline(**options) -> cnf.Flow:
    return cnf.NeuralSpline(2, 2, (8,), bins=4, activation="tanh", **options)


def mixed(context: int = 0) -> cnf.Flow:
    """A CNF between discrete layers."""
    solver = cnf.Solver("dopri5", rtol=1e-9, atol=1e-9)
    field = cnf.MLPField(2, (8,), context=context)
    layers = [
        Coupling(2, **SMALL, context=context),
        cnf.CNF(field, "exact", solver),
        cnf.Inverse(LULinear(2)),
    ]
    return cnf.Flow(cnf.StandardNormal(2), cnf.Compose(*layers))


PLANES = {
    "nice": Plane(lambda **o: cnf.NICE(2, 3, **SMALL, **o)),
    "realnvp": Plane(lambda **o: cnf.RealNVP(2, 3, **SMALL, **o)),
    "realnvp-lu": Plane(lambda **o: cnf.RealNVP(2, 2, mixing="lu", **SMALL, **o)),
    "maf": Plane(lambda **o: cnf.MAF(2, 3, **SMALL, **o)),
    "maf-residual": Plane(lambda **o: cnf.MAF(2, 2, residual=True, **SMALL, **o)),
    "iaf": Plane(lambda **o: cnf.IAF(2, 3, **SMALL, **o)),
    "hint": Plane(lambda **o: cnf.HINT(2, 2, **SMALL, **o)),
    "spline-coupling": Plane(spline, 1000, 0.4),
    "spline-autoregressive": Plane(lambda **o: spline(kind="autoregressive", **o), 1000, 0.4),
    "planar-sampling": Plane(lambda **o: cnf.PlanarFlow(2, 3, **o), 400),
    "planar-density": Plane(lambda **o: cnf.PlanarFlow(2, 4, explicit="density", **o)),
    "radial-sampling": Plane(lambda **o: cnf.RadialFlow(2, 3, **o)),
    "radial-density": Plane(lambda **o: cnf.RadialFlow(2, 3, explicit="density", **o)),
    "sylvester-sampling": Plane(lambda **o: cnf.SylvesterFlow(2, 1, **o), 400),
    "sylvester-density": Plane(lambda **o: cnf.SylvesterFlow(2, 3, explicit="density", **o)),
    "mixed-with-a-cnf": Plane(mixed, 300, 0.6),
}


def randomised(flow: cnf.Flow, scale: float) -> cnf.Flow:
    for p in flow.parameters():
        nn.init.normal_(p, 0.0, scale / math.sqrt(p.shape[-1] if p.ndim > 1 else 4))
    return flow.double()


def masses(flow: cnf.Flow, nodes: int, reach: float = 60.0) -> tuple[Tensor, Tensor]:
    """The probability around each node (n, n) of a grid, fine at its centre, and its axis (n,)."""
    u = torch.linspace(-1, 1, nodes, dtype=torch.float64) * math.asinh(reach)
    axis, width = u.sinh(), u.cosh() * (u[1] - u[0])
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p = torch.cat([flow.log_prob(part).exp() for part in x.split(50_000)])
    return p.reshape(nodes, nodes) * width[:, None] * width, axis


@pytest.mark.parametrize("name", PLANES)
def test_the_density_integrates_to_one_and_samples_follow_it(name: str) -> None:
    torch.manual_seed(3)
    plane = PLANES[name]
    flow = randomised(plane.make(), plane.scale)
    with torch.no_grad():
        x = flow.sample((20_000,))
        log_dets = flow.log_prob(x) - flow.base.log_prob(x)
    assert log_dets.abs().max() > 0.1, "these parameters test nothing"
    mass, axis = masses(flow, plane.nodes)
    assert abs(mass.sum() - 1) <= 1e-6
    edges = (axis[1:] + axis[:-1]) / 2
    cells = [torch.bucketize(x[:, i].contiguous(), edges) for i in (0, 1)]
    counts = torch.zeros_like(mass).index_put_(tuple(cells), torch.ones(len(x)).double(), True)
    step = plane.nodes // 25  # nodes to a bin
    expected = nn.functional.avg_pool2d(mass[None], step, step, divisor_override=1)[0]
    found = nn.functional.avg_pool2d(counts[None], step, step, divisor_override=1)[0]
    expected = expected / expected.sum() * found.sum()
    large = expected >= 10
    rest = [(~large * t).sum()[None] for t in (found, expected)]
    pairs = [torch.cat([t[large], r]) for t, r in zip((found, expected), rest, strict=True)]
    assert large.sum() > 20
    assert chisquare(*(p.numpy() for p in pairs)).pvalue > 1e-3


@pytest.mark.parametrize("name", PLANES)
def test_samples_come_with_their_density_given_context(name: str) -> None:
    torch.manual_seed(0)
    flow = randomised(PLANES[name].make(context=3), 0.5)
    context = torch.randn(7, 3).double()
    x, log_prob = flow.rsample_and_log_prob((5,), context)
    assert x.shape == (5, 7, 2)
    assert torch.allclose(flow.log_prob(x, context), log_prob, atol=1e-6)
    other = flow.log_prob(x, context + 1)
    assert ((other - log_prob).abs() > 1e-6).all(), "every layer stack depends on context"
    (x.sum() + log_prob.sum()).backward()
    missed = [key for key, p in flow.named_parameters() if p.grad is None]
    assert missed == []


MODELS = {
    "NICE": lambda d, **o: cnf.NICE(d, 2, (8,), **o),
    "RealNVP": lambda d, **o: cnf.RealNVP(d, 2, (8,), **o),
    "MAF": lambda d, **o: cnf.MAF(d, 2, (8,), **o),
    "IAF": lambda d, **o: cnf.IAF(d, 2, (8,), **o),
    "HINT": lambda d, **o: cnf.HINT(d, 2, (8,), **o),
    "NeuralSpline": lambda d, **o: cnf.NeuralSpline(d, 2, (8,), **o),
    "PlanarFlow": lambda d, **o: cnf.PlanarFlow(d, 2, **o),
    "RadialFlow": lambda d, **o: cnf.RadialFlow(d, 2, **o),
    "SylvesterFlow": lambda d, **o: cnf.SylvesterFlow(d, 2, **o),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains(name: str) -> None:
    """It fits a Gaussian of another place and scale better than it did at first."""
    torch.manual_seed(0)
    options = {"explicit": "density"} if name in ("PlanarFlow", "SylvesterFlow") else {}
    flow = MODELS[name](3, **options)
    x = 0.5 * torch.randn(256, 3) + torch.tensor([1.0, 0.0, -1.0])
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_near_its_base(name: str) -> None:
    torch.manual_seed(0)
    flow = MODELS[name](4)
    x = torch.randn(100, 4)
    assert (flow.log_prob(x) - flow.base.log_prob(x)).abs().mean() < 1.0


def test_a_base_of_ones_own() -> None:
    base = torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(2), 1.0), 1)
    flow = cnf.RealNVP(2, 2, base=base)
    x = torch.randn(5, 2)
    assert torch.allclose(flow.log_prob(x), base.log_prob(x), atol=1e-6)
    with pytest.raises(ValueError, match=r"event_shape \(2,\), expected features=\(3,\)"):
        cnf.MAF(3, base=base)


def test_what_stands_between_layers() -> None:
    for mixing, count in (("none", 0), ("lu", 4), ("reverse", 2), ("random", 2)):
        flow = cnf.RealNVP(4, 4, mixing=mixing)  # permutations stand between pairs
        kind = LULinear if mixing == "lu" else Permutation
        assert sum(isinstance(m, kind) for m in flow.transform.modules()) == count
    assert sum(isinstance(m, Conv1x1) for m in cnf.NICE((4, 2, 2), mixing="lu").modules()) == 8
    with pytest.raises(ValueError, match="Did you mean 'random'"):
        cnf.RealNVP(4, mixing="randm")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cnf.RealNVP(1), "two dimensions or more"),
        (lambda: cnf.HINT(1), "two dimensions or more"),
        (lambda: cnf.NeuralSpline(1), "two dimensions or more"),
        (lambda: cnf.RealNVP(3, layers=1), "layers=1 must be 2 or more"),
        (lambda: cnf.RealNVP(3, layers=0), "layers=0"),
        (lambda: cnf.HINT(3, mixing="none"), "mixing='none' leaves"),
        (lambda: cnf.MAF(0), "features=0"),
        (lambda: cnf.MAF(3, ordering="up"), "ordering='up'"),
        (lambda: cnf.NeuralSpline(3, kind="copling"), "Did you mean 'coupling'"),
        (lambda: cnf.NeuralSpline((1, 2, 2), kind="autoregressive"), "number of dimensions D"),
        (
            lambda: cnf.NeuralSpline(3, kind="autoregressive", mask="halves"),
            "mask and conditioner are for",
        ),
        (lambda: cnf.PlanarFlow(2, explicit="both"), "explicit='both'"),
        (lambda: cnf.PlanarFlow(2, layers=-1), "layers=-1"),
        (lambda: cnf.Glow(4), "shape of an image"),
        (lambda: cnf.Glow((1, 6, 6), levels=2), "height 6 not divisible by 4"),
        (lambda: cnf.RealNVP(3, context=-1), "context=-1"),
        (lambda: cnf.RealNVP(3, activation="rleu"), "Did you mean 'relu'"),
    ],
)
def test_what_cannot_be_built_is_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("context", [0, 2])
def test_glow_has_the_log_det_of_its_jacobian(context: int) -> None:
    torch.manual_seed(0)
    flow = cnf.Glow((3, 4, 4), levels=2, steps=2, hidden=(6, 6), context=context).double()
    c = torch.randn(16, context).double() if context else None
    flow.log_prob(torch.randn(16, 3, 4, 4).double(), c)  # sets the ActNorms
    randomised(flow, 0.4)
    x = torch.randn(3, 4, 4).double()
    c = None if c is None else c[:1]
    z, log_det = flow.transform.inverse_and_log_det(x[None], c)
    matrix = torch.autograd.functional.jacobian(lambda v: flow.transform.inverse(v[None], c), x)
    truth = torch.linalg.slogdet(matrix.reshape(48, 48)).logabsdet
    assert abs(log_det - truth).item() < 1e-9
    assert truth.abs() > 0.1
    assert torch.allclose(flow.transform.forward(z, c), x[None], atol=1e-8)
    assert (matrix != 0).any(dim=(0, 1, 2, 3)).all(), "every pixel matters"


def test_the_first_batch_sets_the_actnorms_of_glow() -> None:
    torch.manual_seed(0)
    flow = cnf.Glow((1, 8, 8), levels=2, steps=2, hidden=(8, 8))
    x = 5 + 3 * torch.randn(64, 1, 8, 8)
    flow.log_prob(x)
    z = flow.transform.inverse(x)
    assert abs(z.mean()) < 0.1
    assert abs(z.std() - 1) < 0.1
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))
