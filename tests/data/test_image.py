"""A picture as a density: against the brute-force mixture, and the right way up."""

from __future__ import annotations

import builtins
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special

from cnf.data import ImageDensity

LEAF = Path(__file__).parents[2].parent / "shared" / "data" / "IMG2D" / "maple_leaf.jpg"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 12, width: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (height, width), generator=generator(), dtype=torch.uint8)


def brute_log_prob(image: np.ndarray, x: np.ndarray, extent: float = 4.0) -> np.ndarray:
    weights = image.max() - image.astype(float)
    height, width = image.shape
    a, b = np.meshgrid(np.linspace(-extent, extent, width), np.linspace(extent, -extent, height))
    sx, sy = extent / width, extent / height
    with np.errstate(divide="ignore"):
        log_w = np.log(weights / weights.sum())
    square = ((x[:, 0, None, None] - a) / sx) ** 2 + ((x[:, 1, None, None] - b) / sy) ** 2
    return special.logsumexp(log_w - square / 2, axis=(1, 2)) - np.log(2 * np.pi * sx * sy)


def test_log_prob_against_the_mixture_near_and_far():
    image = picture()
    x = 5 * torch.randn(300, 2, dtype=torch.float64, generator=generator(1))
    x = torch.cat((x, 100 * x[:5]))
    np.testing.assert_allclose(
        ImageDensity(image).log_prob(x), brute_log_prob(image.numpy(), x.numpy()), rtol=1e-10
    )
    wide = ImageDensity(image, extent=7.0).log_prob(x)
    np.testing.assert_allclose(wide, brute_log_prob(image.numpy(), x.numpy(), 7.0), rtol=1e-10)


def test_log_prob_in_the_middle_of_a_white_hole():
    """Where the plain sum underflows, the sum over the edge of the ink takes over."""
    image = np.full((60, 80), 255, dtype=np.uint8)
    image[3:20, 5:30] = np.random.default_rng(0).integers(0, 255, (17, 25))
    density = ImageDensity(image)
    x = torch.cat(
        (
            torch.tensor([[3.9, -3.9], [3.0, 0.0], [0.5, -3.0]]),
            4 * torch.rand(50, 2, generator=generator(2)),
        )
    )
    x = x.double().requires_grad_()
    log_p = density.log_prob(x)
    assert float(log_p.detach().min()) < -2000
    np.testing.assert_allclose(
        log_p.detach(), brute_log_prob(image, x.detach().numpy()), rtol=1e-10
    )
    log_p.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert density.edge.shape[1] < (image < 255).sum() / 2


def test_gradient():
    x = (2 * torch.randn(5, 2, dtype=torch.float64, generator=generator(3))).requires_grad_()
    assert torch.autograd.gradcheck(ImageDensity(picture(20, 20)).log_prob, x)


def test_integral_and_entropy():
    density = ImageDensity(picture())
    line = torch.arange(-8, 8, 0.04, dtype=torch.float64)
    log_p = density.log_prob(torch.stack(torch.meshgrid(line, line, indexing="ij"), -1))
    assert float(log_p.exp().sum()) * 0.04**2 == pytest.approx(1, abs=1e-9)
    assert -float((log_p.exp() * log_p).sum()) * 0.04**2 == pytest.approx(density.entropy, abs=1e-6)


def test_entropy_of_one_pixel_is_that_of_a_gaussian():
    density = ImageDensity(np.array([[0, 1], [1, 1]]), extent=2.0)
    assert density.entropy == pytest.approx(math.log(2 * math.pi * math.e), abs=1e-9)


def test_samples_follow_the_density():
    density, n = ImageDensity(picture()), 100_000
    x = density.sample(n, generator(4), dtype=torch.float64)
    surprise = -density.log_prob(x)
    assert abs(float(surprise.mean()) - density.entropy) < 4.5 * float(surprise.std()) / math.sqrt(
        n
    )
    edges = np.linspace(-6, 6, 9)
    cdf_x = special.ndtr((edges[:, None] - density.columns.numpy()) / density.sd[0])  # (9, W)
    cdf_y = special.ndtr((edges[:, None] - density.rows.numpy()) / density.sd[1])  # (9, H)
    expected = n * np.diff(cdf_y, axis=0) @ density.weights.numpy() @ np.diff(cdf_x, axis=0).T
    seen = np.histogram2d(x[:, 1], x[:, 0], bins=[edges, edges])[0]
    full = expected > 20
    assert np.abs((seen - expected)[full] / np.sqrt(expected[full])).max() < 4.5


