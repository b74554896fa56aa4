"""The rational-quadratic spline against a scalar implementation, at its bounds, and in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnf.transforms import RationalQuadraticSpline

SPLINE = RationalQuadraticSpline(bins=5, bound=3.0)


def reference(x: float, raw: np.ndarray, bins: int, bound: float) -> tuple[float, float]:
    """z and dz/dx of one number, by the formulas (4) to (8) of arXiv 1906.04032."""
    if not -bound < x < bound:
        return x, 1.0
    sizes = []
    for part in (raw[:bins], raw[bins : 2 * bins]):
        share = np.exp(part - part.max())
        sizes.append(2 * bound * (0.1 / bins + 0.9 * share / share.sum()))
    slopes = [1.0, *(0.01 + np.log1p(np.exp(raw[2 * bins :] + math.log(math.expm1(0.99))))), 1.0]
    knots = [np.concatenate([[-bound], -bound + np.cumsum(size)]) for size in sizes]
    k = min(int(np.searchsorted(knots[0], x, side="right")) - 1, bins - 1)
    w, h = sizes[0][k], sizes[1][k]
    s, t = h / w, (x - knots[0][k]) / w
    below = s + (slopes[k + 1] + slopes[k] - 2 * s) * t * (1 - t)
    z = knots[1][k] + h * (s * t**2 + slopes[k] * t * (1 - t)) / below
    above = s**2 * (slopes[k + 1] * t**2 + 2 * s * t * (1 - t) + slopes[k] * (1 - t) ** 2)
    return z, above / below**2


def test_it_is_the_spline_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(200, 3, generator=generator, dtype=torch.float64) - 3
    x[0], x[1] = 2.5, -2.999999
    raw = 2 * torch.randn(200, SPLINE.parameters, 3, generator=generator, dtype=torch.float64)
    z, log_slope = SPLINE.inverse(x, raw)
    for i in range(200):
        for d in range(3):
            value, slope = reference(float(x[i, d]), raw[i, :, d].numpy(), 5, 3.0)
            assert z[i, d].item() == pytest.approx(value, abs=1e-12)
            assert log_slope[i, d].item() == pytest.approx(math.log(slope), abs=1e-11)


def test_parameters_of_zero_are_the_identity() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64).reshape(1, -1)
    raw = torch.zeros(1, SPLINE.parameters, 101, dtype=torch.float64)
    for direction in (SPLINE.forward, SPLINE.inverse):
        value, log_slope = direction(x, raw)
        assert torch.allclose(value, x, atol=1e-14)
        assert log_slope.abs().max() < 1e-14


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_at_and_beyond_the_bounds_it_is_the_identity_with_finite_gradients(direction) -> None:
    x = torch.tensor([[-1e6, -3.5, -3.0, 3.0, 3.5, 1e6, math.inf, -math.inf]])
    raw = 10 * torch.randn(1, SPLINE.parameters, x.shape[1])
    x.requires_grad_()
    raw.requires_grad_()
    value, log_slope = getattr(SPLINE, direction)(x, raw)
    assert torch.equal(value, x)
    assert torch.equal(log_slope, torch.zeros_like(x))
    grads = torch.autograd.grad(value[:, :6].sum() + log_slope.sum(), (x, raw))
    assert torch.equal(grads[0][:, :6], torch.ones(1, 6))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_it_is_continuous_with_its_slope_at_the_bounds(direction) -> None:
    raw = torch.randn(1, SPLINE.parameters, 2, dtype=torch.float64)
    x = torch.tensor([[-3.0 + 1e-9, 3.0 - 1e-9]], dtype=torch.float64)
    value, log_slope = getattr(SPLINE, direction)(x, raw)
    assert torch.allclose(value, x, atol=1e-7)
    assert log_slope.abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_slope_is_the_derivative_also_at_knots(direction) -> None:
    torch.manual_seed(0)
    raw = 2 * torch.randn(1, SPLINE.parameters, 1, dtype=torch.float64)
    sizes = [0.1 / 5 + 0.9 * raw[0, i : i + 5, 0].softmax(0) for i in (0, 5)]
    knots = -3 + 6 * sizes[direction == "forward"].cumsum(0)[:-1]
    x = torch.cat([knots, torch.linspace(-2.9, 2.9, 50, dtype=torch.float64)])[:, None]
    x.requires_grad_()
    value, log_slope = getattr(SPLINE, direction)(x, raw.expand(len(x), -1, -1))
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(log_slope.exp(), slope, rtol=1e-9)


@pytest.mark.parametrize(
    ("bins", "scale", "limit"), [(8, 1, 1e-4), (8, 3, 1e-4), (32, 3, 5e-4), (8, 10, 1e-3)]
)
def test_in_float32_steep_splines_come_back_to_where_they_went(
    bins: int, scale: int, limit: float
) -> None:
    """The residual in the output space; in the input space it is as ill-conditioned as they are."""
    spline = RationalQuadraticSpline(bins)
    torch.manual_seed(scale)
    for _ in range(200):
        raw = (scale * torch.randn(64, spline.parameters, 4)).requires_grad_()
        z = torch.cat([3 * torch.randn(62, 4), torch.tensor([[5.0] * 4, [-5.0] * 4])])
        z.requires_grad_()
        x, log_slope = spline.forward(z, raw)
        returned, negative = spline.inverse(x, raw)
        assert (returned - z).abs().max() <= limit
        assert (log_slope + negative).abs().max() <= 1e-3
        grads = torch.autograd.grad((x + log_slope + returned + negative).sum(), (z, raw))
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("bins", [8, 64])
@pytest.mark.parametrize("scale", [3, 30])
def test_at_its_knots_and_for_wild_splines_nothing_is_nan_in_float32(bins: int, scale: int) -> None:
    spline = RationalQuadraticSpline(bins)
    torch.manual_seed(0)
    raw = (scale * torch.randn(5000, spline.parameters, 1)).requires_grad_()
    for axis, direction in enumerate((spline.inverse, spline.forward)):
        sizes = spline._sizes(raw[:, axis * bins : (axis + 1) * bins].detach())
        knots = sizes[:, :-1].cumsum(1) - spline.bound
        for j in range(0, bins - 1, max(1, bins // 8)):
            for x in (knots[:, j], torch.nextafter(knots[:, j], knots[:, j] + 1)):
                value, log_slope = direction(x, raw)
                assert value.isfinite().all()
                assert log_slope.isfinite().all()
                assert (value.abs() <= spline.bound + 1e-5).all()
    (value.sum() + log_slope.sum()).backward()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("bins", [1, 0, 2.5, True])
def test_a_wrong_number_of_bins_is_refused(bins) -> None:
    with pytest.raises(ValueError, match="bins="):
        RationalQuadraticSpline(bins=bins)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_wrong_bound_is_refused(bound) -> None:
    with pytest.raises(ValueError, match="bound="):
        RationalQuadraticSpline(bound=bound)
