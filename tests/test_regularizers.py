"""Regularisers: integrals along known paths, their gradients, and what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import cnf
from cnf import (
    HJBResidual,
    JacobianFrobenius,
    KineticEnergy,
    Regularizer,
    Solver,
    TaylorDerivative,
    TorchDiffEq,
)
from cnf.regularizers.taylor import total_derivative

TIGHT = Solver("dopri8", rtol=1e-10, atol=1e-10)
GENERAL = [KineticEnergy(1), JacobianFrobenius(1), TaylorDerivative(2, 1), TaylorDerivative(3, 1)]
PRODUCTS = cnf.Exact(closed_form=False)
SOLVERS = {
    "backprop": Solver(rtol=1e-3, atol=1e-3),
    "checkpoint": Solver(rtol=1e-3, atol=1e-3, gradient="checkpoint"),
    "adjoint": Solver(rtol=1e-3, atol=1e-3, gradient="adjoint"),
    "independent": Solver(rtol=1e-3, atol=1e-3, batch="independent"),
    "independent checkpoint": Solver(
        rtol=1e-3, atol=1e-3, batch="independent", gradient="checkpoint"
    ),
    "fixed": Solver("rk4", steps=6),
    "torchdiffeq": TorchDiffEq(rtol=1e-3, atol=1e-3),
    "torchdiffeq adjoint": TorchDiffEq(rtol=1e-3, atol=1e-3, gradient="adjoint"),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def randomised(module, std=0.5):
    """Every parameter random, in float64."""
    module, generator = module.double(), seeded(3)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)
    return module


def integrals_of(transform, x, regularizers, context=None, method="inverse_and_log_det", **choices):
    """What the regularisers integrate on the way of one map, (*batch, n)."""
    found = []
    choices = {"generator": seeded(), **choices}
    getattr(transform, method)(
        x, context, regularizers=tuple(regularizers), integrals=found, **choices
    )
    return sum(found)


def nodes(start, end, n=24):
    """Times and weights of Gauss and Legendre's rule, exact for polynomials of degree 2 n - 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    half = (end - start) / 2
    return torch.tensor(start + half * (x + 1)), torch.tensor(w * abs(half))


def quadrature(g, start, end):
    """int g(t) |dt| (B,)."""
    return sum(w * g(t) for t, w in zip(*nodes(start, end), strict=True))


def nth_derivative(path, n):
    """The function t -> d^n path / dt^n."""
    for _ in range(n):
        path = torch.func.jacrev(path)
    return path


# ---------------------------------------------------------------- paths in closed form


class Matrix(nn.Module):
    """x' = A x."""

    def __init__(self, dims=3):
        super().__init__()
        self.A = nn.Parameter(0.6 * normal(dims, dims))

    def forward(self, t, x):
        return x @ self.A.T

    def path(self, x, start):
        return lambda t: (torch.linalg.matrix_exp((t - start) * self.A) @ x.T).T

    def derivative(self, x, start, n):
        path = self.path(x, start)
        return lambda t: path(t) @ torch.linalg.matrix_power(self.A, n).T


class Wave(nn.Module):
    """x' = a x cos(w t) + c, dimension by dimension, where c = 0 has a closed form."""

    def __init__(self, dims=3):
        super().__init__()
        self.a, self.w = nn.Parameter(normal(dims)), nn.Parameter(1 + normal(dims, seed=1).abs())

    def forward(self, t, x):
        return self.a * x * torch.cos(self.w * t)

    def path(self, x, start):
        return lambda t: (
            x * torch.exp(self.a / self.w * (torch.sin(self.w * t) - torch.sin(self.w * start)))
        )

    def derivative(self, x, start, n):
        return nth_derivative(self.path(x, start), n)


