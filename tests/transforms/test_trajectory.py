"""The path of a flow, its score, and end times that are learned."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnf
from cnf.ode import METHODS, Solver

TIGHT = Solver("dopri8", rtol=1e-11, atol=1e-11)


class Rate(nn.Module):
    """x' = (a + b cos 3t) x with two rates: solved in closed form."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([-0.5, 0.9], dtype=torch.float64))

    def forward(self, t, x):
        return (self.a + self.b * (3 * t).cos()) * x

    def integral(self, t0, t1):
        """int_t0^t1 (a + b cos 3t) dt."""
        t0, t1 = (torch.as_tensor(t, dtype=torch.float64) for t in (t0, t1))
        return self.a * (t1 - t0) + self.b * ((3 * t1).sin() - (3 * t0).sin()) / 3


def curved(**choices):
    """A nonlinear field in float64, its parameters random."""
    field = cnf.MLPField(2, (8,), **choices).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.7)
    return field


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, -0.5), (2.0, 3.5)], ids=str)
@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=200)], ids=["dopri8", "rk4"])
def test_the_path_is_that_of_the_closed_form(span, solver):
    field, z = Rate(), torch.randn(3, 4, 2, dtype=torch.float64)
    times = torch.linspace(*span, 7, dtype=torch.float64)
    path = cnf.CNF(field, "exact", solver, times=span).trajectory(z, times)
    assert path.shape == (7, 3, 4, 2)
    for t, x in zip(times, path, strict=True):
        torch.testing.assert_close(x, z * field.integral(span[0], t).exp(), rtol=1e-9, atol=1e-9)
    assert torch.equal(path[0], z)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].adaptive])
def test_every_state_of_a_path_of_fixed_steps_has_the_order_of_the_method(name):
    field, z = Rate(), torch.tensor([[1.0, -2.0]], dtype=torch.float64)

    def errors(steps, times):
        path = cnf.CNF(field, "exact", Solver(name, steps=steps)).trajectory(z, times)
        truth = torch.stack([z * field.integral(0.0, t).exp() for t in times])
        return (path - truth).abs().flatten(1).amax(-1)

    on_grid = [0.25, 0.5, 0.75]
    slopes = (errors(16, on_grid) / errors(32, on_grid)).log2()
    assert ((slopes - METHODS[name].order).abs() < 0.3).all(), slopes
    off_grid = [0.26, 0.51, 0.77]  # their steps are shorter, so their errors are no larger
    assert (errors(16, off_grid) < 1.2 * errors(16, on_grid).max()).all()


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].adaptive])
@pytest.mark.parametrize("tol", [1e-4, 1e-7, 1e-10])
def test_every_state_of_an_adaptive_path_is_as_accurate_as_its_tolerance(name, tol):
    field, z = Rate(), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    times = [0.05, 0.31, 0.57, 0.83, 1.0]
    solver = Solver(name, rtol=tol, atol=tol, max_steps=10_000)
    path = cnf.CNF(field, "exact", solver).trajectory(z, times)
    truth = torch.stack([z * field.integral(0.0, t).exp() for t in times])
    assert (path - truth).abs().max() < 10 * tol


def test_the_ends_of_the_path_are_those_of_the_transform():
    transform = cnf.CNF(curved(), "exact", TIGHT)
    z = torch.randn(5, 2, dtype=torch.float64)
    path = transform.trajectory(z, [0.0, 0.25, 1.0])
    torch.testing.assert_close(path[-1], transform.forward(z), rtol=1e-9, atol=1e-9)
    middle = cnf.CNF(transform.field, "exact", TIGHT, times=(0.0, 0.25)).forward(z)
    torch.testing.assert_close(path[1], middle, rtol=1e-9, atol=1e-9)


