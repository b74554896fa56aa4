"""`Interval` against torch's own logit and autograd in float64, and at the edges of float32."""

from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.transforms import Diagonal, Interval

ENDS = [(-4.0, 4.0), (0.0, 1.0), (0.1, 0.7), (-1e3, -999.0), (0, 10)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_values_and_log_dets_in_both_directions(low, high):
    f = Interval(low, high)
    z = (3 * torch.randn(50, 2, 3, dtype=torch.float64)).requires_grad_()
    x, log_det = f.forward_and_log_det(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(x, low + (high - low) * torch.sigmoid(z))
    torch.testing.assert_close(log_det, slope.log())
    inside = x.detach().requires_grad_()
    back, log_det = f.inverse_and_log_det(inside)
    (slope,) = torch.autograd.grad(back.sum(), inside)
    torch.testing.assert_close(back, torch.logit((inside - low) / (high - low)))
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det, slope.log())
    assert torch.equal(f.inverse(inside), back)
    assert torch.equal(f.forward(z), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), ENDS)
def test_far_out_nothing_is_infinite_or_outside(low, high, dtype):
    f = Interval(low, high)
    z = torch.tensor([-300.0, -100, -20, 0, 20, 100, 300], dtype=dtype)
    x, log_det = f.forward_and_log_det(z)
    ends = torch.tensor([low, high], dtype=dtype)
    assert (x >= ends[0]).all()
    assert (x <= ends[1]).all()
    torch.testing.assert_close(log_det[[0, -1]], torch.full_like(ends, math.log(high - low) - 300))
    back, minus = f.inverse_and_log_det(x)  # the ends too, to which it has rounded
    assert back.isfinite().all()
    assert minus.isfinite().all()
    assert (back.diff() >= 0).all()
    assert back[0] < -5
    assert back[-1] > 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (0, 4)])
def test_columns_that_are_not_chosen_stay_as_they_are(batch, dtype):
    f, everywhere = Interval(-4, 4, columns=(0, 2)), Interval(-4, 4)
    z = 3 * torch.randn(*batch, 3, dtype=dtype) + 10  # whose middle column is outside
    z = z.requires_grad_()
    x, log_det = f.forward_and_log_det(z)
    truth, slopes = everywhere.forward_and_log_det(z)
    assert x.dtype == log_det.dtype == dtype
    assert x.shape == log_det.shape == z.shape
    assert torch.equal(x[..., 1], z[..., 1])
    assert torch.equal(x[..., ::2], truth[..., ::2])
    assert torch.equal(log_det[..., ::2], slopes[..., ::2])
    assert not log_det[..., 1].any()
    back, minus = f.inverse_and_log_det(x.detach().requires_grad_())
    assert torch.equal(back[..., 1], z[..., 1])
    if dtype == torch.float64:
        torch.testing.assert_close(back, z)
        torch.testing.assert_close(minus, -log_det)
    (x.sum() + log_det.sum()).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_read_as_a_fraction_of_a_rounding_error_inside(dtype):
    z = Interval(-4, 4).inverse(torch.tensor([-4.0, 4.0], dtype=dtype))
    inside = math.log(8 / torch.finfo(dtype).eps)
    torch.testing.assert_close(z, torch.tensor([-inside, inside], dtype=dtype))


def test_a_flow_has_the_support_of_the_interval():
    """Its density integrates to one over the interval, and only there."""
    torch.manual_seed(1)
    linear = Diagonal(1)
    with torch.no_grad():
        for p in linear.parameters():
            p.normal_()
    flow = cnf.Flow(cnf.StandardNormal(1), cnf.Compose(linear, Interval(-2, 3))).double()
    n = 20_000
    x = -2 + 5 * (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    assert (flow.log_prob(x).exp().sum() * 5 / n).item() == pytest.approx(1, abs=1e-6)
    y, log_prob = flow.sample_and_log_prob((100,))
    torch.testing.assert_close(flow.log_prob(y), log_prob)
    assert (y.amin() > -2) & (y.amax() < 3)
    assert flow.log_prob(torch.tensor([[0.0], [3.1], [-3]]).double()).isfinite().tolist() == [
        True,
        False,
        False,
    ]


def test_traced_values_are_the_same():
    f = Interval(-4, 4, columns=(0,))
    x = torch.tensor([[1.0, 5.0], [-2.0, 7.0]])
    for method in (f.forward_and_log_det, f.inverse_and_log_det):
        for seen, truth in zip(torch.func.vmap(method)(x), method(x), strict=True):
            torch.testing.assert_close(seen, truth)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1, 1), ValueError, "low=1 must be less than high=1"),
        ((2, 1), ValueError, "low=2 must be less than high=1; swap"),
        ((math.inf, 1), ValueError, "low=inf must be less than high=1"),
        ((0, math.nan), ValueError, "high=nan must be a number"),
        ((torch.zeros(2), 1.0, (0,)), ValueError, "ends that are numbers.*-inf and inf"),
        ((torch.tensor([0.0, 2.0]), 1.0), ValueError, r"1 of 2 pairs .*first index \(1,\): low=2"),
        ((0.0, torch.tensor(math.nan)), ValueError, "neither NaN, but 1 of 1"),
        ((torch.zeros(2), torch.ones(3)), ValueError, r"\(2,\) and \(3,\), which do not broadcast"),
        ((torch.zeros(2) > 1, 1.0), TypeError, "low must hold numbers, got torch.bool"),
        (("0", 1), TypeError, "low='0' must be a number"),
        ((0, True), TypeError, "high=True must be a number"),
        ((0, 1, (0, 0)), ValueError, r"columns=\(0, 0\) must be different"),
        ((0, 1, ()), ValueError, r"columns=\(\) must be different"),
        ((0, 1, (-1,)), ValueError, r"columns=\(-1,\) must be different"),
        ((0, 1, 0), TypeError, "columns=0 must be a sequence"),
    ],
)
def test_what_is_no_interval_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Interval(*arguments)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (
            torch.tensor([0.5, 1.5, -2.0]),
            ValueError,
            r"2 values .*Interval\(0.0, 1.0\).* from -2 to 1.5",
        ),
        (torch.tensor([0.5, math.inf]), ValueError, "1 values outside"),
        (torch.tensor([1]), TypeError, "x must be float32 or float64"),
    ],
)
def test_samples_outside_are_refused(x, error, words):
    with pytest.raises(error, match=words):
        Interval(0, 1).inverse(x)