def truth(field, regularizer, x, start, end):
    """The integral along the known path, differentiable."""
    start = torch.tensor(start, dtype=torch.float64)
    if isinstance(regularizer, JacobianFrobenius):
        jacobian = torch.func.jacrev(lambda t, x: field(t, x), argnums=1)
        return quadrature(
            lambda t: jacobian(t, x[0]).square().sum().expand(len(x)), float(start), end
        )
    order = getattr(regularizer, "order", 1)
    derivative = field.derivative(x, start, order)
    return quadrature(lambda t: derivative(t).square().sum(-1), float(start), end)


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("kind", [Matrix, Wave])
def test_integrals_along_known_paths_and_their_gradients(kind, method):
    field, x = kind(), normal(4, 3, seed=5).requires_grad_()
    transform = cnf.CNF(field, PRODUCTS, TIGHT, times=(0.2, 1.1))
    start, end = (0.2, 1.1) if method.startswith("forward") else (1.1, 0.2)
    integrals = integrals_of(transform, x, GENERAL, method=method)
    assert integrals.shape == (4, len(GENERAL))
    assert (integrals > 0).all()
    inputs, weights = [x, *field.parameters()], torch.linspace(0.5, 1.5, 4, dtype=x.dtype)
    for found, regularizer in zip(integrals.unbind(-1), GENERAL, strict=True):
        expected = truth(field, regularizer, x, start, end)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        slopes, truths = (
            torch.autograd.grad(
                (weights * v).sum(),
                inputs,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for v in (found, expected)
        )
        for slope, true in zip(slopes, truths, strict=True):
            torch.testing.assert_close(slope, true, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "solver",
    [
        Solver("rk4", steps=15),
        Solver(rtol=1e-6, atol=1e-6),
        Solver(rtol=1e-6, atol=1e-6, batch="independent"),
        TorchDiffEq(rtol=1e-7, atol=1e-7),
    ],
    ids=["fixed", "adaptive", "independent", "torchdiffeq"],
)
def test_both_directions_give_the_same_integrals(solver):
    """The path back is the path."""
    field = randomised(cnf.MLPField(2, (8, 8)), std=0.3)
    transform, x = cnf.CNF(field, PRODUCTS, solver), normal(2, 2)
    back = integrals_of(transform, x, GENERAL[:3])
    there = integrals_of(transform, transform.inverse(x), GENERAL[:3], method="forward_and_log_det")
    assert (back > 0).all()
    torch.testing.assert_close(back, there, rtol=1e-3, atol=1e-4)


def test_times_in_reverse_order_are_no_matter():
    """A CNF built from 1 to 0 runs its inverse forwards."""
    field, x = Matrix(), normal(4, 3)
    usual, other = (cnf.CNF(field, PRODUCTS, TIGHT, times=t) for t in ((0.0, 1.0), (1.0, 0.0)))
    there = integrals_of(usual, x, GENERAL, method="forward_and_log_det")
    back = integrals_of(other, x, GENERAL, method="inverse_and_log_det")
    torch.testing.assert_close(there, back, rtol=0, atol=0)


# ---------------------------------------------------------------- fields without one


FIELDS = {
    "mlp": lambda: cnf.MLPField(2, (8, 7), context=2, gates=True),
    "squash": lambda: cnf.ConcatSquashField(2, (8,), context=2),
    "potential": lambda: cnf.PotentialField(2, (8, 8), context=2),
}


def by_brute_force(field, regularizer, t, x, context):
    """The integrand from Jacobians, and the residual from differences of Phi."""

    def velocity(t, x):
        return field(t, x[None], context)[0]

    def acceleration(t, x):
        of_t = torch.func.jacrev(velocity, argnums=0)(t, x)
        return of_t + torch.func.jacrev(velocity, argnums=1)(t, x) @ velocity(t, x)

    if isinstance(regularizer, KineticEnergy):
        return velocity(t, x).square().sum()
    if isinstance(regularizer, JacobianFrobenius):
        return torch.func.jacrev(velocity, argnums=1)(t, x).square().sum()
    if isinstance(regularizer, TaylorDerivative):
        if regularizer.order == 2:
            return acceleration(t, x).square().sum()
        h, speed = 1e-4, velocity(t, x)
        ends = [acceleration(t + s, x + s * speed) for s in (h, -h)]  # d^3 x / dt^3
        return ((ends[0] - ends[1]) / (2 * h)).square().sum()
    h = 1e-5

    def phi(t, x):
        return field.potential(t, x[None], context)[0]

    slope = (phi(t + h, x) - phi(t - h, x)) / (2 * h)
    steps = h * torch.eye(len(x), dtype=x.dtype)
    gradient = torch.stack([(phi(t, x + e) - phi(t, x - e)) / (2 * h) for e in steps])
    return (slope - gradient.square().sum() / 2).abs()


@pytest.mark.parametrize("name", FIELDS)
def test_integrals_along_a_tight_path(name):
    """Nonlinear fields, in time and context too: brute force at the nodes of a quadrature."""
    field = randomised(FIELDS[name](), std=0.3)
    regularizers = [*GENERAL, *([HJBResidual(1)] if name == "potential" else [])]
    z, context, times = normal(1, 2), normal(1, 2, seed=1), (0.1, 0.4)
    transform = cnf.CNF(field, PRODUCTS, Solver("rk4", steps=12), times=times)
    found = integrals_of(transform, z, regularizers, context, "forward_and_log_det")
    at, weights = nodes(*times, n=16)
    with torch.no_grad():
        path = transform.trajectory(z, at, context, solver=Solver(rtol=1e-8, atol=1e-8))
        for value, r in zip(found[0], regularizers, strict=True):
            points = zip(at, path[:, 0], weights, strict=True)
            expected = sum(w * by_brute_force(field, r, t, x, context) for t, x, w in points)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=0, msg=r.name)


