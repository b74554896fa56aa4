"""Closed forms of the trace against the Jacobian, with every parameter random."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import cnf
from cnf.fields.activations import ACTIVATIONS, activation, has_slope, value_and_slope
from cnf.fields.closed_form import offers

NETWORKS = 200


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomised(field):
    """In float64, every parameter normal, of a size that saturates nothing."""
    field = field.double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_().div_(max(1, p.shape[-1]) ** 0.5 if p.ndim > 1 else 2)
    return field


def random_field(seed):
    """A field, and its number of context features, of random kind and sizes."""
    draw = random.Random(seed)
    dims, context = draw.choice([1, 2, 3, 5, 8]), draw.choice([0, 0, 2])
    hidden = tuple(draw.randint(1, 9) for _ in range(draw.choice([0, 1, 2, 2])))
    kind = draw.choice(["mlp", "gates", "squash", "ungated", "sum"])
    options = {"context": context, "activation": draw.choice(sorted(ACTIVATIONS))}
    if kind in ("mlp", "gates"):
        frequencies = draw.choice([0, 2])
        shape = draw.choice([dims, (dims, 2)])
        options |= {"frequencies": frequencies, "gates": kind == "gates"}
        return randomised(cnf.MLPField(shape, hidden, **options))
    if kind == "sum":
        branches = [cnf.LinearField(dims, context=draw.choice([0, context]))]
        branches += [cnf.MLPField(dims, hidden, **options), cnf.MLPField(dims, (4,))]
        return randomised(cnf.SumField(*branches))
    gated = kind == "squash" and not context
    return randomised(cnf.ConcatSquashField(dims, hidden, gated_output=gated, **options))


def arguments(field, rows=3):
    t = torch.rand((), dtype=torch.float64, requires_grad=True)
    x = normal(rows, *field.event_shape).requires_grad_()
    context = normal(rows, field.context).requires_grad_() if field.context else None
    return t, x, context


def jacobian(field, t, x, context):
    """df/dx of each sample (B, D, D), differentiable."""
    dx = field(t, x, context).flatten(1)
    rows = [
        torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0] for i in range(dx.shape[1])
    ]
    return dx.reshape(x.shape), torch.stack([row.flatten(1) for row in rows], 1)


def gradients(values, inputs):
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64).reshape(values.shape)
    return torch.autograd.grad((values * weights).sum(), inputs, materialize_grads=True)


def agree(found, truth):
    """To 1e-10 of the size of the whole."""
    size = 1 + truth.detach().abs().max().item()
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10 * size)


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_the_divergence_is_the_trace(seed):
    field = random_field(seed)
    t, x, context = arguments(field)
    assert offers(field, "closed_form")
    dx, div = field.with_divergence(t, x, context)
    truth_dx, jac = jacobian(field, t, x, context)
    truth = jac.diagonal(dim1=1, dim2=2).sum(1)
    agree(dx, truth_dx)
    agree(div, truth)
    inputs = [v for v in (t, x, context) if v is not None] + list(field.parameters())
    for a, b in zip(gradients(div, inputs), gradients(truth, inputs), strict=True):
        agree(a, b)


FORMS = [n for n in range(NETWORKS) if offers(random_field(n), "closed_quadratic_form")]


@pytest.mark.parametrize("seed", FORMS[:40])
def test_the_quadratic_form_is_that_of_the_jacobian(seed):
    field = random_field(seed)
    t, x, context = arguments(field)
    probes = normal(len(x), 2, *field.event_shape)
    dx, form = field.with_quadratic_form(t, x, context, field.quadratic_form_constants(probes))
    truth_dx, jac = jacobian(field, t, x, context)
    e = probes.flatten(2)
    truth = torch.einsum("bki,bij,bkj->bk", e, jac, e)
    agree(dx, truth_dx)
    agree(form, truth)
    inputs = [v for v in (t, x, context) if v is not None] + list(field.parameters())
    for a, b in zip(gradients(form, inputs), gradients(truth, inputs), strict=True):
        agree(a, b)


@pytest.mark.parametrize("hidden", [(5, 4, 3), (3, 3, 3, 3)])
def test_deep_perceptrons_have_the_quadratic_form_alone(hidden):
    field = randomised(cnf.MLPField(3, hidden))
    assert not offers(field, "closed_form")
    assert offers(field, "closed_quadratic_form")
    t, x, _ = arguments(field)
    probes = normal(3, 1, 3)
    _, form = field.with_quadratic_form(t, x, None, field.quadratic_form_constants(probes))
    _, jac = jacobian(field, t, x, None)
    agree(form, torch.einsum("bki,bij,bkj->bk", probes, jac, probes))
    with pytest.raises(TypeError, match=r"no closed form.*cnf\.Exact"):
        field.with_divergence(t, x)


@pytest.mark.parametrize("name", ["tanh", "torch tanh", "gelu tanh", "softplus 2", *ACTIVATIONS])
def test_slopes_are_derivatives(name):
    special = {"torch tanh": nn.Tanh(), "gelu tanh": nn.GELU("tanh"), "softplus 2": nn.Softplus(2)}
    s = special.get(name) or activation(name)
    a = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    h, d = value_and_slope(s, a)
    torch.testing.assert_close(h, s(a), rtol=1e-12, atol=1e-12)
    (truth,) = torch.autograd.grad(s(a).sum(), a, create_graph=True)
    torch.testing.assert_close(d, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(d.sum(), a)[0], torch.autograd.grad(truth.sum(), a)[0]
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4])
def test_the_tanh_of_float32(size):
    """By way of the sigmoid: right to the rounding of 1, with right derivatives, also by vmap."""
    a = (size * torch.randn(1000)).requires_grad_()
    truth = torch.tanh(a.double())
    for h in (activation("tanh")(a), value_and_slope(activation("tanh"), a)[0]):
        assert (h - truth).abs().max() < 2e-7
        (slope,) = torch.autograd.grad(h.sum(), a, create_graph=True)
        assert (slope - (1 - truth**2)).abs().max() < 1e-6
        assert torch.autograd.grad(slope.sum(), a)[0].isfinite().all()
    mapped = torch.func.vmap(torch.func.grad(activation("tanh")))(a.detach())
    assert (mapped - (1 - truth**2)).abs().max() < 1e-6
    _, tangent = torch.func.jvp(activation("tanh"), (a.detach(),), (torch.ones(1000),))
    assert (tangent - (1 - truth**2)).abs().max() < 1e-6


def test_an_activation_of_your_own():
    class Sine(nn.Module):
        def forward(self, a):
            return a.sin()

    class SineWithSlope(Sine):
        def value_and_slope(self, a):
            return a.sin(), a.cos()

    assert not has_slope(Sine())
    assert not offers(cnf.MLPField(2, activation=Sine()), "closed_form")
    field = randomised(cnf.MLPField(2, activation=SineWithSlope()))
    assert offers(field, "closed_form")
    t, x, _ = arguments(field)
    agree(field.with_divergence(t, x)[1], jacobian(field, t, x, None)[1].diagonal(0, 1, 2).sum(1))


class Doubled(cnf.MLPField):
    def derivative(self, t, x, context):
        return 2 * super().derivative(t, x, context)


def hooked():
    field = cnf.MLPField(2)
    field.network[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    return field


def with_another_layer():
    field = cnf.MLPField(2)
    field.network[2] = nn.Sequential(field.network[2], nn.Tanh())
    return field


@pytest.mark.parametrize("make", [lambda: Doubled(2), hooked, with_another_layer])
def test_a_field_made_into_another_loses_its_closed_form(make):
    """Else `Exact` would silently give the trace of the field that it was."""
    field = randomised(make())
    x = normal(5, 2).requires_grad_()
    t = torch.tensor(0.3, dtype=torch.float64)
    truth = jacobian(field, t, x, None)[1].diagonal(dim1=1, dim2=2).sum(1)
    agree(cnf.Exact()(field, t, x)[1], truth)
    log_det = cnf.CNF(field, "exact").inverse_and_log_det(x)[1]
    products = cnf.CNF(field, cnf.Exact(closed_form=False)).inverse_and_log_det(x)[1]
    torch.testing.assert_close(log_det, products, rtol=1e-9, atol=1e-9)


def test_parametrised_layers_keep_theirs():
    field = randomised(cnf.MLPField(2, (8, 8)))
    nn.utils.parametrizations.spectral_norm(field.network[2])
    field.eval()  # in training mode it iterates anew at every call
    assert offers(field, "closed_form")
    t, x, _ = arguments(field)
    agree(field.with_divergence(t, x)[1], jacobian(field, t, x, None)[1].diagonal(0, 1, 2).sum(1))


def test_sums_that_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        cnf.SumField()
    with pytest.raises(TypeError, match=r"fields\[1\]"):
        cnf.SumField(cnf.MLPField(2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"agree.*\(2,\), \(3,\)"):
        cnf.SumField(cnf.MLPField(2), cnf.MLPField(3))
    with pytest.raises(ValueError, match=r"context features.*1, 2"):
        cnf.SumField(cnf.MLPField(2, context=1), cnf.MLPField(2, context=2))


class DoubledLinear(nn.Linear):
    def forward(self, h):
        return 2 * super().forward(h)


class SineOfOther(nn.Module):
    def forward(self, a):
        return a.sin()

    def value_and_slope(self, a):
        return a.sin(), a.cos()


class SineDoubled(SineOfOther):
    def forward(self, a):
        return (2 * a).sin()


def with_prehook():
    field = cnf.MLPField(2, (4, 3))
    field.network[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return field


def with_another_linear():
    field = cnf.MLPField(2, (4, 3))
    field.network[2] = DoubledLinear(4, 3)
    return field


def patched(name, part=None):
    def make():
        field = cnf.MLPField(2, (4, 3))
        target = field if part is None else field.network[part]
        old = getattr(target, name)
        setattr(target, name, lambda *a: 2 * old(*a))
        return field

    return make


def squash_with_another_layer():
    field = cnf.ConcatSquashField(2, (4, 3), gated_output=False)
    other = type("Other", (type(field.layers[1]),), {})
    field.layers[1].__class__ = other
    other.forward = lambda self, s, x: (2 * self.linear(x), s.new_ones(1))
    return field


STALE = {
    "hook before": with_prehook,
    "another kind of layer": with_another_linear,
    "patched forward": patched("forward"),
    "patched derivative": patched("derivative"),
    "patched layer": patched("forward", 2),
    "patched activation": patched("forward", 1),
    "activation of a subclass": lambda: cnf.MLPField(2, (4, 3), activation=SineDoubled()),
    "branch of a subclass": lambda: cnf.SumField(cnf.LinearField(2), Doubled(2, (4, 3))),
    "another layer in squash": squash_with_another_layer,
}


@pytest.mark.parametrize("make", STALE.values(), ids=STALE)
def test_what_is_not_as_built_has_no_closed_form(make):
    field = randomised(make())
    t, x = torch.tensor(0.3, dtype=torch.float64), normal(5, 2).requires_grad_()
    assert not offers(field, "closed_form")
    assert not offers(field, "closed_quadratic_form")
    truth = jacobian(field, t, x, None)[1].diagonal(dim1=1, dim2=2).sum(1)
    agree(cnf.Exact()(field, t, x)[1], truth)


def test_hooks_of_all_modules_are_seen():
    everywhere = torch.nn.modules.module
    handle = everywhere.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert not offers(cnf.MLPField(2), "closed_form")
    finally:
        handle.remove()
    assert offers(cnf.MLPField(2), "closed_form")


def test_a_callable_that_is_no_module():
    class Linear:
        def __call__(self, t, x):
            return 3 * x

        def with_divergence(self, t, x, context):
            return 3 * x, x.new_full(x.shape[:1], 3.0 * x.shape[1])

    class Square(Linear):
        def __call__(self, t, x):
            return x**2

    assert cnf.CNF(Linear()).divergence == cnf.Exact()
    assert cnf.CNF(Square()).divergence == cnf.Hutchinson()


@pytest.mark.parametrize(
    "layer",
    [
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_convolutions_of_other_kinds_have_none(layer):
    field = cnf.ConvField((1, 5, 4), (4, 4))
    field.layers[1] = nn.Conv2d(4, 4, 3, **layer)
    assert not field.closed_form
    assert not field.closed_quadratic_form


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_hooks_on_weights_run():
    """The old spectral_norm computes its weight in a hook on the layer."""
    field = cnf.MLPField(2, (4, 3))
    nn.utils.spectral_norm(field.network[0])
    cnf.CNF(field).inverse_and_log_det(torch.randn(5, 2))[1].sum().backward()
    assert field.network[0].weight_orig.grad is not None
    hollow = cnf.HollowField(2)
    hollow.tau[0].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match=r"hooks.*parametrizations"):
        hollow(torch.tensor(0.5), torch.randn(3, 2))


@pytest.mark.parametrize("kind", [cnf.MLPField, cnf.ConcatSquashField, cnf.PotentialField])
@pytest.mark.parametrize(
    "divergence",
    [cnf.Exact(), cnf.Hutchinson(), cnf.Hutchinson("orthogonal", 2), cnf.HutchPlusPlus(1, 2)],
    ids=str,
)
def test_events_that_are_numbers(kind, divergence):
    options = {"gated_output": False} if kind is cnf.ConcatSquashField else {}
    field = randomised(kind((), (5, 5), **options))
    x = normal(4)
    flow = cnf.CNF(field, divergence)
    log_det = flow.inverse_and_log_det(x)[1]
    truth = flow.inverse_and_log_det(x, divergence=cnf.Exact(closed_form=False))[1]
    torch.testing.assert_close(log_det, truth, rtol=1e-4, atol=1e-4)


def test_an_activation_in_place_keeps_its_argument():
    field = randomised(cnf.MLPField(2, (4, 3), activation=nn.ELU(inplace=True)))
    t, x, _ = arguments(field)
    gradients(field.with_divergence(t, x)[1], list(field.parameters()))


@pytest.mark.parametrize(
    "constants", [None, (None,), (2.0,), "ab", {"a": 1}, torch.ones(3)], ids=str
)
def test_constants_that_are_refused(constants):
    class Field(nn.Module):
        def forward(self, t, x):
            return x

        def divergence_constants(self):
            return constants

        def with_divergence(self, t, x, context, constants):
            return x, x.sum(1)

    with pytest.raises(TypeError, match="divergence_constants must return a tuple"):
        cnf.CNF(Field()).inverse_and_log_det(torch.randn(3, 2))
