"""Gradients of a solve: against finite differences, each other, and a tighter solve."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnf
from cnf.ode import METHODS, Solver, odeint
from cnf.ode.gradient import first_derivative
from cnf.ode.rhs import RightHandSide
from cnf.ode.solve import integrate, tolerance_of
from cnf.ode.stats import SolveStats
from cnf.ode.step import Clock, combine, runge_kutta_step
from cnf.ode.stepper import EagerStepper

GRADIENTS = ["backprop", "checkpoint", "adjoint"]
RECOMPUTING = ["checkpoint", "adjoint"]
FIXED = ["euler", "midpoint", "heun", "rk4"]
DIVERGENCES = {"exact": cnf.Exact(), "hutchinson": cnf.Hutchinson("gaussian", probes=2)}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomised(module):
    """Every parameter random, in float64, so that no gradient is zero by chance."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.6)
    return module


def flow_of(divergence="exact", context=2, **choices):
    """A small conditional flow; its solver from `choices`."""
    field = randomised(cnf.ConcatSquashField(3, (5,), context=context))
    return cnf.CNF(field, divergence, Solver(**choices), times=(0.1, 0.9))


def loss_of(z, log_det):
    """A loss that weighs every sample and dimension differently."""
    weight = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).reshape(z.shape)
    return (weight * z.sin()).sum() + (weight[:, 0] * log_det.exp()).sum()


def gradients(flow, x, context=None, seed=0, loss=loss_of):
    """The gradients in x, context and parameters, in one vector."""
    wanted = [v for v in (x, context) if v is not None] + list(flow.parameters())
    ends = flow.inverse_and_log_det(x, context, generator=torch.Generator().manual_seed(seed))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*ends), wanted)])


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


# ---------------------------------------------------------------- finite differences


