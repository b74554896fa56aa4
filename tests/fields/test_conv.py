"""`ConvField` against its formula written out, and its divergence against whole Jacobians."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import cnf
from cnf.fields.conv import ConvField

ACTIVATIONS = ["tanh", "softplus", "silu", "sigmoid"]
TIMES = ["film", "concat", "concatsquash"]


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
        shape, layers = [[1, 1, 1], [2, 1, 1], [1, 2, 5], [2, 5, 2]][seed], 2
    context = choose.choice([{}, {"context": 2}, {"context_shape": (2, *shape[1:])}])
    if choose.random() < 0.2:
        context = {"context_shape": (1, 2 * shape[1], 2 * shape[2])}
    choices: dict[str, Any] = {
        "kernel_size": [choose.choice([1, 3, 5]) for _ in range(layers + 1)],
        "activation": choose.choice(ACTIVATIONS),
        "time": TIMES[seed % 3],
        "frequencies": choose.choice([None, 0, 1]),
        **context,
    }
    if choices["time"] == "concatsquash":
        own = shape[0] > 1 and "context" in context  # gates of the output: no closed form
        choices["gated_output"] = not own and choose.random() < 0.7
    return given(ConvField(shape, [choose.randint(1, 4) for _ in range(layers)], **choices))


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


@pytest.mark.parametrize("frequencies", [None, 1])
@pytest.mark.parametrize("context", [0, 2])
def test_the_formula_of_concat(context, frequencies):
    """FFJORD's ConcatConv2d, the channels put beside each other as images."""
    field, t, x, c = given(
        ConvField(
            (2, 4, 3), (5, 3), kernel_size=(5, 1, 3), context=context, activation="softplus",
            time="concat", frequencies=frequencies,
        )
    )  # fmt: skip
    (k1, b1, k2, b2, k3, b3, s1, s2, s3) = field.parameters()
    s = torch.stack([t, *([(math.pi * t).sin(), (math.pi * t).cos()] if frequencies else [])])
    s = s.expand(3, -1) if c is None else torch.cat((s.expand(3, -1), c), 1)
    constant = s[:, :, None, None].expand(-1, -1, 4, 3)

    def layer(h, k, k_s, b, padding):
        return F.conv2d(torch.cat((h, constant), 1), torch.cat((k, k_s), 1), b, padding=padding)

    h = F.softplus(layer(x, k1, s1, b1, 2))
    h = F.softplus(layer(h, k2, s2, b2, 0))
    expected = layer(h, k3, s3, b3, 1)
    torch.testing.assert_close(field(t, x, c), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field.with_divergence(t, x, c)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("context", [0, 2])
def test_the_formula_of_concatsquash(context, gated):
    """FFJORD's ConcatSquashConv2d."""
    field, t, x, c = given(
        ConvField((1, 4, 3), (5, 3), context=context, time="concatsquash", gated_output=gated)
    )
    (k1, b1, k2, b2, k3, b3, w, v, u) = field.parameters()
    s = t.expand(3, 1) if c is None else torch.cat((t.expand(3, 1), c), 1)
    gates = torch.sigmoid(s @ w.T + v)[..., None, None]
    g1, g2, g3 = gates.split((5, 3, 1), 1) if gated else (*gates.split((5, 3), 1), 1.0)
    u1, u2, u3 = (s @ u.T)[..., None, None].split((5, 3, 1), 1)
    h = (F.conv2d(x, k1, b1, padding=1) * g1 + u1).tanh()
    h = (F.conv2d(h, k2, b2, padding=1) * g2 + u2).tanh()
    expected = F.conv2d(h, k3, b3, padding=1) * g3 + u3
    torch.testing.assert_close(field(t, x, c), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field.with_divergence(t, x, c)[0], expected, rtol=1e-12, atol=1e-12)


def test_what_joins_a_layer_is_drawn_as_its_channels_are():
    """As wide as the kernel of a convolution of all channels would be."""
    field = ConvField((1, 4, 4), (64, 64), time="concat", context=255)
    bound = 1 / math.sqrt(9 * (64 + 256))
    spread = field.modulation.layers[1].weight.abs()
    assert spread.max() < bound * 1.0001
    assert spread.mean() > 0.45 * bound


def test_one_kernel_size_for_all_layers():
    field = ConvField((1, 8, 8), (4, 4, 4), kernel_size=5)
    assert [layer.kernel_size for layer in field.layers] == [(5, 5)] * 4


# ---------------------------------------------------------------- its divergence


@pytest.mark.parametrize("seed", range(120))
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


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("hidden", [(3,), (3, 2)])
def test_second_derivatives(hidden, time):
    image = {"context_shape": (1, 3, 4)} if time == "concatsquash" else {"context": 2}
    field, t, x, context = given(ConvField((2, 3, 4), hidden, time=time, **image))
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


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("hidden", [(3,), (3, 2)])
@pytest.mark.parametrize("context", ["none", "vector", "image"])
def test_at_one_time_a_sample(context, hidden, time):
    """Each sample a batch of one at its own time, as solvers of independent steps take it."""
    choices = {"none": {}, "vector": {"context": 2}, "image": {"context_shape": (1, 8, 10)}}
    gated = context != "vector"
    field, _, x, c = given(
        ConvField((2, 4, 5), hidden, time=time, gated_output=gated, **choices[context])
    )
    times = torch.linspace(0, 1, len(x), dtype=x.dtype)

    def single(t, x, c):
        dx, div = field.with_divergence(t, x[None], None if c is None else c[None])
        return dx[0], div[0]

    found = torch.func.vmap(single, (0, 0, None if c is None else 0))(times, x, c)
    each = [single(t, x[i], None if c is None else c[i]) for i, t in enumerate(times)]
    assert_equal(found, [torch.stack(values) for values in zip(*each, strict=True)], 1e-12)


@pytest.mark.filterwarnings("ignore")  # what torch says while it compiles is its own affair
@pytest.mark.parametrize(
    "choices",
    [
        {"context": 2},
        {"context": 2, "time": "concat"},
        {"context_shape": (1, 10, 8), "time": "concatsquash", "features": (2, 5, 4)},
    ],
    ids=str,
)
def test_compiled(choices):
    """In one graph for every batch size, with its gradients; kernels would take it 15 s more."""
    field, t, x, context = given(
        ConvField(**{"features": (1, 5, 4), "hidden": (4, 3), **choices}),
        batch=7,
        dtype=torch.float32,
    )
    torch._dynamo.reset()  # else the sizes of the fields before count as changing ones
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


DEEP = [
    *({"time": time, "kernel_size": (3, 1, 5, 3)} for time in TIMES),
    *({"time": time, "strides": (2, 1, 1, -2), "context": 2} for time in TIMES),
    {"strides": (-2, -2, 2, 2), "time": "concatsquash", "context_shape": (1, 4, 6)},
    {"strides": (-2, 1, 1, 2), "context_shape": (1, 8, 12)},
]
"""Of three hidden layers, for images of 4 x 6."""


@pytest.mark.parametrize("seed", range(24 + len(DEEP)))
def test_the_quadratic_form_is_that_of_products(seed):
    """Of any number of layers, at any stride; values and gradients."""
    if seed < 24:
        field, t, x, context = case(seed)
    else:
        field, t, x, context = given(ConvField((2, 4, 6), (3, 2, 4), **DEEP[seed - 24]))
    assert field.closed_quadratic_form
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
    assert not ConvField((2, 4, 4), (3,), time="concatsquash", context=1).closed_form
    assert ConvField((1, 4, 4), (3,), time="concatsquash", context=1).closed_form
    image = ConvField((2, 4, 4), (3,), time="concatsquash", context_shape=(1, 4, 4))
    assert image.closed_form
    other = ConvField((1, 4, 4), (3, 3))
    other.layers[1] = nn.Conv2d(3, 3, (3, 5), padding=(1, 2))
    assert not other.closed_quadratic_form
    for part in ("layers.1", "modulation"):
        other = ConvField((1, 4, 4), (3, 3))
        other.set_submodule(part, nn.Identity())
        assert not other.closed_form
        assert not other.closed_quadratic_form


# ---------------------------------------------------------------- strides


@pytest.mark.parametrize("choices", DEEP[3:], ids=str)
def test_strided_divergence_by_products(choices):
    """`Exact` and `Hutchinson` choose what there is: products, and the closed quadratic form."""
    field, t, x, context = given(ConvField((2, 4, 6), (3, 2, 4), **choices))
    assert not field.closed_form
    assert not ConvField((1, 4, 4), (3,), strides=(2, -2)).closed_form
    dx, div = cnf.Exact()(field, t, x, context)
    trace = sum_of_the_diagonal(field, t, x, context)
    assert dx.shape == x.shape
    assert_equal([dx, div], [field(t, x, context), trace])
    flow = cnf.CNF(field, cnf.Exact(), cnf.Solver("rk4", steps=2))
    assert flow.inverse_and_log_det(x, context)[1].isfinite().all()
    assert flow.inverse_and_log_det(x, context, divergence="hutchinson")[1].isfinite().all()


def test_strided_layers_written_out():
    field, t, x, _ = given(
        ConvField((1, 4, 6), (3, 2), strides=(2, 1, -2), kernel_size=5, time="concat")
    )
    (k1, b1, k2, b2, k3, b3, s1, s2, s3) = field.parameters()
    assert [tuple(k.shape[2:]) for k in (k1, k2, k3)] == [(4, 4), (5, 5), (4, 4)]

    def joined(h):
        return torch.cat((h, t.expand(len(h), 1, *h.shape[2:])), 1)

    h = F.conv2d(joined(x), torch.cat((k1, s1), 1), b1, 2, 1).tanh()
    assert h.shape[2:] == (2, 3)
    h = F.conv2d(joined(h), torch.cat((k2, s2), 1), b2, 1, 2).tanh()
    expected = F.conv_transpose2d(joined(h), torch.cat((k3, s3), 0), b3, 2, 1)
    torch.testing.assert_close(field(t, x), expected, rtol=1e-12, atol=1e-12)


def test_kernels_of_strided_layers_by_name():
    field = ConvField((1, 4, 6), (3, 2), strides=(1, 2, -2), kernel_size=(5, 4, 4))
    assert [layer.kernel_size for layer in field.layers] == [(5, 5), (4, 4), (4, 4)]


# ---------------------------------------------------------------- context images


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("factor", [1, 2])
def test_a_context_image_is_more_channels(time, factor):
    """The same as a field of images with the folded context beside x, looked at in x alone."""
    shape = (2, 3 * factor, 4 * factor)
    field, t, x, c = given(ConvField((1, 3, 4), (3, 2), time=time, context_shape=shape))
    assert field.context == 24 * factor**2
    extra = 2 * factor**2
    both = ConvField((1 + extra, 3, 4), (3, 2), time=time).double()
    values = dict(field.state_dict())
    added = values.pop("image.layer.weight")
    first = torch.cat((values["layers.0.weight"], added), 1)
    values["layers.0.weight"] = first
    n = both.state_dict()
    for name, value in values.items():  # what the further channels of the output need: anything
        if value.shape != n[name].shape:
            grown = n[name].clone()
            grown[tuple(slice(k) for k in value.shape)] = value
            values[name] = grown
    both.load_state_dict(values)
    image = F.pixel_unshuffle(c.view(3, *shape), factor)
    expected = both(t, torch.cat((x, image), 1))[:, :1]
    torch.testing.assert_close(field(t, x, c), expected, rtol=1e-12, atol=1e-12)


def test_blocks_of_pixels_become_channels():
    field, t, x, c = given(ConvField((1, 2, 3), (4,), context_shape=(1, 4, 6)))
    folded = F.pixel_unshuffle(c.view(3, 1, 4, 6), 2).flatten(1)
    other, *_ = given(ConvField((1, 2, 3), (4,), context_shape=(4, 2, 3)))
    other.load_state_dict(field.state_dict())
    torch.testing.assert_close(field(t, x, c), other(t, x, folded))


def test_a_flow_given_an_image():
    field, _, x, c = given(ConvField((1, 3, 4), (3, 2), context=12, context_shape=(1, 3, 4)))
    flow = cnf.CNF(field, "exact", cnf.Solver("rk4", steps=2))
    closed = flow.inverse_and_log_det(x, c)[1]
    products = flow.inverse_and_log_det(x, c, divergence=cnf.Exact(closed_form=False))[1]
    torch.testing.assert_close(closed, products, rtol=1e-9, atol=1e-9)
    assert (closed - flow.inverse_and_log_det(x, c.flip(0))[1]).abs().max() > 1e-6


def test_an_empty_batch():
    for time in TIMES:
        field, t, x, c = given(ConvField((2, 4, 4), (3, 2), time=time, context_shape=(1, 8, 8)))
        dx, div = field.with_divergence(t, x[:0], c[:0])
        assert dx.shape == (0, 2, 4, 4)
        assert div.shape == (0,)


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
        ({"time": "squash"}, ValueError, r"time='squash' is not known.*'concatsquash'"),
        ({"gated_output": 1}, TypeError, r"gated_output=1 must be True or False"),
        ({"context_shape": (4, 4)}, ValueError, r"context_shape=\(4, 4\) must be the shape of an"),
        ({"context_shape": 4}, TypeError, r"context_shape=4 must be a sequence"),
        (
            {"context_shape": (1, 6, 4)},
            ValueError,
            r"context_shape=\(1, 6, 4\) does not fit images of 4 x 4.*multiple by one factor",
        ),
        ({"context_shape": (1, 8, 4)}, ValueError, r"context_shape=\(1, 8, 4\) does not fit"),
        ({"context_shape": (1, 2, 2)}, ValueError, r"context_shape=\(1, 2, 2\) does not fit"),
        (
            {"context_shape": (1, 4, 4), "context": 3},
            ValueError,
            r"context=3 does not fit context_shape=\(1, 4, 4\), which has 16 features",
        ),
        ({"strides": (2, -2)}, ValueError, r"strides=\(2, -2\) names 2 layers.* are 3"),
        ({"strides": 2}, TypeError, r"strides=2 must be a sequence"),
        ({"strides": (1, 3, 1)}, ValueError, r"strides=\(1, 3, 1\) must be 1, 2 .* or -2"),
        ({"strides": (1, 2, 1)}, ValueError, r"turn images of 4 x 4 into 2 x 2.*as many strides"),
        (
            {"features": (1, 6, 4), "hidden": (3, 3, 3), "strides": (2, 2, -2, -2)},
            ValueError,
            r"layer 2 cannot halve images of 3 x 2, an odd size; pad or crop",
        ),
        (
            {"strides": (2, 1, -2), "kernel_size": (3, 3, 3)},
            ValueError,
            r"kernel_size=\(3, 3, 3\) must be 4 where the stride is 2 or -2",
        ),
    ],
)
def test_what_is_refused(choices, error, message):
    with pytest.raises(error, match=message):
        ConvField(**{"features": (1, 4, 4), "hidden": (3, 3), **choices})


def test_a_wrong_shape():
    with pytest.raises(ValueError, match=r"expected \(B, 1, 4, 4\)"):
        ConvField((1, 4, 4)).with_divergence(torch.tensor(0.5), torch.randn(2, 16))
