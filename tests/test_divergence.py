"""The divergence: exact against brute force, Hutchinson's against theory, and derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnf
from cnf import Exact, Hutchinson
from cnf.divergence import as_divergence

SHAPES = {"scalar": (), "vector": (5,), "image": (2, 3, 2)}
NOISES = ["rademacher", "gaussian"]
T = torch.tensor(0.3, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Mixing(nn.Module):
    """A field of any event shape whose Jacobian is dense: tanh(W x + V c + u t) * x."""

    def __init__(self, shape, context=2):
        super().__init__()
        dims = math.prod(shape)
        self.shape = shape
        self.w = nn.Parameter(normal(dims, dims))
        self.v = nn.Parameter(normal(dims, context))
        self.u = nn.Parameter(normal(dims))

    def forward(self, t, x, context=None):
        flat = x.reshape(len(x), math.prod(self.shape))  # (B, *event) -> (B, D)
        shift = self.u * t if context is None else self.u * t + context @ self.v.T
        return ((flat @ self.w.T + shift).tanh() * flat).reshape(x.shape)


def brute_force(field, t, x, context):
    """The trace of the Jacobian of each sample alone, by `torch.autograd.functional.jacobian`."""
    traces = []
    for i in range(len(x)):
        c = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=c: field(t, v[None], c)[0], x[i])
        traces.append(jacobian.reshape(x[i].numel(), -1).trace())
    return torch.stack(traces)


def matrix_field(a):
    """f = A x in any of the shapes; its Jacobian is A."""
    return lambda t, x, context: (x.reshape(len(x), -1) @ a.T).reshape(x.shape)


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("with_context", [False, True], ids=["no context", "context"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_is_the_trace_of_the_jacobian(shape, with_context):
    field, x = Mixing(shape), normal(4, *shape)
    context = normal(4, 2) if with_context else None
    dx, div = Exact()(field, T, x, context)
    torch.testing.assert_close(dx, field(T, x, context), rtol=0, atol=0)
    expected = brute_force(field, T, x, context)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(div, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11, 12, 13, 1000])
def test_chunks_do_not_change_the_value(chunk):
    field, x = Mixing((2, 3, 2)), normal(4, 2, 3, 2)
    torch.testing.assert_close(
        Exact(chunk)(field, T, x)[1], Exact()(field, T, x)[1], rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize(("chunk", "passes"), [(None, 3), (1, 12), (5, 3), (12, 1)])
def test_chunks_bound_the_products_taken_at_once(chunk, passes):
    x, calls = normal(4, 12), []
    w = normal(12, 12)

    class Spied(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, g):
            calls.append(g.shape)
            return g * ctx.saved_tensors[0].cos()

    div = Exact(chunk)(lambda t, x, c: Spied.apply(x) @ w.T, T, x)[1]
    torch.testing.assert_close(div, (x.cos() * w.diagonal()).sum(-1))
    assert len(calls) == passes


class Stubborn(torch.autograd.Function):
    """A sine whose backward pass asks for a number, which vmap cannot give."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos() if g.abs().sum().item() >= 0 else None


@pytest.mark.parametrize(
    "divergence",
    [Exact(), Exact(1), Hutchinson(probes=3)],
    ids=["exact", "one by one", "hutchinson"],
)
def test_a_backward_pass_that_cannot_be_vectorised(divergence):
    x = normal(4, 3)
    noise = divergence.sample_noise(x)
    div = divergence(lambda t, x, c: Stubborn.apply(x), T, x, None, noise)[1]
    if isinstance(divergence, Hutchinson):
        torch.testing.assert_close(div, (noise.square() * x.cos()[:, None]).sum(-1).mean(1))
    else:
        torch.testing.assert_close(div, x.cos().sum(-1))


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=2)], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "x requires grad"])
@pytest.mark.parametrize(
    "field",
    [
        lambda t, x, c: torch.ones_like(x),
        lambda t, x, c: x.detach() * 2,
        lambda t, x, c: torch.zeros_like(x) + Mixing((3,)).u,
    ],
    ids=["constant", "detached", "parameter alone"],
)
def test_a_field_that_does_not_depend_on_x(field, grad, divergence):
    x = normal(4, 3).requires_grad_(grad)
    dx, div = divergence(field, T, x, None, divergence.sample_noise(x))
    assert dx.shape == (4, 3)
    assert torch.equal(div, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=2)], ids=["exact", "hutchinson"])
def test_a_field_that_depends_on_some_dimensions_alone(divergence):
    x = normal(4, 3)
    noise = divergence.sample_noise(x)
    _, div = divergence(
        lambda t, x, c: torch.cat((x[:, :1] ** 2, torch.ones(4, 2)), -1), T, x, None, noise
    )
    torch.testing.assert_close(div, 2 * x[:, 0])  # a diagonal Jacobian: Rademacher probes are exact