@pytest.mark.parametrize(
    ("name", "divergence", "gradient"),
    [
        ("mlp", "exact", "backprop"),
        ("mlp", PRODUCTS, "backprop"),
        ("mlp", "hutchinson", "checkpoint"),
        ("mlp", PRODUCTS, "adjoint"),
        ("potential", "exact", "checkpoint"),
        ("potential", PRODUCTS, "backprop"),
        ("potential", "hutchinson", "backprop"),
        ("potential", "hutchinson", "adjoint"),
    ],
    ids=str,
)
def test_gradients_against_central_differences(name, divergence, gradient):
    """In parameters, x, context and learned times, at fixed noise."""
    torch.manual_seed(0)
    field = randomised(FIELDS[name](), std=0.3 if gradient == "adjoint" else 0.5)
    regularizers = [*GENERAL[:3], *([HJBResidual(1)] if name == "potential" else [])]
    times = tuple(nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in (0.1, 0.8))
    solver = Solver("rk4", steps=8 if gradient == "adjoint" else 2, gradient=gradient)
    transform = cnf.CNF(field, divergence, solver, times=times)
    x, context = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    weights = torch.linspace(0.5, 1.5, len(regularizers), dtype=x.dtype)
    inputs = [x, context, *transform.parameters()]

    def loss():
        return (integrals_of(transform, x, regularizers, context) * weights).sum()

    slopes, h = torch.autograd.grad(loss(), inputs), 1e-5
    loose = 0.03 if gradient == "adjoint" else 1e-6
    for part in (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, None)):  # x, context, times, field
        directions = [torch.randn_like(v) for v in inputs[part]]
        slope = sum((g * d).sum() for g, d in zip(slopes[part], directions, strict=True))
        ends = []
        with torch.no_grad():
            for step in (h, -2 * h):
                torch._foreach_add_(inputs[part], directions, alpha=step)
                ends.append(loss())
            torch._foreach_add_(inputs[part], directions, alpha=h)  # back
        difference = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=loose, atol=loose)


# ---------------------------------------------------------------- what they leave alone


def outcome(transform, x, context, regularizers):
    """Log-determinants, their gradients, and what the solve did; with or without integrals."""
    choices = {"regularizers": regularizers, "integrals": []} if regularizers else {}
    with cnf.record_solves() as solves:
        z, log_det = transform.inverse_and_log_det(x, context, generator=seeded(), **choices)
        inputs = [x, context, *transform.parameters()]
        grads = torch.autograd.grad(z.sin().sum() + log_det.exp().sum(), inputs)
    counts = [(s.accepted, s.rejected, s.nfe, s.next_step) for s in solves]
    return [z, log_det], list(grads), counts


