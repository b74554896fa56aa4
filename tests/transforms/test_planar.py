"""Planar flows against brute force, at their limits, and through torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cnf.transforms.planar import Planar
from cnf.transforms.roots import ACTIVATIONS

from .brute_force import (
    DIRECTIONS,
    DOUBLE,
    brute_force,
    drawn,
    each_context,
    each_direction,
    inputs,
)

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.mark.parametrize("features", [1, 3, (2, 1, 2)], ids=str)
@each_context
@each_activation
@each_direction
def test_log_det_equals_brute_force(direction, activation, context, features) -> None:
    layer = drawn(Planar(features, context, activation), 2 / (1 + context)).double()
    args = inputs(layer, 20)
    _, log_det = getattr(layer, f"{direction}_and_log_det")(*args)
    sign, truth = brute_force(layer, direction, *args)
    assert truth.abs().max() > 0.1
    assert (sign > 0).all()
    assert (log_det - truth).abs().max() <= 1e-9


@each_activation
def test_two_hundred_layers_are_invertible_and_exact_in_float32(activation) -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        layer = drawn(Planar(3, activation=activation), 3.0)
        z = torch.randn(4, 3)
        _, log_det = layer.forward_and_log_det(z)
        sign, truth = brute_force(layer.double(), "forward", z.double())
        assert (sign > 0).all()
        assert (log_det - truth).abs().max() <= 1e-4


@each_context
@each_activation
def test_round_trips(activation, context) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        layer = drawn(Planar(4, context, activation), 1 / (1 + context)).double()
        start, *more = inputs(layer, 50)
        for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
            middle, log_det = getattr(layer, f"{there}_and_log_det")(start, *more)
            end, negative = getattr(layer, f"{back}_and_log_det")(middle, *more)
            assert (middle - start).abs().max() > 0.1
            assert (end - start).abs().max() <= 1e-10
            assert (negative + log_det).abs().max() <= 1e-10


def test_the_formula_of_the_paper() -> None:
    """Where the constraint is met with room to spare, u^ differs from u along w alone."""
    layer = drawn(Planar(3)).double()
    u, w, b = (theta.detach() for theta in layer.free(None))
    u_hat, _, _, p = layer._constrained(None)
    z = torch.randn(7, 3, dtype=DOUBLE)
    a = z @ w + b
    truth = z + torch.outer(torch.tanh(a), u_hat)
    assert torch.allclose(layer(z), truth)
    assert torch.allclose(u_hat @ w, p - 1)
    m = math.log1p(math.expm1(1.0) * math.exp(float(u @ w))) - 1
    assert torch.allclose(u_hat, u + (m - u @ w) * w / (w @ w), atol=1e-3)


class Inside(nn.Module):
    """A layer whose call is one of its directions."""

    def __init__(self, layer: nn.Module, direction: str) -> None:
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.layer, f"{self.direction}_and_log_det")(*args)


@each_context
@each_activation
@each_direction
def test_derivatives_with_respect_to_everything(direction, activation, context) -> None:
    module = Inside(drawn(Planar(2, context, activation), 0.7).double(), direction)
    names, values = zip(*module.named_parameters(), strict=True)

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(names, leaves, strict=False))
        return functional_call(module, own, leaves[len(names) :])

    leaves = (*values, *inputs(module.layer, 2))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


EXTREMES = {
    "parallel": (8.0, 8.0),
    "opposite": (-8.0, 8.0),
    "w.u = -1000": (-125.0, 2.0),
    "huge": (-1e4, 1e4),
    "w = 0": (3.0, 0.0),
    "tiny w": (3.0, 1e-25),
    "small w": (3.0, 1e-9),
    "u = 0": (0.0, 3.0),
    "all zero": (0.0, 0.0),
}


@pytest.mark.parametrize(("u", "w"), EXTREMES.values(), ids=EXTREMES)
@each_activation
@each_direction
def test_extreme_parameters_give_finite_values_and_gradients(direction, activation, u, w) -> None:
    layer = Planar(4, activation=activation)
    with torch.no_grad():
        layer.free.u.fill_(u)
        layer.free.w.fill_(w)
    x = torch.cat((torch.zeros(1, 4), 100 * torch.eye(4), torch.randn(20, 4))).requires_grad_()
    value, log_det = getattr(layer, f"{direction}_and_log_det")(x)
    leaves = (x, *layer.parameters())
    first = torch.autograd.grad(value.sum() + log_det.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    assert all(t.isfinite().all() for t in (value, log_det, *first))
    if w == 0 or abs(w) > 1e-6:  # elsewhere the curvature itself is beyond float32
        assert all(t.isfinite().all() for t in second if t is not None)


@each_activation
def test_the_determinant_of_a_nearly_singular_layer_is_that_of_float64(activation) -> None:
    layer = Planar(4, activation=activation)
    with torch.no_grad():
        layer.free.u.fill_(-8.0)
        layer.free.w.fill_(8.0)
    z = torch.randn(100, 4) / 32
    _, log_det = layer.forward_and_log_det(z)
    sign, truth = brute_force(layer.double(), "forward", z.double())
    assert (sign > 0).all()
    assert (log_det - truth).abs().max() <= 1e-4


def test_the_constraint_survives_rounding() -> None:
    """w.u^ = k to the rounding of u^, not to that of w.u, a million times larger."""
    layer = Planar(4)
    with torch.no_grad():
        layer.free.w.normal_()
        layer.free.u.copy_(-1e6 * layer.free.w + torch.randn(4))
    u_hat, w, _, p = (t.detach().double() for t in layer._constrained(None))
    assert (u_hat @ w - (p - 1)).abs() <= 1e-5 * (1 + u_hat.norm() * w.norm())


def test_it_starts_as_the_identity() -> None:
    z = torch.randn(5, 3)
    x, log_det = Planar(3).forward_and_log_det(z)
    assert torch.equal(x, z)
    assert log_det.abs().max() < 1e-6
    assert (Planar(3, 2)(z, torch.zeros(5, 2)) - z).abs().max() == 0


@each_context
@each_direction
def test_vmap_and_an_empty_batch(direction, context) -> None:
    layer = drawn(Planar(3, context))
    call = getattr(layer, f"{direction}_and_log_det")
    args = inputs(layer, 6, torch.float32)
    for mapped, batched in zip(vmap(call)(*args), call(*args), strict=True):
        assert torch.allclose(mapped, batched, atol=1e-5)
    value, log_det = call(*inputs(layer, 0, torch.float32))
    assert value.shape == (0, 3)
    assert log_det.shape == (0,)


def test_context_gives_every_sample_its_own_layer() -> None:
    layer = drawn(Planar(3, 2), 0.5)
    z, context = inputs(layer, 4, torch.float32)
    x, log_det = layer.forward_and_log_det(z, context)
    for i in range(4):
        own = Planar(3)
        theta = layer.free(context[i : i + 1])
        own.load_state_dict({f"free.{name}": t[0] for name, t in zip("uwb", theta, strict=True)})
        own_x, own_log_det = own.forward_and_log_det(z[i : i + 1])
        assert torch.allclose(own_x[0], x[i], atol=1e-6)
        assert torch.allclose(own_log_det[0], log_det[i], atol=1e-6)


def test_names_of_the_state() -> None:
    assert list(Planar(2).state_dict()) == ["free.u", "free.w", "free.b"]
    assert list(Planar(2, 1).state_dict()) == ["free.predict.weight", "free.predict.bias"]


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation='tan' is not known.*Did you mean 'tanh'"):
        Planar(2, activation="tan")
