"""`PotentialField` against autograd, and its potential against the formula written out."""

from __future__ import annotations

import random

import pytest
import torch

import cnf
from cnf.fields.potential import PotentialField

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
    dims, layers = choose.randint(1, 6), choose.randint(1, 4)
    width, context = choose.choice([1, 2, 3, 5, 8]), choose.choice([0, 2])
    rank = choose.choice([None, 1, 3])
    field = randomised(PotentialField(dims, (width,) * layers, context=context, rank=rank))
    t, x, c = normal(1)[0], normal(3, dims), normal(3, context) if context else None
    return field, tuple(None if a is None else a.requires_grad_() for a in (t, x, c))


def gradient_of_potential(field, t, x, c):
    return torch.autograd.grad(field.potential(t, x, c).sum(), (x, t), create_graph=True)


def brute_force(field, t, x, c):
    """f (B, D), J (B, D, D), by autograd of the potential."""
    f = -gradient_of_potential(field, t, x, c)[0]
    rows = [torch.autograd.grad(f_i.sum(), x, create_graph=True)[0] for f_i in f.unbind(1)]
    return f, torch.stack(rows, 1)


def gradients(of, field, arguments):
    inputs = [a for a in arguments if a is not None] + list(field.parameters())
    return torch.autograd.grad(of, inputs, allow_unused=True, materialize_grads=True)


def assert_same(found, expected):
    """To 1e-10 of the largest number."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("context", [0, 2])
def test_the_formula(context, layers):
    field = randomised(PotentialField(3, (5,) * layers, context=context, rank=2))
    t, x, c = normal(1)[0], normal(6, 3), normal(6, 2)
    w, a, b, k_0, b_0, *others = field.parameters()
    s = torch.cat((x, t.expand(6, 1), c[:, :context]), 1)
    u = torch.logaddexp(s @ k_0.T + b_0, -(s @ k_0.T + b_0))
    for k, bias in zip(others[::2], others[1::2], strict=True):
        u = u + torch.logaddexp(u @ k.T + bias, -(u @ k.T + bias)) / (layers - 1)
    expected = u @ w + ((s @ (a.T @ a)) * s).sum(1) / 2 + s @ b
    assert_same([field.potential(t, x, c if context else None)], [expected])


@pytest.mark.parametrize("seed", CASES)
def test_the_field_is_minus_the_gradient_of_its_potential(seed):
    field, arguments = case(seed)
    (t, x, _), (f, _) = arguments, brute_force(field, *arguments)
    assert_same([field(*arguments), field.with_divergence(*arguments)[0]], [f, f])
    of_x, of_t = field.potential_gradient(*arguments)
    each = [gradient_of_potential(field, t, x[i : i + 1], c)[1] for i, c in rows(arguments)]
    assert_same([of_x, of_t], [-f, torch.stack(each)])
    v = torch.randn_like(f)
    found, expected = (gradients((g * v).sum(), field, arguments) for g in (field(*arguments), f))
    assert_same(found, expected)


def rows(arguments):
    c = arguments[2]
    return [(i, None if c is None else c[i : i + 1]) for i in range(len(arguments[1]))]


@pytest.mark.parametrize("seed", CASES)
def test_the_divergence_and_its_gradients(seed):
    field, arguments = case(seed)
    _, j = brute_force(field, *arguments)
    assert_same([j], [j.mT])  # as of any gradient
    expected = j.diagonal(dim1=1, dim2=2).sum(-1)
    found = field.with_divergence(*arguments)[1]
    assert_same([found], [expected])
    v = torch.randn_like(found)
    assert_same(*(gradients(div @ v, field, arguments) for div in (found, expected)))


@pytest.mark.parametrize("seed", CASES)
def test_the_quadratic_form_and_its_gradients(seed):
    field, arguments = case(seed)
    f, j = brute_force(field, *arguments)
    e = normal(3, 2, f.shape[1])
    dx, found = field.with_quadratic_form(*arguments, field.quadratic_form_constants(e))
    expected = torch.einsum("bki,bij,bkj->bk", e, j, e)
    assert_same([dx, found], [f, expected])
    v = torch.randn_like(found)
    assert_same(*(gradients((form * v).sum(), field, arguments) for form in (found, expected)))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dims", [2, 9])
def test_many_samples_are_taken_in_pieces(monkeypatch, dims, layers):
    """On a CPU; 2 and 9 dimensions are less and more than two widths."""
    field, t, x = randomised(PotentialField(dims, (4,) * layers)), normal(1)[0], normal(7, dims)
    expected = field.with_divergence(t, x)[1]
    monkeypatch.setattr("cnf.fields.potential._NUMBERS_ON_CPU", 100)
    assert_same([field.with_divergence(t, x)[1]], [expected])


@pytest.mark.parametrize("dims", [2, 9])
def test_second_derivatives_of_the_divergence(dims):
    """Which a score's gradient asks for."""
    field, t = randomised(PotentialField(dims, (4, 4, 4))), normal(1)[0]
    x = normal(2, dims).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: field.with_divergence(t, x), (x,))


