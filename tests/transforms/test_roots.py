"""The root of a + k h(a) = y: its accuracy, its derivatives, and what k > -1 is made from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cnf.transforms import roots
from cnf.transforms.roots import ACTIVATIONS, FLOOR, above_minus_one, root

each_activation = pytest.mark.parametrize("h", ACTIVATIONS.values(), ids=ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y from 1e-8 to 1e6 of both signs and 0, against 1 + k from 1e-6 to 1e6."""
    sizes = 10 ** torch.linspace(-8, 6, 400, dtype=torch.float64)
    y = torch.cat((-sizes, sizes.new_zeros(1), sizes))
    p = 10 ** torch.linspace(-6, 6, 37, dtype=torch.float64)
    return tuple(t.flatten().to(dtype) for t in torch.meshgrid(y, p, indexing="ij"))


@each_dtype
@each_activation
def test_the_root_solves_the_equation_to_machine_precision(h, dtype) -> None:
    y, p = grid(dtype)
    a = root(h, y, p)
    value = h(a)[0]
    residual = (a - value + p * value - y).abs()
    terms = a.abs() + y.abs() + p * value.abs()
    assert (residual <= 8 * torch.finfo(dtype).eps * terms).all()


@each_activation
def test_more_iterations_change_nothing(h, monkeypatch) -> None:
    y, p = grid(torch.float64)
    a = root(h, y, p)
    monkeypatch.setattr(roots, "ITERATIONS", 100)
    more = root(h, y, p)
    _, slope, rest = h(a)
    slope = rest + p * slope
    size = a.abs() + y.abs() + p * h(a)[0].abs()
    assert ((a - more).abs() * slope <= 1e-14 * size).all()


@each_dtype
def test_a_kink_is_found_in_closed_form(dtype) -> None:
    y, p = grid(dtype)
    truth = torch.where(y > 0, y / p, y / (0.99 + 0.01 * p))
    found = root(ACTIVATIONS["leaky_relu"], y, p)
    assert torch.allclose(found, truth, rtol=1e-13 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_in_both_arguments_and_within_the_activation(name: str) -> None:
    y = torch.linspace(-3, 3.5, 7, dtype=torch.float64, requires_grad=True)
    p = torch.logspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    shift = torch.full((7,), 0.3, dtype=torch.float64, requires_grad=True)

    def solve(y: Tensor, p: Tensor, shift: Tensor) -> Tensor:
        return root(lambda a: ACTIVATIONS[name](a + shift), y, p)

    assert torch.autograd.gradcheck(solve, (y, p, shift))
    assert torch.autograd.gradgradcheck(solve, (y, p, shift))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_derivatives_in_forward_mode() -> None:
    y, p = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.1

    def solve(y: Tensor) -> Tensor:
        return root(ACTIVATIONS["tanh"], y, p)

    _, slope, rest = ACTIVATIONS["tanh"](solve(y))
    with torch.no_grad():
        _, tangent = torch.func.jvp(solve, (y,), (torch.ones_like(y),))
    assert torch.allclose(tangent, 1 / (rest + p * slope))


@each_dtype
@each_activation
def test_derivatives_leave_the_root_where_it_is(h, dtype) -> None:
    y, p = grid(dtype)
    p.requires_grad_()
    a = root(h, y, p)
    assert torch.equal(a, roots._solve(h, y, p))
    (gradient,) = torch.autograd.grad(a.sum(), p)
    assert gradient.isfinite().all()


@each_activation
def test_vmap(h) -> None:
    y, p = torch.randn(20), torch.rand(20) * 3
    assert torch.allclose(torch.func.vmap(lambda y, p: root(h, y, p))(y, p), root(h, y, p))


@each_activation
def test_activations_rise_with_slopes_from_zero_to_one(h) -> None:
    a = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    value, slope, rest = h(a)
    (truth,) = torch.autograd.grad(value.sum(), a)
    assert torch.allclose(slope, truth, rtol=1e-12, atol=1e-15)
    assert torch.allclose(slope + rest, torch.ones_like(a), atol=1e-15)
    assert ((slope >= 0) & (rest >= 0)).all()


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("tanh", torch.tanh),
        ("softplus", lambda a: torch.logaddexp(a, torch.zeros_like(a))),
        ("elu", torch.nn.functional.elu),
        ("leaky_relu", torch.nn.functional.leaky_relu),
        ("sigmoid", torch.sigmoid),
        ("arctan", torch.arctan),
    ],
)
def test_activations_are_what_their_names_say(name: str, truth) -> None:
    a = torch.linspace(-80, 80, 999, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](a)[0], truth(a), rtol=1e-14, atol=1e-15)


@each_dtype
@each_activation
def test_activations_at_huge_values_and_zero(h, dtype) -> None:
    a = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30], dtype=dtype, requires_grad=True)
    values = h(a)
    first = torch.autograd.grad(sum(v.sum() for v in values), a, create_graph=True)[0]
    assert all(v.isfinite().all() for v in (*values, first))
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), a)[0].isfinite().all()


def test_above_minus_one_is_the_shifted_softplus() -> None:
    a = torch.linspace(-30, 60, 901, dtype=torch.float64)
    k, p = above_minus_one(a)
    truth = FLOOR + torch.log1p(math.expm1(1 - FLOOR) * torch.exp(a))
    assert torch.allclose(p, truth, rtol=1e-13)
    assert torch.allclose(k, truth - 1, atol=1e-13)
    assert (k[1:] > k[:-1]).all()


def test_above_minus_one_loses_no_digits() -> None:
    small = torch.tensor([-1e-30, -1e-7, 0.0, 1e-7, 1e-30])
    k, _ = above_minus_one(small)
    slope = -math.expm1(FLOOR - 1)
    assert torch.allclose(k, small * slope, rtol=1e-5, atol=0)
    assert k[2] == 0
    k, p = above_minus_one(torch.tensor([-1000.0, 1000.0]))
    assert p[0] == torch.tensor(FLOOR)
    assert torch.allclose(k, torch.tensor([FLOOR - 1, 1000.0]), rtol=1e-3)


def test_derivatives_of_above_minus_one() -> None:
    a = torch.tensor([-40.0, -1.0, 0.0, 1e-9, 1.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(above_minus_one, a)
    assert torch.autograd.gradgradcheck(above_minus_one, a)