def test_many_times_do_not_shrink_the_steps_between_them():
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(curved(), "exact"))
    z = torch.randn(5, 2, dtype=torch.float64)
    with cnf.record_solves() as solves:
        flow.trajectory(z, [0.001, 0.002, 0.003, 1.0])
    with cnf.record_solves() as direct:
        flow.trajectory(z, [1.0])
    assert solves[-1].nfe <= direct[0].nfe + 20


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_path_is_differentiable(gradient):
    solver = Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient)
    transform = cnf.CNF(curved(context=3), "exact", solver)
    z, c = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def path(z, c):
        return transform.trajectory(z, [0.3, 0.9], c)

    assert gradcheck(path, (z.requires_grad_(), c.requires_grad_()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0.0, math.nan], ("times[1] is nan", "finite")),
        ([0.5, 0.2], ("times[1]=0.2", "times[0]=0.5", "sort")),
        ([0.5, 0.5], ("times[1]=0.5", "repetitions")),
        ([0.5, 1.2], ("times[1]=1.2", "between 0 and 1")),
        ([-0.1], ("times[0]=-0.1", "between 0 and 1")),
        ([[0.5]], ("times", "(1, 1)", "(T,)")),
    ],
    ids=str,
)
def test_times_that_are_no_path_are_refused(times, words):
    flow = cnf.FFJORD(2)
    with pytest.raises(ValueError) as raised:
        flow.trajectory(torch.randn(3, 2), times)
    for word in words:
        assert word in str(raised.value)


def test_times_are_a_list_a_tensor_or_integers_and_may_be_none_at_all():
    flow, z = cnf.FFJORD(2), torch.randn(3, 2)
    assert torch.equal(flow.trajectory(z, [0, 1]), flow.trajectory(z, torch.tensor([0.0, 1.0])))
    assert flow.trajectory(z, []).shape == (0, 3, 2)


def test_one_time_is_no_sequence_of_times():
    with pytest.raises(TypeError, match=r"times must be a sequence.*float"):
        cnf.FFJORD(2).trajectory(torch.randn(3, 2), 0.5)


def test_a_flow_of_several_blocks_has_no_path():
    with pytest.raises(TypeError, match=r"Compose.*where flow\.transform holds CNFs"):
        cnf.FFJORD(2, blocks=2).trajectory(torch.randn(3, 2), [0.5])


# ---------------------------------------------------------------- the score


def test_the_score_of_a_linear_flow_is_that_of_its_normal_density():
    a = 0.6 * torch.randn(3, 3, dtype=torch.float64)
    flow = cnf.Flow(cnf.StandardNormal(3).double(), cnf.CNF(lambda t, x: x @ a.T, "exact", TIGHT))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    forward = torch.linalg.matrix_exp(a)
    precision = torch.linalg.inv(forward @ forward.T)
    torch.testing.assert_close(flow.score(x), -x @ precision, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_score_is_the_difference_quotient_of_the_log_density(divergence, gradient):
    solver = Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient)
    flow = cnf.Flow(cnf.StandardNormal(2).double(), cnf.CNF(curved(context=1), divergence, solver))
    x, c = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)

    def log_prob(x):
        return flow.log_prob(x, c, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        score = flow.score(x, c, generator=torch.Generator().manual_seed(3))
        h = 1e-5
        for i in range(2):
            step = h * torch.eye(2, dtype=torch.float64)[i]
            quotient = (log_prob(x + step) - log_prob(x - step)) / (2 * h)
            torch.testing.assert_close(score[:, i], quotient, rtol=1e-5, atol=1e-6)
    assert not score.requires_grad


def test_a_score_leaves_the_gradients_and_the_input_alone():
    flow, x = cnf.FFJORD(2, hidden=(8,)), torch.randn(3, 2)
    before = x.clone()
    with torch.inference_mode():
        flow.score(x)
    flow.score(x.requires_grad_())
    assert x.grad is None
    assert all(p.grad is None for p in flow.parameters())
    assert torch.equal(before, x)


def test_the_score_has_derivatives_of_its_own():
    flow = cnf.Flow(
        cnf.StandardNormal(2).double(), cnf.CNF(curved(), "exact", Solver("rk4", steps=3))
    )
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: flow.score(x, create_graph=True), (x,))
    assert gradgradcheck(flow.log_prob, (x,))
    loss = flow.score(x.detach(), create_graph=True).square().mean()
    loss.backward()  # as in score matching
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_a_score_without_second_derivatives_names_the_mode_that_has_them(gradient):
    flow = cnf.FFJORD(2, hidden=(8,), solver=Solver("rk4", steps=2, gradient=gradient))
    with pytest.raises(RuntimeError, match=f"{gradient}.*gradient='backprop'"):
        flow.score(torch.randn(3, 2), create_graph=True)