@pytest.mark.parametrize("dims", [2, 9])
@pytest.mark.parametrize("context", [0, 2])
def test_times_of_samples_through_vmap(context, dims):
    field = randomised(PotentialField(dims, (4, 4, 4), context=context))
    t, x, c = normal(5), normal(5, dims), normal(5, context) if context else None
    constants = field.divergence_constants()

    def one(t, x, c):
        return field.with_divergence(t, x[None], None if c is None else c[None], constants)

    found = torch.func.vmap(one, (0, 0, None if c is None else 0))(t, x, c)
    each = [one(t[i], x[i], None if c is None else c[i]) for i in range(5)]
    assert_same(found, [torch.stack(parts) for parts in zip(*each, strict=True)])


@pytest.mark.parametrize("dims", [2, 9])
def test_compiled(dims):
    field = PotentialField(dims, (4, 4, 4), context=2)
    compiled = torch.compile(
        field.with_divergence, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (5, 7):
        arguments = [a.requires_grad_() for a in (torch.rand(()), torch.randn(n, dims))]
        arguments.append(torch.randn(n, 2).requires_grad_())
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


@pytest.mark.parametrize("dims", [2, 40])
def test_far_away_everything_is_finite(dims):
    field = PotentialField(dims, (8, 8, 8))
    x = (1e4 * torch.randn(6, dims).sign()).requires_grad_()
    t = torch.tensor(0.5)
    dx, div = field.with_divergence(t, x)
    phi = field.potential(t, x)
    found = gradients(dx.sum() + div.sum() + phi.sum(), field, [x])
    assert all(part.isfinite().all() for part in (dx, div, phi, *found))


def test_in_the_middle_there_is_no_kink():
    """Where a = 0 exactly sigma'' is 1, also by autograd."""
    field = PotentialField(1, (1,)).double()
    with torch.no_grad():
        for p in field.parameters():
            p.zero_()
        field.w.fill_(1.0)
        field.layers[0].weight[0, 0] = 1.0
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert brute_force(field, t, x, None)[1].item() == -1
    assert field.with_divergence(t, x)[1].item() == -1


@pytest.mark.parametrize("dims", [1, 2, 30])
def test_a_fresh_field_is_moderate_and_every_parameter_learns(dims):
    field, x = PotentialField(dims), torch.randn(500, dims)
    dx, div = field.with_divergence(torch.tensor(0.5), x)
    assert 0.01 < dx.square().mean().sqrt() < 2
    assert div.abs().max() < 2 * dims
    (dx.square().sum() + div.sum()).backward()
    assert all(p.grad.abs().max() > 0 for p in field.parameters())


def test_images_and_no_samples():
    field = PotentialField((2, 3, 1), (4, 4))
    x, t = torch.randn(5, 2, 3, 1), torch.tensor(0.5)
    gradient, of_t = field.potential_gradient(t, x)
    assert gradient.shape == field(t, x).shape == x.shape
    assert of_t.shape == field.potential(t, x).shape == (5,)
    dx, div = field.with_divergence(t, x[:0])
    assert dx.shape == (0, 2, 3, 1)
    assert div.shape == (0,)


def test_a_flow():
    flow = cnf.FFJORD(2, (8, 8), field=PotentialField, rank=1, divergence="exact")
    x = torch.randn(20, 2)
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert flow.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, r"features=\(0,\)"),
        ((2, ()), {}, r"hidden=\(\) must be one or more equal widths"),
        ((2, (8, 4)), {}, r"hidden=\(8, 4\) must be one or more equal widths"),
        ((2, (8, 0)), {}, r"hidden=\(8, 0\) must be positive"),
        ((2,), {"rank": 0}, "rank=0 must be a positive integer"),
        ((2,), {"context": -1}, "context=-1"),
    ],
)
def test_sizes_that_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        PotentialField(*arguments, **options)


@pytest.mark.parametrize("method", ["potential", "potential_gradient", "with_divergence"])
def test_inputs_that_are_refused(method):
    call = getattr(PotentialField(2, context=1), method)
    t, x, c = torch.tensor(0.5), torch.randn(4, 2), torch.randn(4, 1)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), expected \(B, 2\)"):
        call(t, torch.randn(4, 3), c)
    with pytest.raises(ValueError, match="context is missing"):
        call(t, x)