class Problem:
    """x' = tanh(W x + V c + u t) * x and its divergence, as a function of tensors alone."""

    def __init__(self, divergence, solver):
        self.divergence, self.solver = divergence, solver
        self.noise = divergence.sample_noise(normal(2, 3))

    def inputs(self):
        shapes = [(2, 3), (2, 2), (3, 3), (3, 2), (3,)]
        return [normal(*shape).requires_grad_() for shape in shapes] + [
            torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.2, 0.9)
        ]

    def __call__(self, x, c, w, v, u, t0, t1):
        def field(t, x, c):
            return (x @ w.T + c @ v.T + u * t).tanh() * x

        def f(t, x):
            dx, div = self.divergence(field, t, x, c, self.noise)
            return dx, torch.stack((div, dx.square().sum(-1)), -1)

        end = odeint(f, x, t0, t1, self.solver, parameters=[c, w, v, u])
        return end.x, end.quadratures


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("name", FIXED)
def test_gradcheck_in_state_context_parameters_and_times(name, divergence, gradient):
    problem = Problem(divergence, Solver(name, steps=3, gradient=gradient))
    assert gradcheck(problem, problem.inputs(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradcheck_backwards_in_time(gradient):
    problem = Problem(cnf.Exact(), Solver("rk4", steps=3, gradient=gradient))
    *rest, t0, t1 = problem.inputs()
    assert gradcheck(problem, [*rest, t1, t0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_gradgradcheck_of_backprop(divergence):
    problem = Problem(divergence, Solver("midpoint", steps=2))
    assert gradgradcheck(problem, problem.inputs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "dopri8"])
def test_the_gradient_of_an_adaptive_solve_is_that_of_its_steps(name):
    """The step sequence is no part of the graph: the same steps, frozen, have the same gradient."""
    solver, taken = Solver(name, rtol=1e-3, atol=1e-3), []
    own, x0 = normal(3, 3).requires_grad_(), normal(2, 3).requires_grad_()

    def f(t, x, w=own):
        dx = (3 * x @ w.T).tanh() * (4 * t).cos()
        return dx, dx.square().sum(-1, keepdim=True)

    class Recording(EagerStepper):
        def __call__(self, clock, t, t_next, x, q, first):
            taken.append((t, t_next))
            return super().__call__(clock, t, t_next, x, q, first)

    method, tolerance = METHODS[name].coefficients, tolerance_of(solver, x0, 1, None)
    rhs = RightHandSide(f, 1, SolveStats("forward", name, 0.0, 1.0))
    integrate(Recording(rhs, method, tolerance), x0, Clock(0.0, 1.0), solver, tolerance)
    later = [t for t, _ in taken[1:]] + [1.0]
    accepted = [step for step, t in zip(taken, later, strict=True) if step[1] == t]
    assert len(accepted) >= 3

    def frozen(x, w):
        q = 0.0
        for t, t_next in accepted:
            g = partial(f, w=w)
            stages = runge_kutta_step(g, method, Clock(0.0, 1.0), t, t_next, x, None)
            x, q = stages.x, q + combine(method.b, stages.rates, stages.h)
        return x.sin().sum() + q.exp().sum()

    assert gradcheck(frozen, (x0, own), rtol=1e-6, atol=1e-8)
    truth = torch.autograd.grad(frozen(x0, own), (x0, own))
    for gradient in ("backprop", "checkpoint"):
        end = odeint(
            f, x0, 0.0, 1.0, dataclasses.replace(solver, gradient=gradient), parameters=[own]
        )
        found = torch.autograd.grad(end.x.sin().sum() + end.quadratures.exp().sum(), (x0, own))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- the three against each other


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("name", METHODS)
def test_checkpoint_is_backprop(name, divergence):
    flow = flow_of(divergence, method=name, steps=4, rtol=1e-4, atol=1e-4)
    x, context = normal(4, 3).requires_grad_(), normal(4, 2).requires_grad_()
    truth = gradients(flow, x, context)
    kept = flow.inverse_and_log_det(x, context, generator=torch.Generator().manual_seed(0))
    flow.solver = dataclasses.replace(flow.solver, gradient="checkpoint")
    replayed = flow.inverse_and_log_det(x, context, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(kept, replayed, strict=True))
    assert relative(gradients(flow, x, context), truth) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("name", ["dopri5", "tsit5", "dopri8"])
def test_the_adjoint_is_as_good_as_its_tolerance(name, divergence):
    flow = flow_of(divergence)
    x, context = normal(4, 3).requires_grad_(), normal(4, 2).requires_grad_()
    flow.solver = Solver("dopri8", rtol=1e-12, atol=1e-12)
    truth = gradients(flow, x, context)
    found = []
    for tol in (1e-4, 1e-6, 1e-8):
        flow.solver = Solver(name, rtol=tol, atol=tol, gradient="adjoint")
        found.append(relative(gradients(flow, x, context), truth))
        assert found[-1] <= 10 * tol
    assert found[0] > found[2]
    if name != "dopri8":  # its first steps are already better than asked
        assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_adjoint_is_relative_to_the_size_of_the_loss(scale):
    flow = flow_of(rtol=1e-6, atol=1e-6, gradient="adjoint")
    x, context = normal(4, 3).requires_grad_(), normal(4, 2).requires_grad_()
    once = gradients(flow, x, context)
    scaled = gradients(flow, x, context, loss=lambda z, d: scale * loss_of(z, d))
    assert relative(scaled / scale, once) < 1e-9


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_the_gradient_in_the_times(reverse, gradient):
    """x' = -x^2 and q' = x, by hand: x = 1 / (1 + s), q = log(1 + s), with s = t1 - t0."""
    t0, t1 = (0.9, 0.2) if reverse else (0.2, 0.9)
    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (t0, t1))
    solver = Solver("dopri8", rtol=1e-10, atol=1e-10, gradient=gradient)
    end = odeint(lambda t, x: (-(x**2), x), float64([1.0], [1.0]), t0, t1, solver)
    (3 * end.x[0] + 5 * end.quadratures[1]).sum().backward()
    s = (t1 - t0).detach()
    slope = (-3 / (1 + s) ** 2 + 5 / (1 + s)).item()
    assert t1.grad.item() == pytest.approx(slope, rel=1e-8)
    assert t0.grad.item() == pytest.approx(-slope, rel=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_in_the_times_where_the_field_depends_on_time(gradient):
    """x' = 2 t x: x = exp(t1^2 - t0^2), so dx/dt0 = -2 t0 x and dx/dt1 = 2 t1 x."""
    t0, t1 = (torch.tensor(t, dtype=torch.float32, requires_grad=True) for t in (0.25, 1.0))
    solver = Solver("dopri8", rtol=1e-10, atol=1e-10, gradient=gradient)
    x = odeint(lambda t, x: 2 * t * x, float64([1.0]), t0, t1, solver).x
    x.sum().backward()
    assert t0.grad.item() == pytest.approx(-2 * 0.25 * x.item(), rel=1e-6)
    assert t1.grad.item() == pytest.approx(2 * x.item(), rel=1e-6)
    assert t0.grad.dtype == t1.grad.dtype == torch.float32


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_equal_times_have_the_derivative_of_the_field(gradient):
    t0, t1 = (torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x0 = float64([2.0], [3.0]).requires_grad_()
    end = odeint(lambda t, x: (-x * t, x), x0, t0, t1, Solver("dopri5", gradient=gradient))
    (end.x.sum() + 10 * end.quadratures.sum()).backward()
    assert torch.equal(x0.grad, torch.ones_like(x0))
    assert t1.grad.item() == pytest.approx(-0.5 * 5 + 10 * 5)
    assert t0.grad.item() == pytest.approx(0.5 * 5 - 10 * 5)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_a_loss_of_the_log_determinant_alone(divergence, gradient):
    """Its gradient is all in the a_q df term, which finite differences see too."""
    flow = flow_of(divergence, method="dopri8", rtol=1e-9, atol=1e-9, gradient=gradient)
    x, context = normal(4, 3), normal(4, 2)
    p = flow.field.layers[0].linear.weight

    def loss():
        return flow.inverse_and_log_det(x, context, generator=torch.Generator().manual_seed(1))[
            1
        ].sum()

    (found,) = torch.autograd.grad(loss(), p)
    direction, eps = normal(*p.shape), 1e-5
    with torch.no_grad():
        p += eps * direction
        above = loss()
        p -= 2 * eps * direction
        below = loss()
    assert (found * direction).sum().item() == pytest.approx(
        ((above - below) / (2 * eps)).item(), rel=1e-5
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_of_one_output_alone(gradient):
    """x = exp(-t) x0 and q = (1 - exp(-t)) x0, and a parameter that is multiplied by zero."""
    x0, unused = float64(1.0).requires_grad_(), float64(1.0).requires_grad_()
    solver = Solver(rtol=1e-8, atol=1e-8, gradient=gradient)

    def f(t, x):
        return -x + 0 * unused, x.unsqueeze(-1)

    end = odeint(f, x0, 0.0, 1.0, solver, parameters=[unused])
    of_x = torch.autograd.grad(end.x.sum(), [x0, unused], retain_graph=True)
    of_q = torch.autograd.grad(end.quadratures.sum(), [x0, unused])
    decay = math.exp(-1)
    torch.testing.assert_close(torch.cat(of_x), float64(decay, 0), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(of_q), float64(1 - decay, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_declared_parameter_without_use_gets_zero_or_none(gradient):
    x0, unused = float64(1.0).requires_grad_(), float64(1.0).requires_grad_()
    end = odeint(lambda t, x: -x, x0, 0.0, 1.0, Solver(gradient=gradient), parameters=[unused])
    (found,) = torch.autograd.grad(end.x.sum(), [unused], allow_unused=True)
    assert found is None if gradient == "backprop" else found.item() == 0


# ---------------------------------------------------------------- who requires grad


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("of_x", "of_parameters"),
    list(itertools.product([True, False], repeat=2)),
    ids=lambda v: "grad" if v else "frozen",
)
def test_gradients_by_request(of_x, of_parameters, gradient):
    flow = flow_of(context=0, method="rk4", steps=20)
    x = normal(4, 3).requires_grad_()
    truth = torch.autograd.grad(loss_of(*flow.inverse_and_log_det(x)), [x, *flow.parameters()])
    flow.solver = dataclasses.replace(flow.solver, gradient=gradient)
    x.requires_grad_(of_x)
    flow.requires_grad_(of_parameters)
    z, log_det = flow.inverse_and_log_det(x)
    assert z.requires_grad == log_det.requires_grad == (of_x or of_parameters)
    if z.requires_grad:
        loss_of(z, log_det).backward()
    for v, g in zip([x, *flow.parameters()], truth, strict=True):
        if v.requires_grad:
            torch.testing.assert_close(v.grad, g, rtol=1e-5, atol=1e-6)
        else:
            assert v.grad is None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_frozen_parameter_among_others(gradient):
    flow = flow_of(context=0, method="rk4", steps=20)
    x = normal(4, 3)
    truth = torch.autograd.grad(loss_of(*flow.inverse_and_log_det(x)), list(flow.parameters()))
    flow.solver = dataclasses.replace(flow.solver, gradient=gradient)
    flow.field.layers[0].linear.weight.requires_grad_(False)
    loss_of(*flow.inverse_and_log_det(x)).backward()
    assert flow.field.layers[0].linear.weight.grad is None
    for p, g in zip(flow.parameters(), truth, strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_context_that_is_computed_and_a_weight_that_is_tied(gradient):
    embed = randomised(nn.Linear(2, 2))
    flow = flow_of(method="rk4", steps=20)
    flow.field.layers[1].shift.weight = flow.field.layers[1].gate.weight
    x, raw = normal(4, 3), normal(4, 2)
    wanted = [*embed.parameters(), *flow.parameters()]
    truth = torch.autograd.grad(loss_of(*flow.inverse_and_log_det(x, embed(raw))), wanted)
    flow.solver = dataclasses.replace(flow.solver, gradient=gradient)
    found = torch.autograd.grad(loss_of(*flow.inverse_and_log_det(x, embed(raw))), wanted)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_an_undeclared_tensor_is_refused(gradient):
    hidden = normal(3).requires_grad_()
    solver = Solver(gradient=gradient)
    for leaf in (hidden, hidden.exp()):
        with pytest.raises(ValueError, match=r"shape \(3,\).*parameters=.*gradient='backprop'"):
            odeint(lambda t, x, leaf=leaf: leaf * x, normal(2, 3), 0.0, 1.0, solver)
    with pytest.raises(ValueError, match=r"shape \(3,\).*gradient='backprop'"):
        cnf.CNF(lambda t, x: hidden * x, "exact", solver).inverse_and_log_det(normal(2, 3))
    with torch.no_grad():  # nothing can be lost
        odeint(lambda t, x: hidden * x, normal(2, 3), 0.0, 1.0, solver)


def test_backprop_reaches_an_undeclared_tensor():
    hidden = normal(3).requires_grad_()
    odeint(lambda t, x: hidden * x, torch.ones(1, 3).double(), 0.0, 1.0).x.sum().backward()
    torch.testing.assert_close(hidden.grad, hidden.detach().exp(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_a_context_made_of_the_fields_own_parameter(gradient):
    """Its gradient comes both through the context and through the field, once each."""
    flow, x = flow_of(method="rk4"), normal(4, 3)
    grads = []
    for mode in ("backprop", gradient):
        context = flow.field.layers[0].gate.bias[:2].expand(4, 2)
        solver = Solver("rk4", steps=100, gradient=mode)
        loss = loss_of(*flow.inverse_and_log_det(x, context, solver=solver))
        grads.append(torch.autograd.grad(loss, list(flow.parameters())))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-8)


def test_the_first_derivative_is_detached():
    w = normal(3).requires_grad_()
    f = RightHandSide(lambda t, x: (w * x, x), 1, SolveStats("forward", "rk4", 0.0, 1.0))
    dx, dq = first_derivative(f, Clock(0.0, 1.0), normal(2, 3), [w])
    assert not dx.requires_grad
    assert not dq.requires_grad


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_second_derivatives_are_refused(gradient):
    flow = flow_of(context=0, gradient=gradient)
    x = normal(4, 3).requires_grad_()
    z, log_det = flow.inverse_and_log_det(x)
    with pytest.raises(RuntimeError, match=f"{gradient}.*gradient='backprop'"):
        torch.autograd.grad(loss_of(z, log_det), x, create_graph=True)


# ---------------------------------------------------------------- between forward and backward


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_interleaved_solves_of_different_batch_sizes(divergence, gradient):
    flow = flow_of(divergence, method="rk4", steps=5, gradient=gradient)
    batches = [(normal(n, 3).requires_grad_(), normal(n, 2).requires_grad_()) for n in (4, 5, 1)]
    alone = [gradients(flow, *batch, seed=i) for i, batch in enumerate(batches)]
    losses = [
        loss_of(*flow.inverse_and_log_det(*batch, generator=torch.Generator().manual_seed(i)))
        for i, batch in enumerate(batches)
    ]
    for i in (1, 0, 2):
        found = torch.autograd.grad(losses[i], [*batches[i], *flow.parameters()])
        assert torch.equal(torch.cat([g.reshape(-1) for g in found]), alone[i])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_random_numbers_between_forward_and_backward_change_nothing(noise, gradient):
    flow = flow_of(cnf.Hutchinson(noise), context=0, gradient=gradient)
    x = normal(4, 3).requires_grad_()
    found = []
    for disturb in (False, True):
        torch.manual_seed(7)
        loss = loss_of(*flow.inverse_and_log_det(x))
        if disturb:
            torch.randn(1000)
            torch.manual_seed(99)
        found.append(torch.autograd.grad(loss, [x, *flow.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_draws_no_random_numbers(gradient):
    flow = flow_of("hutchinson", context=0, gradient=gradient)
    loss = loss_of(*flow.inverse_and_log_det(normal(4, 3)))
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_second_backward_pass_gives_the_same(gradient):
    flow = flow_of(context=0, gradient=gradient)
    x = normal(4, 3).requires_grad_()
    loss = loss_of(*flow.inverse_and_log_det(x))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_a_parameter_changed_before_backward_is_noticed(gradient):
    flow = flow_of(context=0, gradient=gradient)
    loss = loss_of(*flow.inverse_and_log_det(normal(4, 3)))
    with torch.no_grad():
        flow.field.layers[0].linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- memory


class Kept:
    """What a graph keeps of one tensor, for as long as the graph lives."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_numbers(steps, gradient):
    """How many numbers the graph of a solve keeps, parameters aside."""
    torch.manual_seed(0)
    flow = flow_of(context=0, method="rk4", steps=steps, gradient=gradient)
    owned = {p.data_ptr() for p in flow.parameters()}
    alive = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor.detach())  # autograd ties it to its graph again
        alive.add(kept)
        return kept

    x = normal(8, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        ends = flow.inverse_and_log_det(x)
    assert ends[0].requires_grad
    sizes = {kept.tensor.data_ptr(): kept.tensor.numel() for kept in alive}
    return sum(n for pointer, n in sizes.items() if pointer not in owned)


def test_memory_of_the_three():
    size = 8 * 3
    assert kept_numbers(40, "checkpoint") <= 42 * size  # a state a step
    assert kept_numbers(40, "backprop") > 20 * kept_numbers(40, "checkpoint")
    assert kept_numbers(40, "adjoint") == kept_numbers(10, "adjoint") <= 3 * size


# ---------------------------------------------------------------- the adjoint's own trajectory


def test_an_adjoint_that_lost_its_trajectory_is_warned_about():
    """x' = -12 x is stable forwards and not backwards."""
    x0 = float64([1.0]).requires_grad_()
    end = odeint(
        lambda t, x: -12 * x, x0, 0.0, 1.0, Solver(rtol=1e-4, atol=1e-4, gradient="adjoint")
    )
    with pytest.warns(RuntimeWarning, match=r"missed the start.*gradient='backprop'"):
        end.x.sum().backward()


def test_parameters_stay_out_of_the_error_norm_of_the_adjoint():
    """At p = 0 the parameter's own integrand alone is hard, and it must not cost a step."""
    nfe = {}
    for wanted in (False, True):
        p, x0 = float64(0.0).requires_grad_(wanted), float64([1.0]).requires_grad_()
        with cnf.record_solves() as solves:
            end = odeint(
                lambda t, x, p=p: -x + p * (200 * t).cos() * x,
                *(x0, 0.0, 1.0, Solver(gradient="adjoint")),
                parameters=[p],
            )
            end.x.sum().backward()
        nfe[wanted] = [s.nfe for s in solves]
    assert nfe[True] == nfe[False]
    assert len(nfe[True]) == 2


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_parameters_swapped_for_one_call_get_their_gradient(gradient):
    """functional_call takes the swapped parameters out again before backward runs."""
    solver = Solver("rk4", steps=10, gradient=gradient)
    flow = cnf.FFJORD(2, (8,), divergence="exact", solver=solver).double()
    x = torch.randn(5, 2, dtype=torch.float64)

    def gradients(choice):
        new = {n: (1.5 * p.detach()).requires_grad_() for n, p in flow.named_parameters()}
        loss = torch.func.functional_call(flow, new, (x,), {"solver": choice}).sum()
        return torch.autograd.grad(loss, list(new.values()))

    truth = gradients(dataclasses.replace(solver, gradient="backprop"))
    assert all(g.norm() > 0 for g in truth)
    for got, true in zip(gradients(solver), truth, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_context_overwritten_before_backward_does_not_change_the_gradient(gradient):
    solver = Solver("rk4", steps=5, gradient=gradient)
    flow = cnf.FFJORD(2, (8,), context=1, divergence="exact", solver=solver)
    x, context = torch.randn(5, 2), torch.randn(5, 1)

    def gradients(*, overwrite):
        mine = context.clone()
        loss = flow.log_prob(x, mine).sum()
        if overwrite:
            mine.fill_(5.0)
        return torch.autograd.grad(loss, list(flow.parameters()))

    for got, true in zip(gradients(overwrite=True), gradients(overwrite=False), strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_a_backward_pass_computes_at_the_precision_of_forward(gradient):
    seen = []

    class Watched(cnf.MLPField):
        def forward(self, t, x, context=None):
            dx = super().forward(t, x, context)
            seen.append(dx.dtype)
            return dx

    flow = cnf.CNF(Watched(2, (8,)), "exact", Solver("rk4", steps=2, gradient=gradient))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flow.inverse_and_log_det(torch.randn(5, 2))[1].sum()
    forward = len(seen)
    loss.backward()
    assert len(seen) > forward
    assert set(seen) == {torch.bfloat16}