def test_the_picture_is_upright():
    image = np.full((10, 20), 255, dtype=np.uint8)
    image[0, -1] = 0  # a black pixel in the top right corner
    x = ImageDensity(image).sample(100, generator(5))
    assert bool((x > 2).all())
    x = ImageDensity(255 - image, invert=False).sample(100, generator(5))
    assert bool((x > 2).all())
    assert ImageDensity(image).sd == (4 / 20, 4 / 10)


def test_white_pixels_are_never_drawn():
    image = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert (
        ImageDensity(image)
        .sample(1000, generator(6))
        .mean(0)
        .sub(torch.tensor([0.0, 4.0]))
        .abs()
        .max()
        < 0.3
    )


def test_reproducible_and_leaves_the_global_generator_alone():
    density, state = ImageDensity(picture()), torch.get_rng_state()
    assert torch.equal(density.sample(5, generator(7)), density.sample(5, generator(7)))
    assert not torch.equal(density.sample(5), density.sample(5))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype):
    density = copy.deepcopy(ImageDensity(picture()))
    x = density.sample(6, generator(8), dtype=dtype)
    assert x.shape == (6, 2)
    assert x.dtype == dtype
    assert density.log_prob(x.reshape(2, 3, 2)).shape == (2, 3)
    assert density.log_prob(x).dtype == dtype
    assert density.sample(0).shape == (0, 2)
    assert density.log_prob(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="n must be 0 or more, got -3"):
        density.sample(-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    density = ImageDensity(picture())
    x = density.sample(
        1000, torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.float64
    )
    x = torch.cat((x, 100 * x))
    torch.testing.assert_close(density.log_prob(x).cpu(), density.log_prob(x.cpu()))


@pytest.mark.parametrize(
    ("image", "arguments", "error", "message"),
    [
        (
            np.zeros((3, 3, 3)),
            {},
            ValueError,
            r"image must be real grey values .*\(3, 3, 3\); average",
        ),
        (np.zeros((1, 5)), {}, ValueError, r"at least 2 x 2, got torch.float64 \(1, 5\)"),
        (np.zeros((2, 2), complex), {}, ValueError, "got torch.complex128"),
        ("leaf.png", {}, TypeError, "image must be an array of grey values, got str"),
        (np.array([[math.nan, 1.0], [0.0, 1.0]]), {}, ValueError, "image has 1 non-finite values"),
        (np.ones((4, 4)), {}, ValueError, "image is constant at 1.0, so no pixel has weight"),
        (
            np.array([[-1.0, 1.0], [0.0, 1.0]]),
            {"invert": False},
            ValueError,
            "got a minimum of -1.0",
        ),
        (np.eye(3), {"extent": 0.0}, ValueError, "extent must be positive and finite, got 0.0"),
        (
            np.eye(3),
            {"extent": math.inf},
            ValueError,
            "extent must be positive and finite, got inf",
        ),
    ],
)
def test_bad_images(image, arguments, error, message):
    with pytest.raises(error, match=message):
        ImageDensity(image, **arguments)


def test_open_reads_grey_colour_and_transparent_pictures(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    grey = picture()
    image_module.fromarray(grey.numpy()).save(tmp_path / "leaf.png")
    density = ImageDensity.open(tmp_path / "leaf.png")
    assert density.name == "leaf"
    assert torch.equal(density.weights, ImageDensity(grey).weights)
    layers = np.zeros((5, 6, 4), np.uint8)  # black, and transparent but for one pixel
    layers[1, 2, 3] = 255
    image_module.fromarray(layers).save(tmp_path / "dot.png")
    assert ImageDensity.open(tmp_path / "dot.png").weights[1, 2] == 1


def test_open_says_what_is_wrong(tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError):
        ImageDensity.open(tmp_path / "none.png")
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="is no picture that Pillow can read"):
        ImageDensity.open(tmp_path / "words.png")
    plain = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: _refuse() if name == "PIL" else plain(name, *rest),
    )
    with pytest.raises(ImportError, match=r"needs Pillow; pip install \"cnf\[examples\]\""):
        ImageDensity.open(tmp_path / "words.png")


def _refuse():
    raise ImportError


@pytest.mark.skipif(not LEAF.exists(), reason="the picture is not here")
def test_a_real_picture():
    pytest.importorskip("PIL.Image")
    density = ImageDensity.open(LEAF)
    assert density.weights.shape == (565, 612)
    surprise = -density.log_prob(density.sample(5000, generator(9)))
    assert abs(float(surprise.mean()) - density.entropy) < 4.5 * float(surprise.std()) / math.sqrt(
        5000
    )
