"""Sylvester flows against brute force, at their limits, and through torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from cnf.transforms.roots import ACTIVATIONS
from cnf.transforms.sylvester import Sylvester

from .brute_force import (
    DIRECTIONS,
    DOUBLE,
    brute_force,
    drawn,
    each_context,
    each_direction,
    inputs,
)

KINDS: dict[str, dict[str, Any]] = {
    "orthogonal": {},
    "orthogonal-rank": {"rank": 2},
    "householder": {"kind": "householder", "reflections": 3},
    "triangular": {"kind": "triangular"},
    "triangular-reverse": {"kind": "triangular", "reverse": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@each_kind
@each_context
@each_direction
def test_log_det_equals_brute_force(direction, context, kind) -> None:
    layer = drawn(Sylvester((3, 1), context=context, **kind)).double()
    args = inputs(layer, 20)
    _, log_det = getattr(layer, f"{direction}_and_log_det")(*args)
    sign, truth = brute_force(layer, direction, *args)
    assert truth.abs().max() > 0.1
    assert (sign > 0).all()
    assert (log_det - truth).abs().max() <= 1e-9


@each_activation
@each_direction
def test_every_activation_against_brute_force(direction, activation) -> None:
    layer = drawn(Sylvester(3, activation=activation), 2.0).double()
    (z,) = inputs(layer, 20)
    _, log_det = getattr(layer, f"{direction}_and_log_det")(z)
    _, truth = brute_force(layer, direction, z)
    assert (log_det - truth).abs().max() <= 1e-9


@pytest.mark.parametrize("kind", [{"kind": k} for k in ("householder", "triangular")] + [{}])
def test_one_dimension(kind) -> None:
    layer = drawn(Sylvester(1, **kind)).double()
    (z,) = inputs(layer, 20)
    x, log_det = layer.forward_and_log_det(z)
    assert torch.allclose(log_det, brute_force(layer, "forward", z)[1])
    assert torch.allclose(layer.inverse(x), z, atol=1e-12)


@each_kind
def test_two_hundred_layers_are_invertible_and_exact_in_float32(kind) -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        layer = drawn(Sylvester(3, **kind), 3.0)
        z = torch.randn(4, 3)
        _, log_det = layer.forward_and_log_det(z)
        sign, truth = brute_force(layer.double(), "forward", z.double())
        assert (sign > 0).all()
        assert (log_det - truth).abs().max() <= 1e-4


@each_kind
@each_context
def test_round_trips(kind, context) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = drawn(Sylvester(4, context=context, **kind), 1 / (1 + context)).double()
        start, *more = inputs(layer, 50)
        for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
            middle, log_det = getattr(layer, f"{there}_and_log_det")(start, *more)
            end, negative = getattr(layer, f"{back}_and_log_det")(middle, *more)
            assert (middle - start).abs().max() > 0.1
            assert (end - start).abs().max() <= 1e-10
            assert (negative + log_det).abs().max() <= 1e-10


@each_kind
def test_the_formula_of_the_paper(kind) -> None:
    layer = drawn(Sylvester(3, **kind)).double()
    m = layer.rank
    z = torch.randn(7, 3, dtype=DOUBLE)
    q, out, within, b, p = layer._constrained(None, z)
    assert torch.allclose(q.mT @ q, torch.eye(m, dtype=DOUBLE))
    assert torch.equal(out, out.triu())
    assert torch.equal(within, within.triu())
    assert torch.allclose(out.diagonal() * within.diagonal(), p - 1)
    truth = torch.stack([v + q @ out @ torch.tanh(within @ q.mT @ v + b) for v in z])
    assert torch.allclose(layer(z), truth)


def test_a_reversed_triangle_is_the_triangle_of_reversed_dimensions() -> None:
    layer = drawn(Sylvester(3, kind="triangular"))
    other = Sylvester(3, kind="triangular", reverse=True)
    other.load_state_dict(layer.state_dict())
    z = torch.randn(5, 3)
    assert torch.allclose(other(z), layer(z.flip(-1)).flip(-1))
    jacobian = jacrev(layer)(z[0])
    assert torch.equal(jacobian, jacobian.triu())


class Inside(nn.Module):
    """A layer whose call is one of its directions."""

    def __init__(self, layer: nn.Module, direction: str) -> None:
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.layer, f"{self.direction}_and_log_det")(*args)


@pytest.mark.parametrize("context", [0, 1])
@each_kind
@each_direction
def test_derivatives_with_respect_to_everything(direction, kind, context) -> None:
    module = Inside(drawn(Sylvester(2, context=context, **kind)).double(), direction)
    names, values = zip(*module.named_parameters(), strict=True)

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(names, leaves, strict=False))
        return functional_call(module, own, leaves[len(names) :])

    leaves = (*values, *inputs(module.layer, 2))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("value", [-1000.0, -8.0, 0.0, 8.0, 1000.0])
@pytest.mark.parametrize("kind", [{"kind": "householder"}, {"kind": "triangular"}], ids=str)
@each_activation
@each_direction
def test_extreme_parameters_give_finite_values_and_gradients(
    direction, activation, kind, value
) -> None:
    layer = Sylvester(3, activation=activation, **kind)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
        layer.free.triangles.diagonal().neg_()  # both signs: r_ii -> -1 and r~_ii -> 1 at once
    x = torch.cat((torch.zeros(1, 3), torch.randn(5, 3))).requires_grad_()
    y, log_det = getattr(layer, f"{direction}_and_log_det")(x)
    leaves = (x, *layer.parameters())
    first = torch.autograd.grad(y.sum() + log_det.sum(), leaves, create_graph=True)
    assert all(t.isfinite().all() for t in (y, log_det, *first))


@each_kind
def test_it_starts_as_the_identity(kind) -> None:
    z = torch.randn(5, 3)
    x, log_det = Sylvester(3, **kind).forward_and_log_det(z)
    assert torch.equal(x, z)
    assert log_det.abs().max() < 1e-6


@each_kind
@each_context
@each_direction
def test_vmap_and_an_empty_batch(direction, context, kind) -> None:
    layer = drawn(Sylvester(3, context=context, **kind))
    call = getattr(layer, f"{direction}_and_log_det")
    args = inputs(layer, 6, torch.float32)
    for mapped, batched in zip(vmap(call)(*args), call(*args), strict=True):
        assert torch.allclose(mapped, batched, rtol=1e-4, atol=1e-4)
    value, log_det = call(*inputs(layer, 0, torch.float32))
    assert value.shape == (0, 3)
    assert log_det.shape == (0,)


def test_context_gives_every_sample_its_own_layer() -> None:
    layer = drawn(Sylvester(3, context=2, kind="householder"), 0.5)
    z, context = inputs(layer, 4, torch.float32)
    x, log_det = layer.forward_and_log_det(z, context)
    own = Sylvester(3, kind="householder")
    for i in range(4):
        theta = layer.free(context[i : i + 1])
        names = own.state_dict()
        own.load_state_dict({name: t[0] for name, t in zip(names, theta, strict=True)})
        own_x, own_log_det = own.forward_and_log_det(z[i : i + 1])
        assert torch.allclose(own_x[0], x[i], atol=1e-5)
        assert torch.allclose(own_log_det[0], log_det[i], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "orthogonl"}, ValueError, "kind='orthogonl' is not known.*'orthogonal'"),
        ({"activation": "relu"}, ValueError, "activation='relu' is not known"),
        ({"rank": 4}, ValueError, "rank=4 must be at most the 3 dimensions"),
        ({"rank": 0}, ValueError, "rank=0 must be a positive integer"),
        ({"rank": 2, "kind": "householder"}, ValueError, "rank=2 concerns kind='orthogonal'"),
        ({"reflections": 2}, ValueError, "reflections=2 concern kind='householder'"),
        ({"kind": "householder", "reflections": 0}, ValueError, "reflections=0 must be a pos"),
        ({"reverse": True}, ValueError, "reverse=True concerns kind='triangular'"),
        ({"kind": "triangular", "reverse": 1}, TypeError, "reverse=1 must be True or False"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Sylvester(3, **options)


@each_kind
def test_the_log_det_where_the_map_is_nearly_flat_in_float32(kind) -> None:
    """r_ii r~_ii near -1, so that 1 + r_ii r~_ii h' is a thousandth: nothing may cancel."""
    layer = Sylvester(3, **kind)
    with torch.no_grad():
        layer.free.triangles.diagonal().fill_(-30.0)
        layer.free.diagonal.fill_(30.0)
        z = torch.cat([scale * torch.randn(10, 3) for scale in (1e-6, 1e-3, 0.03, 1.0, 30.0)])
        log_det = layer.forward_and_log_det(z)[1]
        p = layer._constrained(None, z)[4]
    assert (p - 1e-3).abs().max() < 1e-6
    sign, truth = brute_force(layer.double(), "forward", z.double())
    assert log_det.isfinite().all()
    assert (sign > 0).all()
    assert truth.min() < layer.rank * -6.8
    assert (log_det - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("ends", [(-30.0, -30.0), (30.0, -30.0), (30.0, 30.0)], ids=str)
@each_kind
def test_the_log_det_at_other_ends_in_float32(kind, ends) -> None:
    """r~_ii near 0, or r_ii large."""
    layer = Sylvester(3, **kind)
    with torch.no_grad():
        layer.free.triangles.diagonal().fill_(ends[0])
        layer.free.diagonal.fill_(ends[1])
        z = torch.randn(20, 3)
        log_det = layer.forward_and_log_det(z)[1]
    truth = brute_force(layer.double(), "forward", z.double())[1]
    assert (log_det - truth).abs().max() <= 1e-5
