"""`ConvField` against its formula written out, and its divergence against whole Jacobians."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from cnf.fields.conv import ConvField

ACTIVATIONS = ["tanh", "softplus", "silu", "sigmoid"]


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def randomised(field):
    """Every parameter random, of a size at which nothing saturates."""
    with torch.no_grad():
        for p in field.parameters():
            p.normal_().div_(math.sqrt(p[0].numel() if p.dim() > 1 else 4))
    return field


def case(seed):
    """A small random field, and t, x and context for it."""
    choose = random.Random(seed)
    layers = choose.choice([1, 2, 2])
    shape = [choose.randint(1, 3), *(choose.choice([1, 2, 3, 4, 5, 7]) for _ in range(2))]
    if seed < 4:
        shape, layers = [(1, 1, 1), (2, 1, 1), (1, 2, 5), (2, 5, 2)][seed], 2
    return given(
        ConvField(
            shape,
            [choose.randint(1, 4) for _ in range(layers)],
            kernel_size=[choose.choice([1, 3, 5]) for _ in range(layers + 1)],
            context=choose.choice([0, 2]),
            activation=choose.choice(ACTIVATIONS),
        )
    )


def given(field, batch=3, dtype=torch.float64):
    field = randomised(field.to(dtype))
    t = torch.tensor(0.37, dtype=dtype, requires_grad=True)
    x = normal(batch, *field.event_shape, dtype=dtype).requires_grad_()
    context = normal(batch, field.context, dtype=dtype).requires_grad_() if field.context else None
    return field, t, x, context


def sum_of_the_diagonal(field, t, x, context):
    """The divergence by as many backward passes as there are dimensions, differentiable."""
    dx = field(t, x, context).flatten(1)  # (B, D)
    rows = [torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0] for i in range(field.dims)]
    return sum(row.flatten(1)[:, i] for i, row in enumerate(rows))


def gradients(value, wanted, **choices):
    grads = torch.autograd.grad(value, wanted, allow_unused=True, **choices)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, grads, strict=True)]


def assert_equal(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        scale = 1 + float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def named(field, t, x, context):
    return [v for v in (t, x, context) if v is not None] + list(field.parameters())


# ---------------------------------------------------------------- the field


@pytest.mark.parametrize("frequencies", [0, 2])
@pytest.mark.parametrize("context", [0, 2])
def test_the_formula(context, frequencies):
    field, t, x, c = given(
        ConvField(
            (2, 4, 3), (5, 3), kernel_size=(5, 1, 3), context=context, activation="silu",
            frequencies=frequencies,
        )
    )  # fmt: skip
    (k1, b1, k2, b2, k3, b3, w, v) = field.parameters()
    waves = [t, *((math.pi * k * t).sin() for k in range(1, frequencies + 1))]
    waves += [(math.pi * k * t).cos() for k in range(1, frequencies + 1)]
    s = torch.stack(waves).expand(3, -1)
    s = s if c is None else torch.cat((s, c), 1)
    gamma1, gamma2, beta1, beta2 = (s @ w.T + v)[..., None, None].split((5, 3, 5, 3), 1)
    h = F.silu(F.conv2d(x, k1, b1, padding=2) * (1 + gamma1) + beta1)
    h = F.silu(F.conv2d(h, k2, b2) * (1 + gamma2) + beta2)
    expected = F.conv2d(h, k3, b3, padding=1)
    torch.testing.assert_close(field(t, x, c), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field.with_divergence(t, x, c)[0], expected, rtol=1e-12, atol=1e-12)


def test_one_kernel_size_for_all_layers():
    field = ConvField((1, 8, 8), (4, 4, 4), kernel_size=5)
    assert [layer.kernel_size for layer in field.layers] == [(5, 5)] * 4


# ---------------------------------------------------------------- its divergence


@pytest.mark.parametrize("seed", range(72))
def test_the_divergence_is_the_trace(seed):
    """And so are its gradients in everything it depends on."""
    field, t, x, context = case(seed)
    assert field.closed_form
    dx, div = field.with_divergence(t, x, context, field.divergence_constants())
    assert_equal([dx], [field(t, x, context)])
    trace = sum_of_the_diagonal(field, t, x, context)
    assert_equal([div], [trace])
    weight = normal(len(x))
    wanted = named(field, t, x, context)
    assert_equal(*(gradients((weight * v.sin()).sum(), wanted) for v in (div, trace)))


@pytest.mark.parametrize("hidden", [(3,), (3, 2)])
def test_second_derivatives(hidden):
    field, t, x, context = given(ConvField((2, 3, 4), hidden, context=2))
    wanted = named(field, t, x, context)
    found = []
    for div in (
        field.with_divergence(t, x, context)[1],
        sum_of_the_diagonal(field, t, x, context),
    ):
        first = gradients(div.sin().sum(), wanted, create_graph=True)
        found.append(gradients(sum(g.square().sum() for g in first), wanted))
    assert_equal(*found)


def test_a_large_image_and_a_large_kernel():
    field, t, x, context = given(ConvField((1, 12, 9), (2, 3), kernel_size=(7, 3, 9)), batch=1)
    found = field.with_divergence(t, x, context)[1]
    assert_equal([found], [sum_of_the_diagonal(field, t, x, context)])


def test_in_channels_last():
    field, t, x, _ = given(ConvField((3, 6, 5), (4, 4)))
    found = field.to(memory_format=torch.channels_last).with_divergence(
        t, x.to(memory_format=torch.channels_last)
    )
    assert_equal(found, (field(t, x), sum_of_the_diagonal(field, t, x, None)))


@pytest.mark.parametrize("hidden", [(3,), (3, 2)])
@pytest.mark.parametrize("context", [0, 2])
def test_at_one_time_a_sample(context, hidden):
    """Each sample a batch of one at its own time, as solvers of independent steps take it."""
    field, _, x, c = given(ConvField((2, 4, 5), hidden, context=context))
    times = torch.linspace(0, 1, len(x), dtype=x.dtype)

    def single(t, x, c):
        dx, div = field.with_divergence(t, x[None], None if c is None else c[None])
        return dx[0], div[0]

    found = torch.func.vmap(single, (0, 0, None if c is None else 0))(times, x, c)
    each = [single(t, x[i], None if c is None else c[i]) for i, t in enumerate(times)]
    assert_equal(found, [torch.stack(values) for values in zip(*each, strict=True)], 1e-12)


@pytest.mark.filterwarnings("ignore")  # what torch says while it compiles is its own affair
def test_compiled():
    """In one graph for every batch size, with its gradients; kernels would take it 15 s more."""
    field, t, x, context = given(
        ConvField((1, 5, 4), (4, 3), context=2), batch=7, dtype=torch.float32
    )
    compiled = torch.compile(
        lambda *arguments: field.with_divergence(*arguments), fullgraph=True, backend="aot_eager"
    )
    before = counters["stats"]["unique_graphs"]
    for n in (7, 2):
        x, context = (v.detach()[:n].clone().requires_grad_() for v in (x, context))
        for v in (x, context):
            torch._dynamo.mark_dynamic(v, 0)
        wanted = named(field, t, x, context)
        found = []
        for f in (field.with_divergence, compiled):
            dx, div = f(t, x, context, field.divergence_constants())
            value = dx.square().sum() + div.sin().sum()
            found.append([dx, div, *gradients(value, wanted)])
        assert_equal(*found, tolerance=1e-5)
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("seed", range(24))
def test_the_quadratic_form_is_that_of_products(seed):
    """Of any number of layers; values and gradients."""
    field, t, x, context = case(seed)
    if seed % 3 == 0:
        field, t, x, context = given(ConvField((2, 4, 3), (3, 2, 4), kernel_size=(3, 1, 5, 3)))
    probes = normal(3, 2, *field.event_shape)
    dx, form = field.with_quadratic_form(t, x, context, field.quadratic_form_constants(probes))
    truth_dx = field(t, x, context)
    rows = [torch.autograd.grad(truth_dx, x, probes[:, i], create_graph=True)[0] for i in range(2)]
    truth = torch.stack([(row * probes[:, i]).flatten(1).sum(1) for i, row in enumerate(rows)], 1)
    wanted = named(field, t, x, context)
    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(3, 2)
    ours, theirs = (gradients((v * weight).sum(), wanted) for v in (form, truth))
    assert_equal([dx, form, *ours], [truth_dx, truth, *theirs])


def test_what_has_no_closed_form():
    deep = ConvField((1, 4, 4), (3, 3, 3))
    assert not deep.closed_form
    assert deep(torch.tensor(0.5), torch.randn(2, 1, 4, 4)).shape == (2, 1, 4, 4)
    with pytest.raises(TypeError, match=r"no closed form.*at most two hidden layers"):
        deep.with_divergence(torch.tensor(0.5), torch.randn(2, 1, 4, 4))
    assert not ConvField((1, 4, 4), (3,), activation=nn.Softmax(1)).closed_form


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"features": 4}, ValueError, r"features=4 must be the shape of an image"),
        ({"features": (4, 4)}, ValueError, r"features=\(4, 4\) must be the shape of an image"),
        ({"hidden": ()}, ValueError, r"hidden=\(\) must name at least one hidden layer"),
        ({"hidden": (3, 0)}, ValueError, r"hidden=\(3, 0\) must be positive"),
        ({"kernel_size": 4}, ValueError, r"kernel_size=4 must be odd"),
        ({"kernel_size": (3, 2, 3)}, ValueError, r"kernel_size=\(3, 2, 3\) must be odd"),
        ({"kernel_size": (3, 3)}, ValueError, r"kernel_size=\(3, 3\) names 2 layers.* are 3: give"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size=3.0 must be a sequence"),
        ({"kernel_size": 0}, ValueError, r"kernel_size=.* must be positive"),
        ({"frequencies": -1}, ValueError, r"frequencies=-1 must be a number"),
        ({"activation": "relu"}, ValueError, r"activation"),
    ],
)
def test_what_is_refused(choices, error, message):
    with pytest.raises(error, match=message):
        ConvField(**{"features": (1, 4, 4), "hidden": (3, 3), **choices})


def test_a_wrong_shape():
    with pytest.raises(ValueError, match=r"expected \(B, 1, 4, 4\)"):
        ConvField((1, 4, 4)).with_divergence(torch.tensor(0.5), torch.randn(2, 16))
