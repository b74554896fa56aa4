"""The toy densities: sampler, log-density and entropy against each other, against quadrature and
against brute force.
"""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from cnf.data import TOY_NAMES, PlaneDensity, toy
from cnf.data.pinwheel import SPACING, bisect
from cnf.data.toy import NoisyCircles, NoisyCurves, two_arms

SMOOTH = [name for name in TOY_NAMES if name != "checkerboard"]
GRIDS = {
    "8gaussians": (0.1, 7),
    "2spirals": (0.0625, 4.5),
    "circles": (0.05, 5),
    "rings": (0.02, 4),
    "moons": (0.075, 4.5),
    "swissroll": (0.08, 5),
    "checkerboard": (0.25, 6),
}
PUBLISHED = {
    "8gaussians": 2.8319,
    "checkerboard": math.log(32),
    "2spirals": 2.6455,
    "pinwheel": 2.318,
    "circles": 3.2681,
    "rings": 2.6232,
    "moons": 2.3939,
    "swissroll": 2.6696,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(step: float, reach: float) -> Tensor:
    line = torch.arange(-reach + step / 2, reach, step, dtype=torch.float64)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)  # (G, G, 2)


@pytest.mark.parametrize("name", GRIDS)
def test_integral_is_one_and_entropy_is_true(name):
    density, (step, reach) = toy(name), GRIDS[name]
    points = grid(step, reach)
    if name == "2spirals":  # p(x) = p(-x): half of the plane will do
        points = points[: len(points) // 2]
    log_p = density.log_prob(points)
    p = log_p.exp() * step**2 * (2 if name == "2spirals" else 1)
    assert float(p.sum()) == pytest.approx(1, abs=1e-7)
    assert -float(torch.where(p > 0, p * log_p, 0.0).sum()) == pytest.approx(
        density.entropy, abs=1e-7
    )


def test_pinwheel_integral_and_entropy():
    density = toy("pinwheel")
    assert float(density.log_prob(grid(0.04, 6)).exp().sum()) * 0.04**2 == pytest.approx(
        1, abs=1e-6
    )
    e = grid(0.1, 8).reshape(
        -1, 2
    )  # entropy: an average over the untwisted Gaussian, where log p is smooth
    f0, f1 = 1 + 0.3 * e[:, 0], 0.1 * e[:, 1]
    turn = 0.25 * f0.exp()
    x = 2 * torch.stack((f0 * turn.cos() + f1 * turn.sin(), f1 * turn.cos() - f0 * turn.sin()), -1)
    weight = (-0.5 * e.square().sum(-1)).exp() / (2 * math.pi) * 0.1**2
    assert -float((weight * density.log_prob(x)).sum()) == pytest.approx(density.entropy, abs=1e-8)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_entropy_agrees_with_independent_figures(name):
    assert toy(name).entropy == pytest.approx(PUBLISHED[name], abs=3e-4)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_samples_follow_the_density(name):
    """Counts in 12 x 12 cells against the integrated density, and the mean of -log p against the
    entropy.
    """
    density, n, fine, cells = toy(name), 100_000, 5, 12
    reach = GRIDS.get(name, (0, 6))[1]
    x = density.sample(n, generator(1), dtype=torch.float64)
    step = 2 * reach / (cells * fine)
    points, weights = np.polynomial.legendre.leggauss(2)
    p = torch.zeros(cells * fine, cells * fine, dtype=torch.float64)
    for i, j in np.ndindex(2, 2):  # two Gauss points a side in each small square
        shift = torch.tensor([points[i], points[j]]) * step / 2
        p += (
            density.log_prob(grid(step, reach) + shift).exp()
            * weights[i]
            * weights[j]
            * step**2
            / 4
        )
    expected = n * p.reshape(cells, fine, cells, fine).sum((1, 3)).numpy()
    seen = np.histogram2d(x[:, 0], x[:, 1], bins=cells, range=[[-reach, reach]] * 2)[0]
    full = expected > 20
    z = (seen - expected)[full] / np.sqrt(expected[full] * (1 - expected[full] / n))
    assert np.abs(z).max() < 4.5
    assert stats.chi2.sf((z**2 * (1 - expected[full] / n)).sum(), full.sum() - 1) > 1e-5
    rest = n - expected[full].sum()  # in thin cells and outside
    assert abs(n - seen[full].sum() - rest) < 4.5 * math.sqrt(max(rest, 1))
    surprise = -density.log_prob(x[:10_000])
    error = float(surprise.std()) / math.sqrt(len(surprise)) + 1e-12
    assert abs(float(surprise.mean()) - density.entropy) < 4.5 * error


def brute_curve(name: str, x: np.ndarray) -> float:
    """p(x) by adaptive quadrature along the curve, from the definitions."""

    def normal(d, sd):
        return np.exp(-0.5 * (d / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    def box(d):  # Gaussian of sd 0.1 plus U(0, 1) / 6
        return 6 * (special.ndtr(d / 0.1) - special.ndtr((d - 1 / 6) / 0.1))

    def moons(u):
        t = np.pi * u
        upper = normal(x[0] - (2 * np.cos(t) - 1), 0.2) * normal(x[1] - (2 * np.sin(t) - 0.2), 0.2)
        lower = normal(x[0] - (2 * (1 - np.cos(t)) - 1), 0.2) * normal(
            x[1] - (2 * (0.5 - np.sin(t)) - 0.2), 0.2
        )
        return (upper + lower) / 2

    def swissroll(u):
        t = 1.5 * np.pi * (1 + 2 * u)
        return normal(x[0] - t * np.cos(t) / 5, 0.2) * normal(x[1] - t * np.sin(t) / 5, 0.2)

    def spirals(u):
        t = 3 * np.pi * np.sqrt(u)
        a, b = -t * np.cos(t) / 3, t * np.sin(t) / 3
        # The second arm is the negative of a jittered first.
        mirrored = box(-x[0] - a) * box(-x[1] - b)
        return (box(x[0] - a) * box(x[1] - b) + mirrored) / 2

    integrand = {"moons": moons, "swissroll": swissroll, "2spirals": spirals}[name]
    return integrate.quad(
        integrand, 0, 1, limit=400, epsabs=1e-13, epsrel=1e-10, points=np.linspace(0.05, 0.95, 19)
    )[0]


@pytest.mark.parametrize("name", ["moons", "swissroll", "2spirals"])
def test_curves_against_adaptive_quadrature(name):
    x = toy(name).sample(8, generator(2), dtype=torch.float64)
    x = torch.cat((x, x + 0.3))
    expected = [brute_curve(name, point) for point in x.numpy()]
    np.testing.assert_allclose(toy(name).log_prob(x).exp(), expected, rtol=1e-8, atol=1e-12)


def test_eight_gaussians_against_the_mixture():
    x = toy("8gaussians").sample(50, generator(3), dtype=torch.float64)
    angles = np.arange(8) * np.pi / 4
    centres = 4 * np.stack((np.cos(angles), np.sin(angles)), -1) / 1.414
    p = np.mean([stats.multivariate_normal(c, (0.5 / 1.414) ** 2).pdf(x) for c in centres], 0)
    np.testing.assert_allclose(toy("8gaussians").log_prob(x), np.log(p), rtol=1e-12)


@pytest.mark.parametrize("name", ["circles", "rings"])
def test_circles_against_the_integral_over_the_angle(name):
    density = toy(name)
    x = torch.cat(
        (density.sample(20, generator(4), dtype=torch.float64), torch.zeros(1, 2).double())
    )
    angle = np.arange(4000) * 2 * np.pi / 4000
    on_circles = np.concatenate(
        [r * np.stack((np.cos(angle), np.sin(angle)), -1) for r in density.radii]
    )
    square = ((x.numpy()[:, None] - on_circles) ** 2).sum(-1)
    expected = special.logsumexp(-square / (2 * density.sd**2), axis=1) - np.log(
        2 * np.pi * density.sd**2 * len(on_circles)
    )
    np.testing.assert_allclose(density.log_prob(x), expected, rtol=1e-10)


def test_checkerboard_is_uniform_on_alternate_squares():
    x = torch.tensor(
        [
            [-3.0, -3.0],
            [-3.0, -1.0],
            [1.0, 1.0],
            [1.0, -1.0],
            [1.0, 3.9],
            [-4.0, -4.0],
            [4.0, 1.0],
            [5.0, 5.0],
        ]
    )
    inside = [True, False, True, False, False, True, False, False]
    expected = torch.where(torch.tensor(inside), -math.log(32), -math.inf)
    assert torch.equal(toy("checkerboard").log_prob(x), expected)
    for dtype in (torch.float32, torch.float64):
        samples = toy("checkerboard").sample(1_000_000, generator(5), dtype=dtype)
        assert bool(toy("checkerboard").log_prob(samples).isfinite().all())


@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0, 1.69, 1.8, 2.2, 2.5, 2.8])
def test_pinwheel_counts_every_preimage(radius):
    """Against a scan for sign changes around the whole circle, folds included."""
    b = np.linspace(-np.pi, np.pi, 2_000_001)
    f0, f1 = radius * np.cos(b), radius * np.sin(b)
    phase = b - 0.25 * np.exp(f0)
    weight = np.exp(-0.5 * ((f0 - 1) / 0.3) ** 2 - 0.5 * (f1 / 0.1) ** 2) / (2 * np.pi * 0.03)
    slope = np.abs(1 + 0.25 * np.exp(f0) * f1)
    for angle in np.linspace(-3, 3, 9):
        count = np.floor((phase - angle) / SPACING)
        at = np.flatnonzero(np.diff(count))
        assert np.abs(np.diff(count)).max() <= 1
        p = (weight[at] / slope[at]).sum() / 20
        x = torch.tensor([2 * radius * np.cos(angle), 2 * radius * np.sin(angle)])
        assert float(toy("pinwheel").log_prob(x).exp()) == pytest.approx(p, rel=2e-3)


def test_bisect_finds_the_zero():
    low, high = torch.zeros(3, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    target = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(
        bisect(lambda y: y.square() - target, low, high), target.sqrt(), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name):
    x = toy(name).sample(2, generator(6), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(toy(name).log_prob, x)
    assert torch.autograd.gradgradcheck(toy(name).log_prob, x)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_finite_everywhere_in_float32(name, scale):
    x = (scale * torch.randn(100, 2, generator=generator(7))).requires_grad_()
    log_p = toy(name).log_prob(x)
    log_p.sum().backward()
    assert log_p.dtype == torch.float32
    assert bool(log_p.isfinite().all())
    assert bool(x.grad.isfinite().all())
    torch.testing.assert_close(log_p.double(), toy(name).log_prob(x.double()), rtol=2e-4, atol=2e-3)


def test_quadrature_has_converged():
    x = 3 * torch.randn(200, 2, dtype=torch.float64, generator=generator(8))
    for name in ("moons", "swissroll", "2spirals"):
        density = toy(name)
        assert isinstance(density, NoisyCurves)
        finer = NoisyCurves(name, 0.0, density.curves, sd=density.sd, box=density.box, nodes=900)
        log_p, truth = density.log_prob(x), finer.log_prob(x)
        assert float((log_p - truth)[truth > -500].abs().max()) < 1e-8


def test_two_arms_are_mirror_images():
    arms = two_arms(torch.linspace(0, 1, 5))
    assert arms.shape == (5, 2, 2)
    assert torch.equal(arms[:, 0], -arms[:, 1])


@pytest.mark.parametrize("name", TOY_NAMES)
def test_the_generator_decides_and_the_global_one_is_left_alone(name):
    density, state = toy(name), torch.get_rng_state()
    first, again = density.sample(5, generator(9)), density.sample(5, generator(9))
    assert torch.equal(first, again)
    assert not torch.equal(first, density.sample(5, generator(10)))
    assert not torch.equal(density.sample(5), density.sample(5))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", TOY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(name, dtype):
    density = toy(name)
    assert isinstance(density, PlaneDensity)
    assert density.name == name
    assert density.sample(0).shape == (0, 2)
    assert density.log_prob(torch.zeros(0, 2)).shape == (0,)
    x = density.sample(12, generator(11), dtype=dtype, device="cpu")
    assert x.dtype == dtype
    assert x.shape == (12, 2)
    log_p = density.log_prob(x)
    assert log_p.dtype == dtype
    assert log_p.shape == (12,)
    torch.testing.assert_close(density.log_prob(x.reshape(3, 4, 2)), log_p.reshape(3, 4))
    assert density.log_prob(x[0]).shape == ()
    assert density.log_prob(torch.zeros(2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", TOY_NAMES)
def test_copies_and_pickles(name):
    density, x = toy(name), torch.ones(1, 2)
    for twin in (copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert torch.equal(twin.log_prob(x), density.log_prob(x))


def test_large_batches_are_cut_without_a_seam():
    x = torch.randn(5000, 2, generator=generator(12))
    torch.testing.assert_close(toy("moons").log_prob(x)[-3:], toy("moons").log_prob(x[-3:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TOY_NAMES)
def test_on_a_gpu(name):
    x = toy(name).sample(
        1000, torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.float64
    )
    assert x.is_cuda
    torch.testing.assert_close(toy(name).log_prob(x).cpu(), toy(name).log_prob(x.cpu()))
    with pytest.raises(ValueError, match="generator is on cpu"):
        toy(name).sample(3, torch.Generator(), device="cuda")


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"name must be one of 8gaussians, .*got 'moon'; did you mean 'moons'"
    ):
        toy("moon")
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        toy("xyz")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be 0 or more, got -1"),
        ({"n": 2.5}, TypeError, "n must be an integer, got 2.5"),
        ({"n": True}, TypeError, "n must be an integer, got True"),
        (
            {"n": 3, "dtype": torch.bfloat16},
            TypeError,
            "dtype must be torch.float32 or torch.float64, got torch.bfloat16",
        ),
        (
            {"n": 3, "device": "meta", "generator": generator()},
            ValueError,
            "generator is on cpu but device is meta",
        ),
    ],
)
def test_bad_sample_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        toy("rings").sample(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(3, 2, dtype=torch.int64),
            TypeError,
            "x must be a floating-point tensor, got torch.int64",
        ),
        ([[0.0, 0.0]], TypeError, "got list"),
        (torch.zeros(5, 3), ValueError, r"x must have shape \(\.\.\., 2\), got \(5, 3\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (
            torch.tensor([[0.0, 0.0], [math.nan, 0.0]]),
            ValueError,
            r"non-finite values in 1 of 2 points \(first index 1\)",
        ),
        (torch.tensor([math.inf, 0.0]), ValueError, "non-finite values in 1 of 1"),
    ],
)
def test_bad_points(x, error, message):
    with pytest.raises(error, match=message):
        toy("checkerboard").log_prob(x)


def test_one_circle_is_a_gaussian_when_its_radius_is_zero():
    x = torch.randn(10, 2, dtype=torch.float64, generator=generator(13))
    density = NoisyCircles("blob", 0.0, (0.0,), sd=0.7)
    np.testing.assert_allclose(
        density.log_prob(x), stats.multivariate_normal([0, 0], 0.49).logpdf(x), rtol=1e-12
    )
