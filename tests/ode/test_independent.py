"""batch="independent": a sample's result is its own, in any company, with its own gradient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import cnf
from cnf.ode import METHODS, Solver, odeint, record_solves

ADAPTIVE = ["bosh3", "dopri5", "tsit5", "dopri8"]
FIELDS = {"mlp": cnf.MLPField, "squash": cnf.ConcatSquashField}
BATCHES = (2, 16, 17, 256)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def randomised(module, dtype=torch.float64, seed=0):
    """Every parameter random, so that no gradient is zero by chance."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.6 * normal(*p.shape, seed=1000 * seed + i))
    return module.to(dtype)


def flow_of(field="squash", dims=3, context=0, dtype=torch.float64, **choices):
    choices = {"batch": "independent", **choices}
    made = randomised(FIELDS[field](dims, (8,), context=context), dtype)
    return cnf.Flow(cnf.StandardNormal(dims), cnf.CNF(made, "exact", Solver(**choices))).to(dtype)


def with_gradients(flow, x, context=None, solver=None, seed=0):
    """The log-densities, and the gradients of their weighted sum in x, context and weights."""
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    wanted = [v for v in (x, context) if v is not None] + list(flow.parameters())
    value = flow.log_prob(x, context, solver=solver, generator=torch.Generator().manual_seed(seed))
    weight = 1 + torch.arange(len(x), dtype=x.dtype) / 8
    grads = torch.autograd.grad((weight * value).sum(), wanted, allow_unused=True)
    pairs = zip(wanted, grads, strict=True)
    return value.detach(), [torch.zeros_like(v) if g is None else g for v, g in pairs]


# ---------------------------------------------------------------- alone and in company


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
def test_a_sample_has_the_same_bits_alone_and_in_every_batch(method, field, dtype):
    tol = 1e-4
    flow = flow_of(field, dtype=dtype, method=method, rtol=tol, atol=tol, steps=4)
    x = normal(256, 3, dtype=dtype)
    shared = dataclasses.replace(flow.transform.solver, batch="shared")
    with torch.no_grad():
        batches = {n: flow.log_prob(x[:n]) for n in BATCHES}
        alone = {i: flow.log_prob(x[i : i + 1]) for i in (0, 1, 5, 16, 100, 255)}
        together = flow.log_prob(x, solver=shared)
        shuffled = flow.log_prob(x.flip(0)).flip(0)
    # In float64 a row of some matrix products depends on its place in the batch, by a rounding.
    allowed = 0.0 if dtype == torch.float32 else 1e-10
    for i, value in alone.items():
        for n, values in batches.items():
            if i < n:
                assert (value[0] - values[i]).abs() <= allowed, (i, n)
    assert (shuffled - batches[256]).abs().max() <= allowed
    error = (together - batches[256]).abs().max()
    if method in ADAPTIVE:
        assert 0 < error < 10 * tol * (1 + together.abs().max())
    else:
        assert error < 1e-4 if dtype == torch.float32 else error < 1e-12


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_a_sample_has_the_same_bits_with_and_without_gradient(gradient):
    flow = flow_of("mlp", gradient=gradient, context=2)
    x, context = 2 * normal(40, 3), normal(40, 2, seed=1)
    with torch.no_grad():
        plain = flow.log_prob(x, context)
    assert torch.equal(flow.log_prob(x, context), plain)
    assert torch.equal(flow.log_prob(x[7:8], context[7:8]), plain[7:8])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_sample_is_accurate_among_others_of_every_difficulty(method):
    """x' = r cos(r t) x, with r from 0.1 to 60: the closed form, each to the tolerance."""
    rate = torch.logspace(-1, math.log10(60), 20, dtype=torch.float64)[:, None]
    x, tol = 1 + normal(20, 2).abs(), 1e-5 if method == "bosh3" else 1e-7

    def f(t, x, rate):
        log = rate.squeeze(-1) * (rate.squeeze(-1) * t).cos()
        return log.unsqueeze(-1) * x, log.unsqueeze(-1)

    solver = Solver(method, rtol=tol, atol=tol, batch="independent", max_steps=20000)
    end = odeint(f, x, 0.3, 1.7, solver, args=(rate,))
    log = (1.7 * rate).sin() - (0.3 * rate).sin()
    assert ((end.x / (x * log.exp()) - 1).abs() < 100 * tol).all()
    assert ((end.quadratures - log).abs() < 100 * tol).all()
    assert ((end.quadratures - log).abs() > 0).any()


