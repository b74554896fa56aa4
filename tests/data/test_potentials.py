"""The potentials against the paper's formulas, their normalisers against quadrature."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from cnf.data import POTENTIALS, potential, toy

TABLE = {1: 1.877502, 2: 2.082089, 3: 2.641705, 4: 2.710698}


def energy(k: int, x: float, y: float) -> float:
    """U_k as the paper prints it, by plain exponentials."""
    w1 = math.sin(2 * math.pi * x / 4)
    w2 = 3 * math.exp(-0.5 * ((x - 1) / 0.6) ** 2)
    w3 = 3 / (1 + math.exp(-(x - 1) / 0.3))
    if k == 1:
        ends = math.exp(-0.5 * ((x - 2) / 0.6) ** 2) + math.exp(-0.5 * ((x + 2) / 0.6) ** 2)
        return 0.5 * ((math.hypot(x, y) - 2) / 0.4) ** 2 - math.log(ends)
    if k == 2:
        return 0.5 * ((y - w1) / 0.4) ** 2
    first, second = (0.35, 0.35) if k == 3 else (0.4, 0.35)
    other = w2 if k == 3 else w3
    one = math.exp(-0.5 * ((y - w1) / first) ** 2)
    return -math.log(one + math.exp(-0.5 * ((y - w1 + other) / second) ** 2))


@pytest.mark.parametrize("k", POTENTIALS)
def test_the_formulas(k):
    x = 1.5 * torch.randn(200, 2, dtype=torch.float64).clamp(-2, 2)
    truth = [-energy(k, *point) for point in x.tolist()]
    torch.testing.assert_close(potential(k).log_density(x), torch.tensor(truth).double())


@pytest.mark.parametrize("k", POTENTIALS)
def test_the_normaliser_by_quadrature(k):
    """The midpoint rule across, the trapezoidal rule up: both exact to rounding here."""
    target = potential(k)
    low, high = (-7.0, 7.0) if k == 1 else target.support[0]
    n, step = 1000, 0.02
    xs = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ys = torch.arange(-10, 10, step, dtype=torch.float64)
    values = target.log_density(torch.cartesian_prod(xs, ys))
    found = values.logsumexp(0).item() + math.log((high - low) / n * step)
    # The midpoint rule's error at the strip's ends is that of a function that is constant across.
    assert found == pytest.approx(target.log_normalizer, abs=1e-9)
    assert target.log_normalizer == pytest.approx(TABLE[k], abs=5e-7)
    torch.testing.assert_close(target.log_prob(xs[:7, None].expand(7, 2)).isfinite().all(),
                               torch.tensor(True))  # fmt: skip


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_support_is_the_strip(k):
    beyond = torch.nextafter(torch.tensor(4.0), torch.tensor(5.0))
    x = torch.tensor([[-4.0, 0], [4.0, 0], [beyond, 0], [-beyond, 0], [1e30, 0]])
    assert potential(k).log_density(x).isfinite().tolist() == [True, True, False, False, False]
    assert (potential(k).log_density(x)[2:] == -math.inf).all()
    assert potential(k).support == ((-4, 4), (-math.inf, math.inf))
    assert potential(1).log_density(x).isfinite()[:4].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", POTENTIALS)
def test_far_out_values_and_gradients_are_finite(k, dtype):
    """exp of the energies underflows there."""
    x = torch.tensor([[0.0, 0], [1, 100], [-4, -100], [3.9, 1e4]], dtype=dtype).requires_grad_()
    value = potential(k).log_density(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("k", POTENTIALS)
def test_gradients_and_batch_shapes(k):
    target = potential(k)
    x = torch.randn(4, 3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(target.log_density, (x,))
    value = target.log_density(x)
    assert value.shape == (4, 3)
    torch.testing.assert_close(target.log_density(x[1, 2]), value[1, 2])
    torch.testing.assert_close(torch.func.vmap(target.log_density)(x), value)
    torch.testing.assert_close(target.log_prob(x), value - TABLE[k], atol=1e-6, rtol=0)
    assert target.log_density(x[:0]).shape == (0, 3)
    assert pickle.loads(pickle.dumps(target)) == target
    assert target.log_density(x.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), TypeError),
        ([[0.0, 0.0]], TypeError),
        (torch.zeros(3, 3), ValueError),
        (torch.zeros(()), ValueError),
        (torch.tensor([[0.0, 0], [math.nan, 0], [0, math.inf]]), ValueError),
    ],
)
def test_points_are_checked_as_those_of_other_densities(x, error):
    with pytest.raises(error) as mine:
        potential(1).log_density(x)
    with pytest.raises(error) as other:
        toy("8gaussians").log_prob(x)
    assert str(mine.value) == str(other.value).replace("8gaussians", "potential 1")


@pytest.mark.parametrize("number", [0, 5, "1", True, 1.5, None])
def test_other_numbers_are_refused(number):
    with pytest.raises(ValueError, match=r"number=.* is not known; expected one of 1, 2, 3, 4"):
        potential(number)