def test_other_bad_calls():
    f = Interval(0, 1, columns=(2,))
    with pytest.raises(ValueError, match="too few columns"):
        f.forward(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="takes none"):
        f.forward(torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(TypeError, match="steps cannot be chosen"):
        f.forward(torch.zeros(5, 3), steps=3)
    assert Interval(0, 1).inverse(torch.tensor([math.nan])).isnan().all()


def test_half_lines_against_torchs_softplus_and_autograd():
    softplus = torch.distributions.transforms.SoftplusTransform()
    z = (5 * torch.randn(60, 3, dtype=torch.float64)).requires_grad_()
    above, below = Interval(-2, math.inf), Interval(-math.inf, 3)
    x, log_det = above.forward_and_log_det(z)
    torch.testing.assert_close(x, softplus(z) - 2)
    torch.testing.assert_close(log_det, softplus.log_abs_det_jacobian(z, None))
    mirrored, same = below.forward_and_log_det(-z)
    torch.testing.assert_close(mirrored, 1 - x)
    torch.testing.assert_close(same, log_det)
    for f, samples in ((above, x), (below, mirrored)):
        inside = samples.detach().requires_grad_()
        back, minus = f.inverse_and_log_det(inside)
        (slope,) = torch.autograd.grad(back.sum(), inside)
        torch.testing.assert_close(minus, slope.log())
        torch.testing.assert_close(back, z if f is above else -z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [0.0, -2.0, 1e3])
def test_half_lines_at_extreme_numbers(low, dtype):
    """Neither overflow nor NaN, in values and gradients; far out it is a shift."""
    f, largest = Interval(low, math.inf), torch.finfo(dtype).max / 2
    z = torch.tensor([-largest, -1e4, -80.0, 0, 80, 1e4, largest], dtype=dtype).requires_grad_()
    x, log_det = f.forward_and_log_det(z)
    assert ((x >= low) & x.isfinite()).all()
    torch.testing.assert_close(x[4:], z[4:] + low)
    torch.testing.assert_close(log_det[:2], z[:2])
    torch.testing.assert_close(log_det[4:], torch.zeros_like(z[4:]))
    (gradient,) = torch.autograd.grad(x.sum() + log_det.clamp(min=-9).sum(), z)
    assert gradient.isfinite().all()
    inside = x.detach().requires_grad_()
    back, minus = f.inverse_and_log_det(inside)
    assert back.isfinite().all()
    assert minus.isfinite().all()
    assert (back.diff() >= 0).all()
    torch.testing.assert_close(back[3:], z[3:], atol=1e-3, rtol=1e-5)
    (gradient,) = torch.autograd.grad(back.clamp(min=-9).sum(), inside)
    assert gradient.isfinite().all()


KINDS = torch.tensor([[-1.0, 2.0], [0.5, math.inf], [-math.inf, 4.0], [-math.inf, math.inf]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_hold_the_ends_of_each_number(dtype):
    """One transform of all is one of each, by number; and it moves, converts and is saved."""
    low, high = KINDS.unbind(1)
    f = Interval(low, high).to(dtype)
    z = 4 * torch.randn(7, 4, dtype=dtype)
    x, log_det = f.forward_and_log_det(z)
    back, minus = f.inverse_and_log_det(x)
    for i, (a, b) in enumerate(KINDS.tolist()):
        truth, slope = Interval(a, b).forward_and_log_det(z[:, i])
        torch.testing.assert_close(x[:, i], truth)
        torch.testing.assert_close(log_det[:, i], slope)
        truth, slope = Interval(a, b).inverse_and_log_det(x[:, i])
        torch.testing.assert_close(back[:, i], truth)
        torch.testing.assert_close(minus[:, i], slope)
    other = Interval(torch.zeros(4), torch.ones(4)).to(dtype)
    other.load_state_dict(f.state_dict())
    assert torch.equal(other.forward(z), x)
    low.fill_(0.9)
    assert torch.equal(f.forward(z), x), "the caller's tensor is not the transform's"
    assert torch.func.vmap(f.forward)(z).allclose(x)
    with pytest.raises(ValueError, match=r"x has shape \(7, 3\), expected \(\.\.\., D=4\)"):
        f.forward(z[:, :3])


def test_the_density_on_mixed_ends_integrates_to_one():
    """Over each of the ends, by the rule of midpoints."""
    for low, high in ((0.0, math.inf), (-math.inf, 1.0), (-1.0, 2.0)):
        flow = cnf.Flow(cnf.StandardNormal(1), Interval(torch.tensor([low]), torch.tensor([high])))
        start, end = max(low, -12.0), min(high, 12.0)
        x = start - 1 + (end - start + 2) * (torch.arange(40_000) + 0.5).double() / 40_000
        mass = flow.double().log_prob(x[:, None]).exp().mean() * (end - start + 2)
        assert mass.item() == pytest.approx(1, abs=1e-4)