@pytest.mark.parametrize(
    ("solver", "divergence", "dtype"),
    [
        ("backprop", "exact", torch.float64),
        ("backprop", PRODUCTS, torch.float32),
        ("backprop", "hutchinson", torch.float64),
        ("backprop", cnf.HutchPlusPlus(1, 2), torch.float64),
        ("checkpoint", PRODUCTS, torch.float64),
        ("adjoint", "hutchinson", torch.float64),
        ("independent", "exact", torch.float64),
        ("independent", PRODUCTS, torch.float64),
        ("independent", "hutchinson", torch.float32),
        ("independent checkpoint", "hutchinson", torch.float64),
        ("fixed", PRODUCTS, torch.float64),
        ("torchdiffeq", PRODUCTS, torch.float64),
        ("torchdiffeq adjoint", "hutchinson", torch.float64),
    ],
    ids=str,
)
def test_the_log_density_is_the_same_bit_for_bit(solver, divergence, dtype):
    """And so are the steps; the gradient but for the order of its sums."""
    field = randomised(cnf.PotentialField(2, (4, 4), context=2)).to(dtype)
    transform = cnf.CNF(field, divergence, SOLVERS[solver])
    x, context = (normal(3, 2, seed=s).to(dtype).requires_grad_() for s in (0, 1))
    values, grads, counts = outcome(transform, x, context, ())
    found, own, same = outcome(transform, x, context, (*GENERAL[:3], HJBResidual(1)))
    assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
    assert counts[0] == same[0]
    loose = {"rtol": 1e-3, "atol": 1e-3}  # an adjoint's steps are others with more to weigh
    for a, b in zip(grads, own, strict=True):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize("divergence", [PRODUCTS, "hutchinson"], ids=str)
def test_every_way_to_solve_gives_the_same(divergence):
    field, found = randomised(cnf.PotentialField(2, (4,), context=2), std=0.4), {}
    transform, regularizers = cnf.CNF(field, divergence), GENERAL[:3]
    x, context = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    for name, solver in SOLVERS.items():
        if name == "fixed":
            solver = dataclasses.replace(solver, steps=12)
        integrals = integrals_of(transform, x, regularizers, context, solver=solver)
        grads = torch.autograd.grad(integrals.sum(), [x, context, *field.parameters()])
        found[name] = integrals, torch.cat([g.flatten() for g in grads])
    for name, values in found.items():
        for value, expected in zip(values, found["fixed"], strict=True):
            assert (value - expected).norm() <= 0.01 * expected.norm(), name


# ---------------------------------------------------------------- products


class Counted(nn.Module):
    """A nonlinear field that counts its evaluations; no closed form."""

    def __init__(self):
        super().__init__()
        self.within, self.calls = randomised(cnf.MLPField(3, (8,))), 0

    def forward(self, t, x):
        self.calls += 1
        return self.within(t, x)


@pytest.mark.parametrize(
    ("divergence", "more"),
    [
        ("hutchinson", 0),
        (cnf.Hutchinson("gaussian", probes=2), 0),
        (PRODUCTS, 0),
        (cnf.HutchPlusPlus(1, 1), 1),
    ],
    ids=str,
)
def test_the_jacobian_norm_takes_the_products_that_there_are(monkeypatch, divergence, more):
    field, products = Counted(), []
    transform = cnf.CNF(field, divergence, Solver("rk4", steps=1))
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (products.append(1), grad(*a, **k))[1]
    )
    counts = []
    for regularizers in ((), (KineticEnergy(1), JacobianFrobenius(1))):
        field.calls = 0
        products.clear()
        integrals_of(transform, normal(5, 3), regularizers)
        counts.append((field.calls, len(products)))
    (calls, plain), (same, with_norm) = counts
    assert calls == same
    assert with_norm == plain + 4 * more  # four evaluations


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_closed_form_takes_one_product(monkeypatch, divergence):
    products, grad = [], torch.autograd.grad
    transform = cnf.CNF(randomised(cnf.MLPField(3, (8,))), divergence, Solver("rk4", steps=1))
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (products.append(1), grad(*a, **k))[1]
    )
    integrals_of(transform, normal(5, 3), [JacobianFrobenius(1)])
    assert len(products) == 4