def test_a_hard_sample_costs_the_others_no_steps_and_no_accuracy():
    """Finished samples drop out of the evaluations, but for the padding of a block."""
    rate = torch.ones(64, 1, dtype=torch.float64)
    rate[5] = 200.0
    sizes = []

    class Field(nn.Module):
        def forward(self, t, x, rate):
            return (rate * t).cos() * rate * x

    class Dynamics:
        def with_own_times(self, t, x, rate):
            sizes.append(len(x))
            return (rate * t[:, None]).cos() * rate * x

        def __call__(self, t, x, rate):
            sizes.append(len(x))
            return Field()(t, x, rate)

    x = torch.ones(64, 1, dtype=torch.float64)
    tol = 1e-8
    solver = Solver(rtol=tol, atol=tol, batch="independent", max_steps=20000)
    end = odeint(Dynamics(), x, 0.0, 1.0, solver, args=(rate,))
    assert sizes[0] == 64
    assert sizes[-1] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert sum(n == 32 for n in sizes) > 0.8 * len(sizes)
    assert end.stats.nfe == len(sizes)
    torch.testing.assert_close(end.x, rate.sin().exp(), rtol=1e-6, atol=0)
    alone = odeint(Dynamics(), x[:1], 0.0, 1.0, solver, args=(rate[:1],))
    assert torch.equal(alone.x, end.x[:1])


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_gradient_is_the_sum_of_those_of_the_samples(gradient):
    tol = 1e-9 if gradient == "adjoint" else 1e-5
    flow = flow_of(context=2, gradient=gradient, rtol=tol, atol=tol)
    x, context = 2 * normal(5, 3), normal(5, 2, seed=1)
    value, (gx, gc, *gp) = with_gradients(flow, x, context)
    total = [torch.zeros_like(g) for g in gp]
    backprop = Solver(rtol=tol, atol=tol, batch="independent")
    for i in range(5):
        one, (ox, oc, *op) = with_gradients(flow, x[i : i + 1], context[i : i + 1], backprop)
        weight = 1 + i / 8
        close = {"rtol": 1e-6, "atol": 1e-6} if gradient == "adjoint" else {}
        close = close or {"rtol": 1e-10, "atol": 1e-11}
        assert torch.equal(one[0], value[i])
        torch.testing.assert_close(gx[i], weight * ox[0], **close)
        torch.testing.assert_close(gc[i], weight * oc[0], **close)
        total = [t + weight * o for t, o in zip(total, op, strict=True)]
    for found, expected in zip(gp, total, strict=True):
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_the_gradient_against_central_differences(method, gradient):
    flow = flow_of(method=method, gradient=gradient, rtol=1e-10, atol=1e-10, max_steps=5000)
    x = normal(3, 3)
    _, grads = with_gradients(flow, x)
    leaves, eps = [x, *flow.parameters()], 1e-5
    directions = [normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]

    def moved(sign):
        with torch.no_grad():
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(d, alpha=sign * eps)
            weight = 1 + torch.arange(3, dtype=x.dtype) / 8
            value = (weight * flow.log_prob(x)).sum()
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.sub_(d, alpha=sign * eps)
        return value

    truth = (moved(1) - moved(-1)) / (2 * eps)
    found = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
