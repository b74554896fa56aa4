"""What a solve computes once: the same values and gradients as at every evaluation anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnf
from cnf import Exact, Hutchinson, Solver

FIELDS = {
    "mlp": lambda: cnf.MLPField(3, (8, 7), context=2, gates=True),
    "mlp, one layer": lambda: cnf.MLPField(3, (8,), context=2),
    "squash": lambda: cnf.ConcatSquashField(3, (8, 7), context=2, gated_output=False),
    "sum": lambda: cnf.SumField(cnf.LinearField(3), cnf.MLPField(3, (8, 7), context=2)),
}
DIVERGENCES = {"exact": Exact(), "hutchinson": Hutchinson(probes=2)}


class Hidden(nn.Module):
    """A field without its closed forms."""

    def __init__(self, field):
        super().__init__()
        self.field = field
        self.event_shape = field.event_shape

    def forward(self, t, x, context=None):
        return self.field(t, x, context)


def randomised(field):
    field = field.double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_(0, 0.5)
    return field


def outcome(field, divergence, solver, times=(0.0, 1.0)):
    """log-determinants, and their gradient in x, context and parameters."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    context = torch.randn(5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    flow = cnf.CNF(field, divergence, solver, times=times)
    _, log_det = flow.inverse_and_log_det(x, context, generator=generator)
    inputs = [x, context, *field.parameters()]
    grads = torch.autograd.grad(log_det.exp().sum(), inputs)
    return log_det, torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("batch", ["shared", "independent"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", FIELDS)
def test_every_gradient_is_that_of_products(name, gradient, batch, divergence):
    field = randomised(FIELDS[name]())
    solver = Solver(gradient=gradient, batch=batch, rtol=1e-8, atol=1e-8)
    log_det, grads = outcome(field, divergence, solver)
    truth, truth_grads = outcome(Hidden(field), divergence, Solver(rtol=1e-8, atol=1e-8))
    assert truth.abs().max() > 0.05
    torch.testing.assert_close(log_det, truth, rtol=1e-6, atol=1e-6)
    assert (grads - truth_grads).norm() < 1e-5 * truth_grads.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_torchdiffeq_counts_no_gradient_twice(divergence):
    field = randomised(FIELDS["mlp"]())
    solver = cnf.TorchDiffEq(gradient="adjoint", rtol=1e-8, atol=1e-8)
    _, grads = outcome(field, divergence, solver)
    _, truth = outcome(Hidden(field), divergence, Solver(rtol=1e-8, atol=1e-8))
    assert (grads - truth).norm() < 1e-5 * truth.norm()


def test_constants_are_computed_once_a_solve():
    class Counting(cnf.MLPField):
        counted = 0

        def divergence_constants(self):
            self.counted += 1
            return super().divergence_constants()

    field = Counting(3, (8, 7))
    for gradient in ("backprop", "checkpoint", "adjoint"):
        field.counted = 0
        flow = cnf.CNF(field, "exact", Solver("rk4", steps=3, gradient=gradient))
        flow.inverse_and_log_det(torch.randn(4, 3))[1].sum().backward()
        assert field.counted == 1


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_other_parameters_for_a_call(gradient):
    """By functional_call: backward uses them too, after they have left the module."""
    field = randomised(cnf.MLPField(3, (8, 7)))
    flow = cnf.CNF(field, "exact", Solver("rk4", steps=10, gradient=gradient))
    x = torch.randn(5, 3, dtype=torch.float64)
    density = cnf.Flow(cnf.StandardNormal(3), flow)  # whose forward is log_prob
    named = {name: (p.detach() + 0.1).requires_grad_() for name, p in density.named_parameters()}
    loss = torch.func.functional_call(density, named, (x,)).sum()
    found = torch.autograd.grad(loss, list(named.values()))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1)
    truth = torch.autograd.grad(density.log_prob(x).sum(), list(flow.parameters()))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


class OwnField(nn.Module):
    """A user's linear field, with a closed form and what it needs once a solve."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.factor = factor

    def forward(self, t, x):
        return x @ self.a.T

    def divergence_constants(self):
        return (self.factor * self.a.trace(),)

    def with_divergence(self, t, x, context, constants):
        return self(t, x), constants[0].expand(len(x))


def test_a_users_closed_form():
    field = OwnField()
    log_det = cnf.CNF(field, "exact").inverse_and_log_det(torch.randn(4, 3).double())[1]
    torch.testing.assert_close(log_det, -field.a.trace().expand(4), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(log_det.sum(), field.a)
    torch.testing.assert_close(grad, -4 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_audit_compares_it_with_differences(factor):
    flow = cnf.Flow(cnf.StandardNormal(3), cnf.CNF(OwnField(factor), "exact")).double()
    audit = cnf.check(flow, torch.randn(8, 3).double(), gradients=[], verbose=False)
    row = next(row for row in audit.rows if row.name == "divergence")
    assert row.ok == (factor == 1.0)


@pytest.mark.filterwarnings("ignore", "error:compile=True")
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_compiled(divergence):
    field = randomised(cnf.MLPField(3, (8, 7), context=2))
    log_det, grads = outcome(field, divergence, Solver("euler", steps=2, compile=True))
    truth, truth_grads = outcome(field, divergence, Solver("euler", steps=2))
    torch.testing.assert_close(log_det, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, truth_grads, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore", "error:compile=True")
def test_a_compiled_standard_error():
    """One field compiled both with and without the estimate of each probe."""
    flow = cnf.FFJORD(3, (8, 8), divergence=Hutchinson(probes=3)).double()
    x = torch.randn(6, 3, dtype=torch.float64)

    def found(compiled, **choices):
        solver = Solver("euler", steps=1, compile=compiled)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return flow.log_prob(x, solver=solver, generator=generator, **choices)

    torch.testing.assert_close(found(True), found(False))
    torch.testing.assert_close(found(True, return_stderr=True), found(False, return_stderr=True))


def test_many_products_are_announced():
    field = Hidden(cnf.MLPField(300, (4,)))
    flow = cnf.Flow(cnf.StandardNormal(300), cnf.CNF(field, "exact", Solver("euler", steps=1)))
    with pytest.warns(RuntimeWarning, match="takes 300 products.*Hutchinson"):
        flow.log_prob(torch.randn(1, 300))
    cnf.FFJORD(300, (4,), divergence="exact").log_prob(torch.randn(1, 300))  # none


class OtherValues(OwnField):
    def with_divergence(self, t, x, context, constants):
        dx, div = super().with_divergence(t, x, context, constants)
        return 1.5 * dx, div


def test_the_audit_compares_its_values_with_the_field():
    flow = cnf.Flow(cnf.StandardNormal(3), cnf.CNF(OtherValues(), "exact")).double()
    audit = cnf.check(flow, torch.randn(8, 3).double(), gradients=[], verbose=False)
    row = next(row for row in audit.rows if row.name == "divergence")
    assert not row.ok
    assert "another dx" in row.verdict


class Misshapen(OwnField):
    def with_divergence(self, t, x, context, constants):
        return self(t, x), constants[0].expand(len(x), 1)


def test_a_divergence_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"div of shape \(B,\) = \(4,\), got div of \(4, 1\)"):
        cnf.CNF(Misshapen(), "exact").inverse_and_log_det(torch.randn(4, 3).double())


def test_a_number_is_no_noise():
    with pytest.raises(TypeError, match=r"use Hutchinson\(probes=16\)"):
        Hutchinson(16)