@pytest.mark.parametrize(
    "divergence",
    [
        "exact",
        cnf.Hutchinson(),
        cnf.Hutchinson("gaussian", probes=3),
        cnf.Hutchinson("orthogonal", probes=2),
        cnf.HutchPlusPlus(2, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("hidden", [False, True], ids=["field", "without closed forms"])
def test_the_jacobian_norm_is_unbiased(divergence, hidden):
    """Over many copies of one point, each with noise of its own."""
    field, n = randomised(cnf.MLPField(3, (8,))), 20_000
    shown = (lambda t, x: field(t, x)) if hidden else field
    x = normal(1, 3)
    solver = Solver("rk4", steps=2)
    with torch.no_grad():
        expected = integrals_of(cnf.CNF(field, PRODUCTS, solver), x, [JacobianFrobenius(1)])
        transform = cnf.CNF(shown, divergence, solver)
        found = integrals_of(transform, x.expand(n, 3), [JacobianFrobenius(1)])
    assert abs(found.mean() - expected.squeeze()) <= 4.5 * found.std() / n**0.5 + 1e-9
    assert (found.std() < 1e-12) == (hidden and divergence == "exact")


def test_noise_is_repeated_by_a_generator():
    transform, x = cnf.CNF(cnf.MLPField(3, (8,)), "exact"), torch.randn(5, 3)
    found = [integrals_of(transform, x, GENERAL, generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0][:, 1], found[2][:, 1])


# ---------------------------------------------------------------- shapes, containers, modes


@pytest.mark.parametrize("divergence", ["exact", PRODUCTS, "hutchinson"], ids=str)
@pytest.mark.parametrize("event", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_events_and_batches_of_any_rank(event, batch, divergence):
    """x' = 2 x, whose path is known."""
    solver = Solver("rk4", steps=20)
    transform = cnf.CNF(lambda t, x: 2 * x, divergence, solver, event_dims=len(event))
    x = normal(*batch, *event)
    found = integrals_of(transform, x, GENERAL, method="forward_and_log_det")
    assert found.shape == (*batch, 4)
    dims = math.prod(event)
    square = x.reshape(*batch, dims).square().sum(-1) * (math.e**4 - 1) / 4
    expected = [4 * square, torch.full_like(square, 4 * dims), 16 * square, 64 * square]
    torch.testing.assert_close(found, torch.stack(expected, -1), rtol=1e-4, atol=0)


def test_constant_fields_have_nothing_to_differentiate():
    transform = cnf.CNF(lambda t, x: torch.ones_like(x), "hutchinson")
    found = integrals_of(transform, normal(4, 3), GENERAL)
    torch.testing.assert_close(found[0], torch.tensor([3.0, 0, 0, 0]).double(), atol=1e-9, rtol=0)


def test_images():
    field = cnf.ConvField((2, 4, 4), hidden=(3,))
    transform = cnf.CNF(field, "hutchinson", Solver("rk4", steps=2))
    found = integrals_of(transform, torch.randn(3, 2, 4, 4), GENERAL)
    assert found.shape == (3, 4)
    found.sum().backward()
    assert all(p.grad is not None for p in field.parameters())


def test_containers_sum_over_their_cnfs():
    parts = [cnf.CNF(Matrix(), PRODUCTS, Solver("rk4")) for _ in range(2)]
    chain = cnf.Compose(parts[0], cnf.Inverse(parts[1]))
    flow, x = cnf.Flow(cnf.StandardNormal(3).double(), chain), normal(4, 3)
    log_prob, total = flow.log_prob_and_integrals(x, regularizers=GENERAL)
    last = integrals_of(parts[1], x, GENERAL, method="forward_and_log_det")
    first = integrals_of(parts[0], parts[1].forward(x), GENERAL)
    torch.testing.assert_close(total, first + last)
    assert torch.equal(log_prob, flow.log_prob(x))


def test_multiscale_and_dequantized_flows():
    within = cnf.MultiscaleFFJORD((1, 4, 4), (4,), levels=2, solver=Solver("rk4", steps=2))
    ends = cnf.Compose(within.transform, cnf.Sigmoid(), cnf.UniformDequantization(16))
    flow, x = cnf.Flow(within.base, ends), torch.randint(16, (3, 1, 4, 4))
    n = sum(isinstance(part, cnf.CNF) for part in flow.modules())
    found = []
    flow.transform.inverse_and_log_det(x, regularizers=tuple(GENERAL), integrals=found)
    assert [tuple(v.shape) for v in found] == [(3, 4)] * n
    log_prob, total = flow.log_prob_and_integrals(x, regularizers=GENERAL)
    assert (log_prob.shape, total.shape) == ((3,), (3, 4))
    assert (total > 0).all()


def test_grad_mode_does_not_matter():
    transform, x = cnf.CNF(randomised(cnf.MLPField(2, (8,))), PRODUCTS), normal(4, 2)
    expected = integrals_of(transform, x, GENERAL)
    with torch.no_grad():
        found = integrals_of(transform, x, GENERAL)
    with torch.inference_mode():
        inferred = integrals_of(transform, x, GENERAL)
    assert expected.requires_grad
    assert not found.requires_grad
    for value in (found, inferred):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)


def test_integrals_stand_beside_standard_errors():
    transform = cnf.CNF(randomised(cnf.MLPField(3, (8,))), cnf.Hutchinson(probes=4))
    x, variances = normal(4, 3), []
    _, log_det = transform.inverse_and_log_det(x, generator=seeded(), variances=variances)
    both = []
    found = integrals_of(transform, x, GENERAL, variances=both)
    torch.testing.assert_close(both[0], variances[0], rtol=0, atol=0)
    torch.testing.assert_close(found, integrals_of(transform, x, GENERAL), rtol=0, atol=0)
    assert log_det.shape == (4,)


# ---------------------------------------------------------------- the derivative along the path


class Cube(torch.autograd.Function):
    """x^3, as a user writes it: torch.func does not go through it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_fields_of_any_making_have_higher_derivatives():
    """A function of a user's own, and a field that differentiates a potential by autograd."""

    def potential(t, x):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad((t * y**4 / 4).sum(), y, create_graph=True)[0]

    x = 0.5 * normal(4, 2)
    expected = integrals_of(cnf.CNF(lambda t, x: t * x**3, PRODUCTS), x, GENERAL)
    for field in (lambda t, x: t * Cube.apply(x), potential):
        found = integrals_of(cnf.CNF(field, PRODUCTS), x, GENERAL)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_total_derivatives_at_a_time_of_each_sample():
    t, x, dx = normal(5), normal(5, 2), normal(5, 2, seed=1)
    found = total_derivative(lambda t, x: t[:, None] ** 2 * x.sin(), t, x, dx)
    expected = 2 * t[:, None] * x.sin() + t[:, None] ** 2 * x.cos() * dx
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- a user's own, and refusals


@dataclasses.dataclass(frozen=True)
class Own(Regularizer):
    """int t |x|^2 dt, of any shape and kind."""

    weight: float
    sum_over: int = 1
    kind: str = "own"

    @property
    def name(self):
        return self.kind

    def integrand(self, point):
        if self.kind == "number":
            return 1.0
        value = point.t * point.x.square()
        return value.sum(-1) if self.sum_over else value


def test_a_regulariser_of_ones_own():
    field, x = Matrix(), normal(4, 3)
    transform = cnf.CNF(field, PRODUCTS, TIGHT)
    found = integrals_of(transform, x, [Own(1.0)]).squeeze(-1)
    path = field.path(x, torch.tensor(1.0).double())
    expected = quadrature(lambda t: t * path(t).square().sum(-1), 1.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_integrands_of_wrong_shapes_are_refused():
    transform, x = cnf.CNF(Matrix(), PRODUCTS), normal(4, 3)
    with pytest.raises(ValueError, match=r"integrand of Own must have the shape \(B,\) = \(4,\)"):
        integrals_of(transform, x, [Own(1.0, sum_over=0)])
    with pytest.raises(TypeError, match=r"integrand of Own must be a tensor .* got float"):
        integrals_of(transform, x, [Own(1.0, kind="number")])


@pytest.mark.parametrize("kind", [KineticEnergy, JacobianFrobenius, HJBResidual])
def test_weights_are_checked(kind):
    assert kind(0).weight == 0
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight={weight!r} must be finite and not negative"):
            kind(weight)
    with pytest.raises(TypeError, match="weight='1' must be a number"):
        kind("1")


def test_a_potential_that_is_not_that_of_the_field_is_refused():
    class Doubled(cnf.PotentialField):
        def derivative(self, t, x, context):
            return 2 * super().derivative(t, x, context)

    for field, words in ((Doubled(2), "Doubled computes values of its own"), (Matrix(), "Matrix")):
        with pytest.raises(TypeError, match=words):
            HJBResidual(1).check_field(field)
    HJBResidual(1).check_field(cnf.PotentialField(2))


@pytest.mark.parametrize("order", [1, 0, 2.0, True])
def test_orders_are_checked(order):
    with pytest.raises(ValueError, match=rf"order={order!r} must be an integer of 2 or more"):
        TaylorDerivative(order, 1.0)


def test_names_are_told_apart():
    regularizers = [*GENERAL, HJBResidual(1)]
    names = [r.name for r in regularizers]
    assert names == [
        "kinetic_energy",
        "jacobian_frobenius",
        "taylor_derivative_2",
        "taylor_derivative_3",
        "hjb_residual",
    ]
    assert all(a != b for a, b in itertools.combinations(regularizers, 2))
    assert KineticEnergy(1) == KineticEnergy(1)
