"""What the built-in fields share: shapes, checks, derivatives; and how a function is read."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnf
from cnf.fields.activations import ACTIVATIONS, activation
from cnf.fields.base import VectorField, context_use

FIELDS = {
    "mlp": cnf.MLPField,
    "mlp without frequencies": partial(cnf.MLPField, frequencies=0),
    "mlp with gates": partial(cnf.MLPField, gates=True),
    "concatsquash": cnf.ConcatSquashField,
}
SHAPES = {"vector": (3,), "image": (2, 3, 2), "one": (1,)}


def randomised(field):
    with torch.no_grad():
        for p in field.parameters():
            p.normal_(std=0.5)
    return field


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=FIELDS.values(), ids=FIELDS)
def make(request):
    """A constructor of a field, whose parameters are random in float64."""
    return lambda *args, **options: randomised(request.param(*args, **options).double())


@pytest.mark.parametrize("context", [0, 2], ids=["no context", "context"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_and_independence_of_samples(make, shape, context):
    field = make(shape, (5, 4), context=context)
    assert field.event_shape == shape
    assert field.context == context
    x, c, t = normal(6, *shape), normal(6, 2) if context else None, torch.tensor(0.3).double()
    dx = field(t, x, c)
    assert dx.shape == x.shape
    for i in range(6):
        alone = field(t, x[i : i + 1], None if c is None else c[i : i + 1])
        torch.testing.assert_close(alone[0], dx[i], rtol=1e-12, atol=1e-12)
    assert field(t, x[:0], None if c is None else c[:0]).shape == (0, *shape)


def test_every_input_counts_and_every_parameter_receives_a_gradient(make):
    field = make(3, (5, 4), context=2)
    t, x, c = (v.requires_grad_() for v in (torch.tensor(0.3).double(), normal(4, 3), normal(4, 2)))
    grads = torch.autograd.grad(field(t, x, c).square().sum(), [t, x, c, *field.parameters()])
    assert all(g.abs().sum() > 0 for g in grads)


def test_derivatives_of_first_and_second_order(make):
    field = make(2, (3,), context=1)
    inputs = [v.requires_grad_() for v in (torch.tensor(0.3).double(), normal(2, 2), normal(2, 1))]
    assert gradcheck(field, inputs, rtol=1e-6, atol=1e-8)
    assert gradgradcheck(field, inputs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hidden", [(), (7,), (4, 5, 6, 7)], ids=str)
def test_any_number_of_hidden_layers(make, hidden):
    field = make(3, hidden)
    layers = {name: m for name, m in field.named_modules() if isinstance(m, nn.Linear)}
    others = ("gate", "shift", "gates")  # layers of time and context alone
    main = [m for name, m in layers.items() if not set(name.split(".")) & set(others)]
    main = [m.out_features for m in main]
    assert main == [*hidden, 3]
    assert field(torch.tensor(0.3).double(), normal(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_twice_differentiable(make, name):
    field = make(2, (3,), activation=name)
    x = normal(2, 2).requires_grad_()
    t = torch.tensor(0.3).double()
    assert gradgradcheck(lambda x: field(t, x), x, rtol=1e-5, atol=1e-6)


def test_a_learnable_activation_is_not_shared(make):
    shared = nn.PReLU()
    field = make(2, (3, 3), activation=shared)
    slopes = [m.weight for m in field.modules() if isinstance(m, nn.PReLU)]
    assert len(slopes) == 2
    assert slopes[0] is not slopes[1]
    assert all(slope is not shared.weight for slope in slopes)


def test_train_and_eval_are_the_same(make):
    field, x, t = make(3), normal(4, 3), torch.tensor(0.3).double()
    assert torch.equal(field.train()(t, x), field.eval()(t, x))


def test_copies_pickles_and_states(make):
    field, x, t = make(3, (5,)), normal(4, 3), torch.tensor(0.3).double()
    expected = field(t, x)
    expected.sum().backward()
    other = make(3, (5,))
    assert not torch.equal(other(t, x), expected)
    buffer = io.BytesIO()
    torch.save(field.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), other):
        assert torch.equal(same(t, x), expected)


def test_samples_through_vmap(make):
    field, x, t = make(3, (5,)), normal(4, 3), torch.tensor(0.3).double()
    rows = torch.func.vmap(lambda v: field(t, v[None])[0])(x)
    torch.testing.assert_close(rows, field(t, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (normal(4, 5), normal(4, 2), r"\(4, 5\).*\(B, 3"),
        (normal(4, 3, 1), normal(4, 2), r"\(4, 3, 1\)"),
        (normal(4, 3), None, "context is missing.*context=2"),
        (normal(4, 3), normal(4, 1), "1 features.*context=2"),
    ],
    ids=["width", "rank", "no context", "context width"],
)
def test_inputs_that_are_refused(make, x, context, message):
    with pytest.raises(ValueError, match=message):
        make(3, context=2)(torch.tensor(0.3).double(), x, context)


def test_a_context_that_is_not_expected_is_refused(make):
    with pytest.raises(ValueError, match=r"\(4, 2\).*takes none.*context=2"):
        make(3)(torch.tensor(0.3).double(), normal(4, 3), normal(4, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "features"),
        (((2, -1),), {}, "features"),
        ((True,), {}, "features"),
        ((3, (4, 0)), {}, "hidden"),
        ((3,), {"context": -1}, "context=-1"),
        ((3,), {"activation": "tahn"}, "Did you mean 'tanh'"),
    ],
)
def test_sizes_and_names_that_are_refused(make, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments, **options)


def test_an_activation_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="got int"):
        activation(3)
    assert isinstance(activation("silu"), nn.SiLU)


# ---------------------------------------------------------------- a user's own


class Own(VectorField):
    """A field that inherits: x times a weight, plus its context."""

    def __init__(self):
        super().__init__((2, 2), context=4)
        self.weight = nn.Parameter(torch.tensor(2.0))

    def derivative(self, t, x, context):
        assert x.ndim == 2
        return self.weight * x + context


def test_a_field_by_inheritance():
    x, context = torch.randn(3, 2, 2), torch.randn(3, 4)
    field = Own()
    torch.testing.assert_close(
        field(torch.tensor(0.0), x, context), 2 * x + context.reshape(3, 2, 2)
    )
    assert field.dims == 4
    with pytest.raises(TypeError, match="VectorField must define derivative"):
        VectorField(2)(torch.tensor(0.0), torch.randn(3, 2))


class OfTime(nn.Module):
    def forward(self, t, x):
        return -x


@pytest.mark.parametrize(
    ("field", "use"),
    [
        (lambda t, x: x, "none"),
        (lambda t, x, context: x, "required"),
        (lambda t, x, context=None: x, "optional"),
        (lambda *args: args[1], "optional"),
        (lambda t, x, *rest: x, "optional"),
        (lambda t, x, *, scale=1: x, "none"),
        (OfTime(), "none"),
        (cnf.MLPField(2), "optional"),
        (partial(lambda a, t, x: x, 1), "none"),
        (torch.add, "none"),
    ],
    ids=[
        "t x",
        "context",
        "default",
        "args",
        "rest",
        "keyword",
        "module",
        "field",
        "partial",
        "builtin",
    ],
)
def test_how_a_function_uses_context(field, use):
    assert context_use(field) == use


@pytest.mark.parametrize(
    "field",
    [lambda x: x, lambda: 0, lambda t, x, c, d: x, 3, None],
    ids=["x", "nothing", "four", "number", "none"],
)
def test_what_is_no_field_is_refused(field):
    with pytest.raises(TypeError, match="field must be a function"):
        context_use(field)


def test_a_function_of_either_signature_flows():
    x, context = normal(4, 2), normal(4, 2)
    plain = cnf.CNF(lambda t, x: -x, "exact").forward_and_log_det(x)
    given = cnf.CNF(lambda t, x, c: c - c - x, "exact").forward_and_log_det(x, context)
    for a, b in zip(plain, given, strict=True):
        torch.testing.assert_close(a, b)
