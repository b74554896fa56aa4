"""`HollowField` against brute force, and the wiring that makes its divergence cheap."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

import cnf
from cnf.fields.hollow import HollowField

CASES = range(48)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomised(field):
    """In float64, with every parameter random."""
    field = field.double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    return field


def case(seed):
    """A field and its arguments t (), x (B, D), context (B, C) or None, all requiring gradients."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    dims, context = choose.randint(1, 6), choose.choice([0, 2])
    field = HollowField(
        dims,
        [choose.randint(2, 12) for _ in range(choose.randint(0, 4))],
        context=context,
        activation=choose.choice(["tanh", "silu", "softplus"]),
        frequencies=choose.choice([0, 2]),
        conditioner_features=choose.randint(1, 4),
        tau_hidden=[choose.randint(1, 6) for _ in range(choose.randint(1, 3))],
    )
    t, x, c = normal(1)[0], normal(3, dims), normal(3, context) if context else None
    return randomised(field), tuple(None if a is None else a.requires_grad_() for a in (t, x, c))


def jacobian(f, x):
    """dy/dx (B, ..., D) of y (B, ...), a function of each sample alone, by autograd."""
    y = f(x)
    parts = y.reshape(len(x), -1).unbind(1)
    rows = [torch.autograd.grad(part.sum(), x, create_graph=True)[0] for part in parts]
    return torch.stack(rows, 1).reshape(*y.shape, -1)


def conditioner(field, x, s):
    return field.conditioner(s, x, field.conditioner.weights())


def gradients(of, field, arguments):
    inputs = [a for a in arguments if a is not None] + list(field.parameters())
    return torch.autograd.grad(of, inputs, allow_unused=True, materialize_grads=True)


def assert_same(found, expected):
    """To 1e-10 of the largest number."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("context", [0, 2])
def test_the_formula(context):
    """A perceptron for each i, of x_i and what the conditioner makes of the others."""
    field = randomised(HollowField(4, (9, 7), context=context, tau_hidden=(5, 3), frequencies=2))
    t, x, c = normal(1)[0], normal(6, 4), normal(6, context)
    waves = [t, *(f(math.pi * k * t) for f in (torch.sin, torch.cos) for k in (1, 2))]
    s = torch.cat((torch.stack(waves).expand(6, -1), c), 1)
    for i in range(4):
        others = x.clone()
        others[:, i] = 1e3 * normal(6)  # of no effect on h_i
        h = conditioner(field, others, s)[:, i]
        inputs = torch.cat((x[:, i : i + 1], h, s), 1)
        assert_same([field(t, x, c if context else None)[:, i]], [field.tau(inputs)[:, 0]])


@pytest.mark.parametrize("seed", CASES)
def test_the_divergence_and_its_gradients(seed):
    field, (t, x, c) = case(seed)
    j = jacobian(lambda x: field(t, x, c), x)
    expected = field(t, x, c), j.diagonal(dim1=1, dim2=2).sum(-1)
    found = field.with_divergence(t, x, c)
    assert_same(found, expected)
    v, w = torch.randn_like(x), normal(3)
    losses = ((dx * v).sum() + div @ w for dx, div in (found, expected))
    assert_same(*(gradients(loss, field, (t, x, c)) for loss in losses))


@pytest.mark.parametrize("seed", CASES)
def test_the_conditioner_is_hollow(seed):
    field, (_, x, _) = case(seed)
    s = normal(3, field.inputs[-1])
    j = jacobian(lambda x: conditioner(field, x, s), x)  # (B, D, k, D)
    for i in range(x.shape[1]):
        assert (j[:, i, :, i] == 0).all()
    assert (jacobian(lambda s: conditioner(field, x, s), s.requires_grad_()) != 0).any()


@pytest.mark.parametrize(
    ("dims", "widths"), [(1, (2,)), (2, (2, 2)), (3, (4, 5)), (6, (10, 23, 11))]
)
def test_wide_layers_leave_no_input_out(dims, widths):
    """From 2 (D - 1) units on h_i sees every x_j but x_i."""
    field = randomised(HollowField(dims, widths))
    x, s = normal(3, dims).requires_grad_(), normal(3, field.inputs[-1])
    seen = (jacobian(lambda x: conditioner(field, x, s), x) != 0).any(2).all(0)
    assert torch.equal(seen, ~torch.eye(dims, dtype=torch.bool))


@pytest.mark.parametrize(
    ("dims", "widths"), [(3, (2,)), (6, (2, 2)), (9, (9, 3)), (9, (3, 9)), (30, (7,))]
)
def test_narrow_layers_still_use_every_input(dims, widths):
    field = randomised(HollowField(dims, widths))
    x, s = normal(3, dims).requires_grad_(), normal(3, field.inputs[-1])
    seen = (jacobian(lambda x: conditioner(field, x, s), x) != 0).any(2).all(0)
    assert not seen.diagonal().any()
    assert seen.any(0).all()  # every x_j is used
    assert seen.any(1).all()  # every h_i sees some


def test_one_dimension():
    field = randomised(HollowField(1, (4, 4), context=2))
    t, x, c = normal(1)[0], normal(5, 1).requires_grad_(), normal(5, 2).requires_grad_()
    expected = jacobian(lambda x: field(t, x, c), x).reshape(5)
    assert_same([field.with_divergence(t, x, c)[1]], [expected])
    assert (jacobian(lambda c: field(t, x, c), c) != 0).all()


def test_second_derivatives_of_the_divergence():
    """Which a score's gradient asks for."""
    field, t = randomised(HollowField(3, (4, 4), tau_hidden=(3, 3))), normal(1)[0]
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: field.with_divergence(t, x), (x,))