@pytest.mark.parametrize("divergence", [cnf.Exact(), cnf.Hutchinson("gaussian", probes=2)])
def test_checkpoint_is_backprop(method, divergence):
    flow = flow_of(context=1, method=method, steps=3, rtol=1e-4, atol=1e-4)
    flow.transform.divergence = divergence
    x, context = 2 * normal(18, 3), normal(18, 1, seed=1)
    value, truth = with_gradients(flow, x, context)
    again = dataclasses.replace(flow.transform.solver, gradient="checkpoint")
    replayed, found = with_gradients(flow, x, context, again)
    assert torch.equal(value, replayed)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_refused_steps_that_overflow_leave_the_gradients_alone(gradient):
    """x' = -(k x)^3 overflows in a first step far too large, of the samples with a large k."""
    scale = torch.tensor([[1e-3], [1.0], [20.0]])
    solver = Solver(gradient=gradient, batch="independent", first_step=1.0)
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    k = scale.requires_grad_()

    def f(t, x, k):
        return -((k * x) ** 3)

    with record_solves() as solves:
        end = odeint(f, x, 0.0, 1.0, solver, args=(k,))
        found = torch.autograd.grad(end.x.sum(), (x, k))
    assert solves[0].rejected > 3
    careful = Solver(rtol=1e-6, atol=1e-6, first_step=1e-6, max_steps=5000)
    wide = [v.detach().double().requires_grad_() for v in (x, k)]
    truth = odeint(f, wide[0], 0.0, 1.0, careful, args=(wide[1],))
    for a, b in zip(found, torch.autograd.grad(truth.x.sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0), (0.4, -1.3), (1000.1, 1000.4)])
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
def test_spans_of_both_directions(method, span):
    x = 1 + normal(18, 2).abs()
    solver = Solver(method, rtol=1e-8, atol=1e-8, steps=60, batch="independent")
    end = odeint(lambda t, x: ((3 * t).sin() * x, x), x, *span, solver)
    exact = x * math.exp((math.cos(3 * span[0]) - math.cos(3 * span[1])) / 3)
    torch.testing.assert_close(end.x, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("times", [(0.2, 0.9), (0.9, -0.4)])
def test_the_gradient_in_the_times(times, gradient):
    """x' = 3 t^2 x has x(t1) = x0 exp(t1^3 - t0^3)."""
    x = 1 + normal(3, 2).abs()
    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in times)
    solver = Solver(rtol=1e-10, atol=1e-10, gradient=gradient, batch="independent")
    end = odeint(lambda t, x: (3 * t**2 * x, x[:, :1]), x, t0, t1, solver)
    found = torch.autograd.grad(end.x.sum() + end.quadratures.sum(), (t0, t1))
    total = x.sum() * math.exp(times[1] ** 3 - times[0] ** 3)
    torch.testing.assert_close(
        end.x, x * math.exp(times[1] ** 3 - times[0] ** 3), rtol=1e-8, atol=0
    )
    # d/dt1 = sum 3 t1^2 x(t1) + q'(t1); d/dt0 moves the start of both.
    first = x[:, 0].sum()
    d1 = 3 * times[1] ** 2 * total + first * math.exp(times[1] ** 3 - times[0] ** 3)
    torch.testing.assert_close(found[1], d1, rtol=1e-6, atol=1e-8)
    grid = torch.linspace(*times, 200001, dtype=torch.float64)
    inner = torch.trapezoid((grid**3 - times[0] ** 3).exp(), grid)
    d0 = -3 * times[0] ** 2 * (total + first * inner) - first
    torch.testing.assert_close(found[0], d0, rtol=1e-6, atol=1e-8)


def test_a_span_of_no_length_is_the_identity():
    x = normal(3, 2).requires_grad_()
    end = odeint(lambda t, x: (-x, x[:, :1]), x, 0.5, 0.5, Solver(batch="independent"))
    assert torch.equal(end.x, x)
    assert not end.quadratures.any()
    assert torch.equal(torch.autograd.grad(end.x.sum(), x)[0], torch.ones_like(x))


