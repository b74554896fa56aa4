"""torchdiffeq as oracle of the engine, and as a backend in its place."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from torch import nn

import cnf
from cnf.ode import METHODS, Solver, TorchDiffEq, odeint
from cnf.ode.torchdiffeq import _ADAPTIVE, _FIXED

SPANS = {"forwards": (0.1, 0.9), "backwards": (0.9, 0.1)}
BACKENDS = [*_ADAPTIVE, *_FIXED]


class Augmented(nn.Module):
    """State and log-determinant as torchdiffeq wants them; the divergence by brute force."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, state):
        attached = torch.is_grad_enabled() and state[0].requires_grad
        with torch.enable_grad():
            x = state[0] if attached else state[0].detach().requires_grad_()
            dx = self.field(t, x)
            rows = [
                torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0][:, i]
                for i in range(x.shape[1])
            ]
        return dx, sum(rows)


def random_field(dims=3):
    field = cnf.MLPField(dims, (6,), frequencies=1).double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_(std=0.7)
    return field


def loss_of(x, log_det):
    return x.sin().sum() + (2 * log_det).sin().sum()


def vector(grads):
    return torch.cat([g.reshape(-1) for g in grads])


def oracle(field, x, times, *, adjoint):
    """State and log-determinant; the last step must land, because dopri8's interpolant is poor."""
    first, last = times.detach().split(1)
    solve, options = torchdiffeq.odeint, {"options": {"step_t": last}}
    if adjoint:
        solve, options = (
            torchdiffeq.odeint_adjoint,
            {**options, "adjoint_options": {"step_t": first}},
        )
    state = (x, x.new_zeros(len(x)))
    ends = solve(Augmented(field), state, times, rtol=1e-11, atol=1e-11, method="dopri8", **options)
    return ends[0][-1], ends[1][-1]


@pytest.mark.parametrize("adjoint", [False, True], ids=["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_values_and_gradients_of_the_engine(gradient, span, adjoint):
    field, x = random_field(2), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    times = torch.tensor(span, dtype=torch.float64, requires_grad=True)
    truth = oracle(field, x, times, adjoint=adjoint)
    truth_grads = torch.autograd.grad(loss_of(*truth), [x, times, *field.parameters()])

    def f(t, x):
        dx, div = cnf.Exact()(lambda t, x, _: field(t, x), t, x, None)
        return dx, div.unsqueeze(-1)

    t0, t1 = times.unbind()
    solver = Solver("dopri8", rtol=1e-10, atol=1e-10, gradient=gradient)
    end = odeint(f, x, t0, t1, solver, parameters=field.parameters())
    found = [end.x, end.quadratures.squeeze(-1)]
    grads = torch.autograd.grad(loss_of(*found), [x, times, *field.parameters()])
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    error = float((vector(grads) - vector(truth_grads)).norm() / vector(truth_grads).norm())
    assert error < (1e-6 if adjoint else 1e-8)  # the oracle's own adjoint is the less exact one


@pytest.mark.parametrize("name", ["euler", "midpoint", "rk4", "dopri5", "bosh3", "dopri8"])
def test_the_same_method_takes_the_same_steps(name):
    """One step of a given size; torchdiffeq's rk4 is the 3/8 rule, so ours is summed by hand."""
    x0 = torch.randn(3, 2, dtype=torch.float64)

    def f(t, x):
        return (x * t).sin() + t

    own = odeint(f, x0, 0.0, 0.1, Solver(name, steps=1, first_step=0.1, rtol=1.0, atol=1.0)).x
    if name == "rk4":
        t = torch.tensor(0.0, dtype=torch.float64)
        k1 = f(t, x0)
        k2 = f(t + 0.05, x0 + 0.05 * k1)
        k3 = f(t + 0.05, x0 + 0.05 * k2)
        k4 = f(t + 0.1, x0 + 0.1 * k3)
        other = x0 + 0.1 * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    else:
        options = {"step_size": 0.1} if not METHODS[name].adaptive else {"first_step": 0.1}
        times = torch.tensor([0.0, 0.1], dtype=torch.float64)
        other = torchdiffeq.odeint(f, x0, times, method=name, rtol=1.0, atol=1.0, options=options)[
            -1
        ]
    torch.testing.assert_close(own, other, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- as a backend


def backend(name, **choices):
    tol = 1e-5 if name in {"adaptive_heun", "fehlberg2"} else 1e-8
    return TorchDiffEq(name, rtol=tol, atol=tol, steps=200, **choices)


def accuracy(name):
    return {"euler": 2e-2, "fehlberg2": 1e-3}.get(name, 1e-4)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_solves_what_has_a_closed_form(name, span, gradient):
    """x = exp(c (sin t1 - sin t0)) x0, and its gradients in x0 and c."""
    x0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    end = odeint(
        lambda t, x: (c * t.cos() * x, (c * t.cos()).expand(len(x), 1)),
        x0, *span, backend(name, gradient=gradient), parameters=[c],
    )  # fmt: skip
    total = math.sin(span[1]) - math.sin(span[0])
    growth = math.exp(1.3 * total)
    tolerance = {"rtol": accuracy(name), "atol": accuracy(name)}
    torch.testing.assert_close(end.x, growth * x0, **tolerance)
    torch.testing.assert_close(
        end.quadratures, torch.full((2, 1), 1.3 * total, dtype=torch.float64), **tolerance
    )
    (end.x.sum() + 5 * end.quadratures.sum()).backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, growth), **tolerance)
    expected = total * (growth * x0.detach().sum() + 10)
    torch.testing.assert_close(c.grad, expected, **tolerance)
    assert end.stats.status == "converged"


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_calls_the_field_inside_the_span(name, span, gradient):
    times = []

    def f(t, x):
        times.append(t.item())
        return 1e-3 * (3 * t).cos() * x  # so easy that every step wants to leave the span

    x0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    odeint(f, x0, *span, TorchDiffEq(name, gradient=gradient)).x.sum().backward()
    assert min(span) - 1e-12 <= min(times)
    assert max(times) <= max(span) + 1e-12
    growth = math.exp(1e-3 * (math.sin(3 * span[1]) - math.sin(3 * span[0])) / 3)
    torch.testing.assert_close(x0.grad, torch.full_like(x0, growth), rtol=1e-4, atol=0)


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_both_solves_of_an_adjoint_backend_land_on_their_ends(span, monkeypatch):
    seen, solve = {}, torchdiffeq.odeint_adjoint

    def spy(*args, **options):
        seen.update(options)
        return solve(*args, **options)

    monkeypatch.setattr(torchdiffeq, "odeint_adjoint", spy)
    x0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    odeint(lambda t, x: -x, x0, *span, TorchDiffEq(gradient="adjoint")).x.sum().backward()
    assert [seen[name]["step_t"].item() for name in ("adjoint_options", "options")] == list(span)


def test_a_backend_in_a_flow_is_the_engine():
    flow = cnf.CNF(random_field(), "hutchinson", Solver("dopri8", rtol=1e-9, atol=1e-9))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for solver in (flow.solver, backend("dopri5"), backend("dopri5", gradient="adjoint")):
        ends = flow.inverse_and_log_det(
            x, solver=solver, generator=torch.Generator().manual_seed(0)
        )
        grads = torch.autograd.grad(loss_of(*ends), [x, *flow.parameters()])
        results.append(torch.cat((vector(ends), vector(grads))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-6)


def test_one_hard_sample_is_as_accurate_in_a_backend_among_easy_ones():
    def f(t, x):  # rate stays, y' = rate cos(rate t) y
        rate, y = x.unbind(-1)
        return torch.stack((torch.zeros_like(rate), rate * (rate * t).cos() * y), -1)

    x = torch.tensor([[20.0, 1.0]] + [[0.0, 1.0]] * 255, dtype=torch.float64)
    flow = cnf.CNF(
        f, "exact", TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5, options={"first_step": 0.01})
    )
    among, alone = flow.forward_and_log_det(x)[1][0], flow.forward_and_log_det(x[:1])[1][0]
    assert among.item() == pytest.approx(alone.item(), abs=1e-13)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_the_gradient_of_a_backend_in_the_times(gradient):
    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.2, 0.9))
    x0 = torch.ones(1, 1, dtype=torch.float64)
    end = odeint(lambda t, x: (-(x**2), x), x0, t0, t1, backend("dopri5", gradient=gradient))
    (3 * end.x + 5 * end.quadratures).sum().backward()
    slope = -3 / 1.7**2 + 5 / 1.7
    assert t1.grad.item() == pytest.approx(slope, rel=1e-6)
    assert t0.grad.item() == pytest.approx(-slope, rel=1e-6)