def test_a_closed_form_is_used_and_has_the_context():
    class Field:
        def __call__(self, t, x, context):
            raise AssertionError("the field itself was called")

        def with_divergence(self, t, x, context):
            return t * x, context.sum(-1)

    x, context = normal(4, 3), normal(4, 2)
    dx, div = Exact()(Field(), T, x, context)
    torch.testing.assert_close(dx, 0.3 * x)
    torch.testing.assert_close(div, context.sum(-1))


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(), Hutchinson(probes=2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_empty_batch(shape, divergence):
    x = normal(0, *shape)
    dx, div = divergence(Mixing(shape), T, x, None, divergence.sample_noise(x))
    assert (dx.shape, div.shape) == ((0, *shape), (0,))


def test_float32_stays_float32():
    x = torch.randn(4, 3)
    for divergence in (Exact(), Hutchinson(), Hutchinson("gaussian")):
        noise = divergence.sample_noise(x)
        assert noise is None or noise.dtype == torch.float32
        assert (
            divergence(lambda t, x, c: x.sin(), T.float(), x, None, noise)[1].dtype == torch.float32
        )


# ---------------------------------------------------------------- grad modes

BOTH = [Exact(), Hutchinson("gaussian", probes=2)]


@pytest.mark.parametrize("divergence", BOTH, ids=["exact", "hutchinson"])
def test_values_are_the_same_without_grad(divergence):
    field, x = Mixing((3,)), normal(4, 3)
    noise = divergence.sample_noise(x)
    with_grad = divergence(field, T, x, None, noise)
    with torch.no_grad():
        without = divergence(field, T, x, None, noise)
    for a, b in zip(with_grad, without, strict=True):
        assert a.requires_grad
        assert not b.requires_grad
        assert torch.equal(a, b)
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("divergence", BOTH, ids=["exact", "hutchinson"])
def test_nothing_requires_grad_where_nothing_can(divergence):
    field, x = Mixing((3,)).requires_grad_(False), normal(4, 3)
    results = divergence(field, T, x, None, divergence.sample_noise(x))
    assert not any(v.requires_grad for v in results)
    assert not x.requires_grad


@pytest.mark.parametrize("divergence", BOTH, ids=["exact", "hutchinson"])
@pytest.mark.parametrize("source", ["x", "parameter", "context", "time"])
def test_one_source_of_grad_is_enough(source, divergence):
    field, x, context, t = Mixing((3,)).requires_grad_(False), normal(4, 3), normal(4, 2), T.clone()
    tensor = {"x": x, "parameter": field.w, "context": context, "time": t}[source].requires_grad_()
    dx, div = divergence(field, t, x, context, divergence.sample_noise(x))
    assert dx.requires_grad
    assert torch.autograd.grad(div.sum(), tensor)[0].abs().sum() > 0


@pytest.mark.parametrize("born", ["normal parameters", "inference parameters"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_inference_mode_through_a_flow(divergence, born):
    torch.manual_seed(3)
    if born == "normal parameters":
        flow = cnf.CNF(cnf.MLPField(3, (6,)), divergence)
    else:
        with torch.inference_mode():
            flow = cnf.CNF(cnf.MLPField(3, (6,)), divergence)
    torch.manual_seed(3)
    plain = cnf.CNF(cnf.MLPField(3, (6,)), divergence)
    x = torch.randn(4, 3)
    expected = plain.inverse_and_log_det(x, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = flow.inverse_and_log_det(x.clone(), generator=torch.Generator().manual_seed(0))
        value = flow.inverse(x.clone())
    for a, b in zip((*found, value), (*expected, plain.inverse(x)), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("divergence", BOTH, ids=["exact", "hutchinson"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_derivatives_of_first_and_second_order(shape, divergence):
    module, x, context = Mixing(shape), normal(2, *shape), normal(2, 2)
    noise = divergence.sample_noise(x)

    def both(t, x, context, w, u):
        def field(t, x, context):
            flat = x.reshape(len(x), -1)
            return ((flat @ w.T + u * t + context @ module.v.detach().T).tanh() * flat).reshape(
                x.shape
            )

        return divergence(field, t, x, context, noise)

    inputs = [v.detach().clone().requires_grad_() for v in (T, x, context, module.w, module.u)]
    assert gradcheck(both, inputs, rtol=1e-6, atol=1e-8)
    if shape != (2, 3, 2):
        assert gradgradcheck(both, inputs, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- Hutchinson


def estimates(noise, a, count, probes=1):
    """Estimates of tr A, one a sample."""
    x = torch.zeros(count, len(a), dtype=torch.float64)
    divergence = Hutchinson(noise, probes)
    e = divergence.sample_noise(x, torch.Generator().manual_seed(5))
    return divergence(matrix_field(a), T, x, None, e)[1]


def one_probe_variance(noise, a):
    s = (a + a.T) / 2
    diagonal = s.diagonal().square().sum() if noise == "rademacher" else 0
    return float(2 * (s.square().sum() - diagonal))


@pytest.mark.parametrize("noise", NOISES)
def test_the_estimate_is_unbiased_with_the_variance_of_theory(noise):
    a, n = normal(6, 6), 100_000
    values = estimates(noise, a, n)
    z = (values.mean() - a.trace()) / (values.std() / math.sqrt(n))
    assert abs(z) < 4.5
    assert values.var().item() == pytest.approx(one_probe_variance(noise, a), rel=0.05)


@pytest.mark.parametrize("probes", [2, 5])
@pytest.mark.parametrize("noise", NOISES)
def test_probes_divide_the_variance(noise, probes):
    a, n = normal(4, 4), 40_000
    values = estimates(noise, a, n, probes)
    z = (values.mean() - a.trace()) / (values.std() / math.sqrt(n))
    assert abs(z) < 4.5
    assert values.var().item() == pytest.approx(one_probe_variance(noise, a) / probes, rel=0.05)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_estimate_is_the_quadratic_form_of_its_noise(shape, noise):
    dims = math.prod(shape)
    a, x, divergence = normal(dims, dims), normal(4, *shape), Hutchinson(noise, probes=3)
    e = divergence.sample_noise(x)
    assert e.shape == (4, 3, *shape)
    flat = e.reshape(4, 3, dims)
    expected = torch.einsum("bki,ij,bkj->bk", flat, a, flat).mean(1)
    torch.testing.assert_close(divergence(matrix_field(a), T, x, None, e)[1], expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_rademacher_is_exact_in_one_dimension(shape):
    field, x = Mixing(shape), normal(7, *shape)
    estimate = Hutchinson()(field, T, x, None, Hutchinson().sample_noise(x))[1]
    torch.testing.assert_close(estimate, Exact()(field, T, x)[1], rtol=1e-13, atol=0)


def test_noise_has_the_right_values():
    x = torch.zeros(50_000, 2)
    rademacher = Hutchinson().sample_noise(x)
    assert rademacher.unique().tolist() == [-1.0, 1.0]
    assert abs(rademacher.mean().item()) < 4.5 / math.sqrt(rademacher.numel())
    gaussian = Hutchinson("gaussian").sample_noise(x)
    assert abs(gaussian.mean().item()) < 4.5 / math.sqrt(gaussian.numel())
    assert gaussian.var().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_comes_from_the_generator_alone(noise):
    x, divergence = normal(4, 3), Hutchinson(noise, probes=2)
    before = torch.get_rng_state()
    first = divergence.sample_noise(x, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, divergence.sample_noise(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, divergence.sample_noise(x, torch.Generator().manual_seed(2)))
    torch.manual_seed(1)
    assert torch.equal(first, divergence.sample_noise(x))


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_on_the_device_of_the_generator_and_moved_to_that_of_x(noise):
    x = torch.zeros(4, 3, device="meta")
    assert Hutchinson(noise).sample_noise(x, torch.Generator("cpu")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("noise", NOISES)
def test_a_generator_of_the_host_gives_the_same_noise_on_a_gpu(noise):
    x = normal(4, 3)
    here = Hutchinson(noise).sample_noise(x, torch.Generator().manual_seed(1))
    there = Hutchinson(noise).sample_noise(x.cuda(), torch.Generator().manual_seed(1))
    assert there.is_cuda
    assert torch.equal(here, there.cpu())
    own = torch.Generator("cuda").manual_seed(1)
    assert Hutchinson(noise).sample_noise(x.cuda(), own).is_cuda


@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 1, 3), (1, 4, 3), (4, 3), (4, 1, 3, 1)], ids=str)
def test_noise_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(4, 1, 3\).*sample_noise"):
        Hutchinson()(matrix_field(normal(3, 3)), T, normal(4, 3), None, normal(*shape))
    with pytest.raises(ValueError, match="got None"):
        Hutchinson()(matrix_field(normal(3, 3)), T, normal(4, 3), None, None)


# ---------------------------------------------------------------- choices


def test_names_stand_for_the_defaults():
    assert as_divergence("exact") == Exact()
    assert as_divergence("hutchinson") == Hutchinson("rademacher", 1)
    own = Hutchinson(probes=3)
    assert as_divergence(own) is own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exact(0), "chunk_size=0"),
        (lambda: Exact(True), "chunk_size=True"),
        (lambda: Hutchinson(probes=0), "probes=0"),
        (lambda: Hutchinson(probes=1.5), "probes=1.5"),
        (lambda: Hutchinson("uniform"), "noise='uniform'"),
        (lambda: as_divergence("hutchison"), "Did you mean 'hutchinson'"),
    ],
)
def test_choices_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