# ---------------------------------------------------------------- shapes, noise, fields


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_batches_of_every_size(n, gradient):
    flow = flow_of(context=2, gradient=gradient)
    value, (gx, gc, *_) = with_gradients(flow, normal(n, 3), normal(n, 2, seed=1))
    assert value.shape == (n,)
    assert gx.shape == (n, 3)
    assert all(v.isfinite().all() for v in (value, gx, gc))
    single = flow_of(context=2)
    for i in range(min(n, 2)):
        one = single.log_prob(normal(n, 3)[i : i + 1], normal(n, 2, seed=1)[i : i + 1])
        assert torch.equal(one[0], value[i])


@pytest.mark.parametrize("shape", [(), (2, 2, 3)], ids=["scalar", "picture"])
def test_events_of_any_shape(shape):
    x = 1 + normal(18, *shape).abs()
    flow = cnf.CNF(lambda t, x: -2 * t * x, "exact", Solver(batch="independent"))
    flow.event_dims = len(shape)
    z, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(z, x * math.exp(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        log_det, torch.full((18,), -float(math.prod(shape))).double(), rtol=1e-4, atol=1e-4
    )


def test_the_noise_stays_with_its_sample():
    """With Hutchinson's estimator a linear field has log-determinants e^T A e, each its own."""
    a = normal(3, 3)
    flow = cnf.CNF(lambda t, x: x @ a.T, cnf.Hutchinson(), Solver(batch="independent"))
    x = normal(40, 3, seed=1)
    _, log_det = flow.forward_and_log_det(x, generator=torch.Generator().manual_seed(3))
    e = cnf.Hutchinson().sample_noise(x, torch.Generator().manual_seed(3))[:, 0]
    torch.testing.assert_close(log_det, ((e @ a.T) * e).sum(-1), rtol=1e-9, atol=1e-9)
    assert log_det.std() > 0.1


def test_a_flow_of_two_blocks_and_both_directions():
    field = randomised(cnf.MLPField(2, (8,)))
    tight = Solver(rtol=1e-8, atol=1e-8, batch="independent")
    both = cnf.Compose(cnf.CNF(field, "exact", tight), cnf.CNF(field, "exact", tight))
    x = normal(17, 2)
    z, log_det = both.inverse_and_log_det(x)
    back, minus = both.forward_and_log_det(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, -minus, rtol=0, atol=1e-6)


def test_a_field_that_cannot_be_vectorised_is_refused_with_what_to_do():
    class Field(nn.Module):
        def forward(self, t, x):
            return -x if x.sum().item() > 0 else x

    for field in (Field(), lambda t, x: -x if (x > 0).all() else x):
        flow = cnf.CNF(field, "exact", Solver(batch="independent"))
        for call in (flow.forward, flow.forward_and_log_det):
            with pytest.raises(ValueError, match=r"batch='independent'.*vmap.*batch='shared'"):
                call(normal(3, 2))
    with pytest.raises(ValueError, match="batch_dims=0"):
        odeint(lambda t, x: -x, normal(3), 0, 1, Solver(batch="independent"), batch_dims=0)


def test_the_statistics_of_a_solve():
    flow = flow_of()
    with record_solves() as solves, torch.no_grad():
        flow.log_prob(2 * normal(40, 3))
        flow.log_prob(2 * normal(40, 3), solver=Solver())
    own, shared = solves
    assert (own.status, own.failed, own.kind) == ("converged", 0, "forward")
    assert own.accepted >= shared.accepted > 0
    rounds = own.nfe / (len(METHODS["dopri5"].nodes) - 1)
    assert own.accepted - 1 <= rounds <= own.accepted + own.rejected + 2


def test_a_failure_names_the_samples_of_the_callers_batch():
    def f(t, x):
        return x**2

    x = torch.full((40, 1), 0.1)
    x[[3, 37]] = 4.0
    with pytest.raises(cnf.SolverError) as raised:
        odeint(f, x, 0.0, 1.0, Solver(batch="independent"))
    assert raised.value.status in ("blow_up", "step_underflow")
    assert set(raised.value.samples) == {3, 37}
    assert 0.24 < raised.value.t < 0.26
