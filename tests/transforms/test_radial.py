"""Radial flows against brute force, at their limits, and through torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from cnf.transforms.radial import Radial

from .brute_force import (
    DIRECTIONS,
    DOUBLE,
    brute_force,
    drawn,
    each_context,
    each_direction,
    inputs,
)


@pytest.mark.parametrize("features", [1, 3, (2, 1, 2)], ids=str)
@each_context
@each_direction
def test_log_det_equals_brute_force(direction, context, features) -> None:
    layer = drawn(Radial(features, context), 2.0).double()
    args = inputs(layer, 20)
    _, log_det = getattr(layer, f"{direction}_and_log_det")(*args)
    sign, truth = brute_force(layer, direction, *args)
    assert truth.abs().max() > 0.1
    assert (sign > 0).all()
    assert (log_det - truth).abs().max() <= 1e-9


def test_two_hundred_layers_are_invertible_and_exact_in_float32() -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        layer = drawn(Radial(3), 3.0)
        z = torch.randn(4, 3)
        _, log_det = layer.forward_and_log_det(z)
        sign, truth = brute_force(layer.double(), "forward", z.double())
        assert (sign > 0).all()
        assert (log_det - truth).abs().max() <= 1e-4


@each_context
def test_round_trips(context) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        layer = drawn(Radial(4, context), 1.5).double()
        start, *more = inputs(layer, 50)
        for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
            middle, log_det = getattr(layer, f"{there}_and_log_det")(start, *more)
            end, negative = getattr(layer, f"{back}_and_log_det")(middle, *more)
            assert (middle - start).abs().max() > 1e-3
            assert (end - start).abs().max() <= 1e-10
            assert (negative + log_det).abs().max() <= 1e-10


def test_the_formula_of_the_paper() -> None:
    layer = drawn(Radial(3)).double()
    centre, radius, pull = (theta.detach() for theta in layer.free(None))
    floor = 1e-3

    def positive(a: Tensor) -> float:
        return floor + math.log1p(math.expm1(1 - floor) * math.exp(a))

    alpha = positive(radius)
    beta = alpha * (positive(pull) - 1)
    z = torch.randn(7, 3, dtype=DOUBLE)
    r = (z - centre).norm(dim=1)
    h = 1 / (alpha + r)
    x, log_det = layer.forward_and_log_det(z)
    assert torch.allclose(x, z + (beta * h).unsqueeze(1) * (z - centre))
    truth = 2 * torch.log1p(beta * h) + torch.log(1 + beta * h - beta * r * h**2)
    assert torch.allclose(log_det, truth)


class Inside(nn.Module):
    """A layer whose call is one of its directions."""

    def __init__(self, layer: nn.Module, direction: str) -> None:
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.layer, f"{self.direction}_and_log_det")(*args)


@each_context
@each_direction
def test_derivatives_with_respect_to_everything(direction, context) -> None:
    module = Inside(drawn(Radial(2, context)).double(), direction)
    names, values = zip(*module.named_parameters(), strict=True)

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(names, leaves, strict=False))
        return functional_call(module, own, leaves[len(names) :])

    leaves = (*values, *inputs(module.layer, 2))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("radius", [-1000.0, -8.0, 0.0, 8.0, 1000.0])
@pytest.mark.parametrize("pull", [-1000.0, -8.0, 0.0, 8.0, 1000.0])
@each_direction
def test_extreme_parameters_give_finite_values_and_gradients(direction, radius, pull) -> None:
    layer = Radial(4)
    with torch.no_grad():
        layer.free.radius.fill_(radius)
        layer.free.pull.fill_(pull)
        centre = layer.free.centre.clone()
    x = torch.stack((centre, centre + 1e-30, centre + 1e-4, centre + 1, centre + 1e6))
    x.requires_grad_()
    value, log_det = getattr(layer, f"{direction}_and_log_det")(x)
    leaves = (x, *layer.parameters())
    first = torch.autograd.grad(value.sum() + log_det.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert all(t.isfinite().all() for t in (value, log_det, *first, *second))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_at_the_centre(dtype) -> None:
    """The centre stays, and space around it is stretched by 1 + beta / alpha."""
    layer = drawn(Radial(3)).to(dtype)
    centre, _, p = layer._constrained(None)
    for direction, sign in zip(DIRECTIONS, (1, -1), strict=True):
        value, log_det = getattr(layer, f"{direction}_and_log_det")(centre.unsqueeze(0))
        assert torch.allclose(value[0], centre)
        assert torch.allclose(log_det[0], sign * 3 * torch.log(p))
        jacobian = jacrev(getattr(layer, direction))(centre.detach())
        assert torch.allclose(jacobian, p**sign * torch.eye(3, dtype=dtype))


def test_it_starts_as_the_identity() -> None:
    z = torch.randn(5, 3)
    x, log_det = Radial(3).forward_and_log_det(z)
    assert torch.allclose(x, z)
    assert log_det.abs().max() < 1e-6


@each_context
@each_direction
def test_vmap_and_an_empty_batch(direction, context) -> None:
    layer = drawn(Radial(3, context))
    call = getattr(layer, f"{direction}_and_log_det")
    args = inputs(layer, 6, torch.float32)
    for mapped, batched in zip(vmap(call)(*args), call(*args), strict=True):
        assert torch.allclose(mapped, batched, atol=1e-5)
    value, log_det = call(*inputs(layer, 0, torch.float32))
    assert value.shape == (0, 3)
    assert log_det.shape == (0,)


def test_names_of_the_state() -> None:
    assert list(Radial(2).state_dict()) == ["free.centre", "free.radius", "free.pull"]


@pytest.mark.parametrize("radius", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("pull", [-20.0, -2.0, 2.0, 20.0, 1000.0])
def test_the_inverse_near_and_far_to_the_precision_of_float32(radius: float, pull: float) -> None:
    """Around a centre at 0, where points carry all their digits: little magnifies rounding."""
    layer = Radial(3)
    with torch.no_grad():
        layer.free.centre.zero_()
        layer.free.radius.fill_(radius)
        layer.free.pull.fill_(pull)
        z = torch.randn(40, 3) * torch.logspace(-12, 6, 40).unsqueeze(1)
        x, log_det = layer.forward_and_log_det(z)
        back, negative = layer.inverse_and_log_det(x)
        _, alpha, p = layer._constrained(None)
        truth, log_det_truth = layer.double().inverse_and_log_det(x.double())
        near = alpha / (alpha + truth.norm(dim=1))
        across, along = 1 + (p - 1) * near, 1 + (p - 1) * near.square()
        condition = (across / along).clamp(min=1)  # d log r / d log |x|
    if radius != -10.0:
        inner = x.norm(dim=1) < alpha * p
        assert inner.any(), "c < 0"
        assert not inner.all(), "c > 0"
    for found, expected in ((back, z), (back, truth)):
        error = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert (error / condition).max() <= 1e-6
    assert (negative + log_det).abs().max() <= 1e-5
    assert (negative - log_det_truth).abs().max() <= 1e-5
