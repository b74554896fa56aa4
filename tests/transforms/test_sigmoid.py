"""`Sigmoid` against torch's own logit in float64, and at the edges of float32."""

from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.transforms import Sigmoid, Split

ALPHAS = [1e-6, 0.05, 0.4]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_det_is_the_derivative(alpha) -> None:
    f = Sigmoid(alpha)
    z = (3 * torch.randn(50, 2, 3, dtype=torch.float64)).requires_grad_()
    x, log_det = f.forward_and_log_det(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(log_det, slope.log())
    inside = x.detach().clamp(0, 1).requires_grad_()
    back, log_det = f.inverse_and_log_det(inside)
    (slope,) = torch.autograd.grad(back.sum(), inside)
    torch.testing.assert_close(log_det, slope.log())
    torch.testing.assert_close(back, torch.logit(alpha + (1 - 2 * alpha) * inside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_both_ends_keep_their_digits(alpha, dtype) -> None:
    """At x = 1 in float32, 1 - s would have one digit left for alpha = 1e-6."""
    x = torch.tensor([0.0, 1e-7, 0.3, 1 - 2**-24, 1.0], dtype=torch.float64).to(dtype)
    z, log_det = Sigmoid(alpha).inverse_and_log_det(x)
    s, rest = (alpha + (1 - 2 * alpha) * side for side in (x.double(), 1 - x.double()))
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(z, s.log() - rest.log(), **close)
    torch.testing.assert_close(log_det, math.log1p(-2 * alpha) - s.log() - rest.log(), **close)
    torch.testing.assert_close(z[0], -z[-1])
    torch.testing.assert_close(Sigmoid(alpha).forward(z), x, rtol=0, atol=1e-6)


def test_far_out_nothing_is_infinite() -> None:
    x, log_det = Sigmoid(0.05).forward_and_log_det(torch.tensor([-200.0, 200.0]))
    torch.testing.assert_close(x, torch.tensor([-0.05 / 0.9, 0.95 / 0.9]))
    torch.testing.assert_close(log_det, torch.full((2,), -200 - math.log(0.9)))


def test_its_log_dets_are_summed_over_samples_wherever_it_stands() -> None:
    f = Sigmoid(0.1)
    z = torch.randn(4, 5, 2, 3, 3)
    each = f.forward_and_log_det(z)[1]
    assert each.shape == z.shape
    linear = cnf.transforms.Diagonal((2, 3, 3))
    truth = each.sum((2, 3, 4))
    for composed in (cnf.Compose(linear, f), cnf.Compose(linear, cnf.Compose(f))):
        x, log_det = composed.forward_and_log_det(z)
        torch.testing.assert_close(log_det, truth)
        back, log_det = composed.inverse_and_log_det(x)
        torch.testing.assert_close(log_det, -truth, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(back, z, atol=1e-5, rtol=1e-5)
    split = Split(f, (2, 3, 3))
    x, log_det = split.forward_and_log_det(z)
    torch.testing.assert_close(log_det, each[:, :, 0].sum((2, 3)))
    torch.testing.assert_close(split.inverse_and_log_det(x)[1], -log_det, atol=1e-4, rtol=1e-5)
    flow = cnf.Flow(cnf.StandardNormal(2, 3, 3), f)
    x = f.forward(z)
    truth = cnf.StandardNormal(2, 3, 3).log_prob(z) - truth
    torch.testing.assert_close(flow.log_prob(x), truth, atol=1e-3, rtol=1e-5)
    x, log_prob = flow.sample_and_log_prob((4,))
    torch.testing.assert_close(flow.log_prob(x), log_prob, atol=1e-3, rtol=1e-5)
    assert flow.score(x).shape == x.shape


def test_scalars_and_empty_batches() -> None:
    flow = cnf.Flow(cnf.StandardNormal(), Sigmoid())
    assert flow.log_prob(torch.rand(7)).shape == (7,)
    assert flow.log_prob(torch.tensor(0.5)).shape == ()
    assert cnf.Flow(cnf.StandardNormal(2), Sigmoid()).log_prob(torch.rand(0, 2)).shape == (0,)


def test_columns_that_are_not_chosen_stay_as_they_are() -> None:
    f, all_of_them = Sigmoid(0.05, columns=(0, 2)).double(), Sigmoid(0.05)
    z = (3 * torch.randn(5, 4, 3, dtype=torch.float64)).requires_grad_()
    x, log_det = f.forward_and_log_det(z)
    truth, slopes = all_of_them.forward_and_log_det(z)
    assert torch.equal(x[..., 1], z[..., 1])
    assert torch.equal(x[..., ::2], truth[..., ::2])
    assert torch.equal(log_det[..., ::2], slopes[..., ::2])
    assert not log_det[..., 1].any()
    back, minus = f.inverse_and_log_det(x.detach())  # whose middle column is no probability
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(minus, -log_det)
    x.sum().backward()
    assert z.grad.isfinite().all()