def test_equal_times_in_a_backend():
    t1 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.full((2, 1), 3.0, dtype=torch.float64, requires_grad=True)
    end = odeint(lambda t, x: (-x, x**2), x0, 0.5, t1, TorchDiffEq())
    assert torch.equal(end.x, x0)
    assert torch.equal(end.quadratures, torch.zeros_like(x0))
    (end.x.sum() + end.quadratures.sum()).backward()
    assert torch.equal(x0.grad, torch.ones_like(x0))
    assert t1.grad.item() == pytest.approx(2 * (-3 + 9))


def test_an_undeclared_tensor_is_refused_by_the_adjoint_of_a_backend():
    hidden = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(3,\).*gradient='backprop'"):
        odeint(
            lambda t, x: hidden * x, torch.randn(2, 3), 0.0, 1.0, TorchDiffEq(gradient="adjoint")
        )


def test_a_backend_with_an_empty_batch():
    flow = cnf.CNF(random_field(), "exact", TorchDiffEq())
    z, log_det = flow.inverse_and_log_det(torch.zeros(0, 3, dtype=torch.float64))
    assert (z.shape, log_det.shape) == ((0, 3), (0,))


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_a_backend_counts_its_evaluations(name, gradient):
    calls = []

    def f(t, x):
        calls.append(t)
        return -x

    x0 = torch.ones(2, 1, requires_grad=True)
    with cnf.record_solves() as solves:
        end = odeint(f, x0, 0.0, 1.0, TorchDiffEq(name, gradient=gradient))
    assert [s.kind for s in solves] == ["forward"]
    assert end.stats.nfe == len(calls)
    end.x.sum().backward()
    assert end.stats is solves[0]
    kinds = [(s.kind, s.t0, s.t1, s.status) for s in solves]
    assert kinds[1:] == ([("backward", 1.0, 0.0, "converged")] if gradient == "adjoint" else [])
    assert sum(s.nfe for s in solves) == len(calls)