def test_the_score_of_a_sample_that_fails_is_nan():
    cube = cnf.CNF(lambda t, x: x**3, "exact", times=(1.0, 0.0))
    flow = cnf.Flow(cnf.StandardNormal(2), cube)
    x = torch.tensor([[0.1, 0.1], [3.0, 0.0]])
    score = flow.score(x, solver=Solver(on_failure="nan"))
    assert score[0].isfinite().all()
    assert score[1].isnan().all()


def test_a_score_that_has_no_graph_is_refused_where_one_is_asked():
    flow = cnf.FFJORD(2, hidden=(8,), solver=cnf.TorchDiffEq("rk4", steps=2, gradient="adjoint"))
    with pytest.raises(RuntimeError, match="gradient='backprop'"):
        flow.score(torch.randn(3, 2), create_graph=True)


# ---------------------------------------------------------------- times of the ends


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("batch", ["shared", "independent"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_gradient_in_both_end_times_is_that_of_the_closed_form(gradient, batch, method):
    solver = Solver(method, steps=100, rtol=1e-9, atol=1e-9, gradient=gradient, batch=batch)
    field, z = Rate(), torch.randn(5, 2, dtype=torch.float64)
    t0 = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    t1 = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    transform = cnf.CNF(field, "exact", solver, times=(t0, t1))
    x, log_det = transform.forward_and_log_det(z)
    found = torch.autograd.grad(x.sin().sum() + log_det.square().sum(), (t0, t1, field.a))
    exponent = field.integral(t0, t1)
    truth_x, truth_log_det = z * exponent.exp(), exponent.sum().expand(5)
    loss = truth_x.sin().sum() + truth_log_det.square().sum()
    truth = torch.autograd.grad(loss, (t0, t1, field.a))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_learned_end_time_is_a_parameter_of_the_flow():
    end = nn.Parameter(torch.tensor(0.5))
    flow = cnf.FFJORD(2, hidden=(8,), blocks=2, times=(0.0, end))
    names = [name for name, _ in flow.named_parameters() if name.endswith("data_time")]
    assert names == ["transform.transforms.0.data_time", "transform.transforms.1.data_time"]
    optimiser = torch.optim.SGD(flow.parameters(), lr=0.1)
    (-flow.log_prob(3 * torch.randn(16, 2)).mean()).backward()
    optimiser.step()
    ends = [block.times[1].item() for block in flow.transform]
    assert ends[0] != 0.5
    assert ends[1] != 0.5
    assert end.item() == 0.5
    other = copy.deepcopy(flow)
    other.load_state_dict(flow.state_dict())
    assert [block.times[1].item() for block in other.transform] == pytest.approx(ends)


def test_an_end_time_can_recover_how_long_the_data_took():
    field, z = Rate(), torch.randn(64, 2, dtype=torch.float64)
    data = z * field.integral(0.0, 0.8).exp().detach()
    end = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    transform = cnf.CNF(field, "exact", Solver("rk4", steps=10), times=(0.0, end))
    optimiser = torch.optim.LBFGS([end], max_iter=50)

    def loss():
        optimiser.zero_grad()
        value = (transform.forward(z) - data).square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert end.item() == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    ("times", "error", "words"),
    [
        ((0.0,), ValueError, "pair"),
        ((0.0, torch.ones(2)), ValueError, r"times\[1\].*\(2,\)"),
        ((torch.tensor(0), 1.0), TypeError, r"times\[0\].*int64"),
        (("0", 1.0), TypeError, r"times\[0\]"),
    ],
    ids=str,
)
def test_ends_that_are_no_times_are_refused(times, error, words):
    with pytest.raises(error, match=words):
        cnf.CNF(cnf.MLPField(2), times=times)