@pytest.mark.parametrize("context", [0, 2])
def test_times_of_samples_through_vmap(context):
    field = randomised(HollowField(3, (6, 6), context=context))
    t, x, c = normal(5), normal(5, 3), normal(5, context) if context else None
    constants = field.divergence_constants()

    def one(t, x, c):
        return field.with_divergence(t, x[None], None if c is None else c[None], constants)

    found = torch.func.vmap(one, (0, 0, None if c is None else 0))(t, x, c)
    each = [one(t[i], x[i], None if c is None else c[i]) for i in range(5)]
    assert_same(found, [torch.stack(parts) for parts in zip(*each, strict=True)])


def test_compiled():
    field = HollowField(3, (6, 6), context=2)
    compiled = torch.compile(
        field.with_divergence, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (5, 7):
        arguments = [torch.rand(()), torch.randn(n, 3), torch.randn(n, 2)]
        arguments = [a.requires_grad_() for a in arguments]
        pairs = [f(*arguments) for f in (compiled, field.with_divergence)]
        losses = [(dx.square().sum() + div.square().sum()) for dx, div in pairs]
        found, expected = (gradients(loss, field, arguments) for loss in losses)
        for a, b in zip((*pairs[0], *found), (*pairs[1], *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_gradients_and_with_constants_of_the_solve():
    field, (t, x, c) = case(0)
    expected = field.with_divergence(t, x, c)
    with torch.no_grad():
        found = field.with_divergence(t, x, c, field.divergence_constants())
    assert not any(part.requires_grad for part in found)
    assert_same(found, expected)


def test_far_away_everything_is_finite():
    field, t = HollowField(5, (8, 8)), torch.tensor(0.5)
    x = (1e4 * torch.randn(6, 5).sign()).requires_grad_()
    dx, div = field.with_divergence(t, x)
    found = gradients(dx.sum() + div.sum(), field, [x])
    assert all(part.isfinite().all() for part in (dx, div, *found))


@pytest.mark.parametrize("dims", [1, 2, 30])
def test_a_fresh_field_is_moderate_and_every_parameter_learns(dims):
    field, x = HollowField(dims), torch.randn(500, dims)
    dx, div = field.with_divergence(torch.tensor(0.5), x)
    assert 0.01 < dx.square().mean().sqrt() < 2
    assert div.abs().max() < dims
    (dx.square().sum() + div.sum()).backward()
    assert all(p.grad.abs().max() > 0 for p in field.parameters())


def test_images_states_and_no_samples():
    field, other = HollowField((2, 3, 1), (12,)), HollowField((2, 3, 1), (12,))
    x, t = torch.randn(5, 2, 3, 1), torch.tensor(0.5)
    other.load_state_dict(field.state_dict())
    assert torch.equal(field(t, x), other(t, x))
    assert field(t, x).shape == x.shape
    dx, div = field.with_divergence(t, x[:0])
    assert dx.shape == (0, 2, 3, 1)
    assert div.shape == (0,)


def test_a_flow():
    flow = cnf.FFJORD(2, (8, 8), field=HollowField, tau_hidden=(8,), divergence="exact")
    x = torch.randn(20, 2)
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert flow.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, r"features=\(0,\)"),
        ((2, (8, 1)), {}, r"hidden=\(8, 1\) must be widths of 2 or more"),
        ((2, (8, 0)), {}, r"hidden=\(8, 0\) must be positive"),
        ((2,), {"tau_hidden": ()}, r"tau_hidden=\(\) must have at least one layer"),
        ((2,), {"tau_hidden": (0,)}, r"tau_hidden=\(0,\) must be positive"),
        ((2,), {"conditioner_features": 0}, "conditioner_features=0 must be a positive integer"),
        ((2,), {"frequencies": -1}, "frequencies=-1 must be"),
        ((2,), {"activation": "tahn"}, "activation='tahn' is not known"),
        ((2,), {"activation": nn.Softmax(-1)}, r"activation=Softmax\(dim=-1\) has no known slope"),
        ((2,), {"context": -1}, "context=-1"),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        HollowField(*arguments, **options)
