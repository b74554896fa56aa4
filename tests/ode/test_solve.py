"""Solves with closed forms: values, where the field is called, what is counted, what sets steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.linalg import expm

import cnf
from cnf.ode import METHODS, Solver, odeint
from cnf.ode.control import Controller
from cnf.ode.methods import tableau

ADAPTIVE = ["bosh3", "dopri5", "tsit5", "dopri8"]
FIXED = ["euler", "midpoint", "heun", "rk4"]
STAGES = {name: len(METHODS[name].nodes) for name in METHODS}
SPANS = {
    "forwards": (0.0, 1.0),
    "backwards": (1.0, 0.0),
    "uneven": (0.1, 0.7),
    "thirds": (2 / 3, -1 / 3),
    "far": (1000.1, 1000.4),
}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def tight(name="dopri5"):
    """A solver that meets `accuracy`."""
    return Solver(name, steps=100, rtol=1e-9, atol=1e-9, max_steps=5000)


def accuracy(name):
    """What `tight` may be off by, relative to a solution of size one."""
    return {"euler": 5e-2, "midpoint": 1e-3, "heun": 1e-3}.get(name, 1e-6)


class Recorded:
    """A field that notes when it is called."""

    def __init__(self, f):
        self.f = f
        self.times = []

    def __call__(self, t, x):
        self.times.append(t.item())
        return self.f(t, x)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    "divergence", ["exact", cnf.Hutchinson("gaussian", probes=3)], ids=["exact", "hutchinson"]
)
@pytest.mark.parametrize("name", METHODS)
def test_linear_field_is_the_matrix_exponential(name, divergence):
    a = 0.7 * torch.randn(3, 3, dtype=torch.float64)
    z = torch.randn(5, 3, dtype=torch.float64)
    flow = cnf.CNF(lambda t, x: x @ a.T, divergence, tight(name))
    seed = torch.Generator().manual_seed(1)
    x, log_det = flow.forward_and_log_det(z, generator=seed)
    expected = z @ torch.from_numpy(expm(a.numpy())).T
    torch.testing.assert_close(x, expected, rtol=accuracy(name), atol=accuracy(name))
    noise = cnf.Hutchinson("gaussian", probes=3).sample_noise(z, torch.Generator().manual_seed(1))
    trace = a.trace().expand(5) if divergence == "exact" else (noise @ a * noise).sum(-1).mean(1)
    torch.testing.assert_close(log_det, trace, rtol=1e-11, atol=1e-11)
    back, minus = flow.inverse_and_log_det(x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(back, z, rtol=5 * accuracy(name), atol=5 * accuracy(name))
    torch.testing.assert_close(minus, -trace, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("times", [(0.2, 1.5), (1.5, 0.2)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", METHODS)
def test_scalar_rate(name, times):
    x0 = float64([1.0, -2.0], [0.3, 4.0])
    flow = cnf.CNF(lambda t, x: (3 * t).sin() * x, "exact", tight(name), times=times)
    x, log_det = flow.forward_and_log_det(x0)
    total = (math.cos(3 * times[0]) - math.cos(3 * times[1])) / 3
    torch.testing.assert_close(x, x0 * math.exp(total), rtol=accuracy(name), atol=0)
    torch.testing.assert_close(log_det, float64(2 * total, 2 * total), rtol=0, atol=accuracy(name))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)], ids=["scalar", "vector", "image"])
def test_event_shapes(shape):
    x0 = torch.randn(3, *shape, dtype=torch.float64)
    flow = cnf.CNF(lambda t, x: -x, "exact", tight(), event_dims=len(shape))
    x, log_det = flow.forward_and_log_det(x0)
    torch.testing.assert_close(x, x0 * math.exp(-1))
    torch.testing.assert_close(
        log_det, torch.full((3,), -float(math.prod(shape)), dtype=torch.float64)
    )


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_batch_dimensions(batch_dims):
    x0 = torch.randn(2, 3, dtype=torch.float64)

    def f(t, x):
        rates = x.reshape(*x.shape[:batch_dims], -1)
        return -x, torch.stack((rates.sum(-1), rates.new_ones(rates.shape[:-1])), -1)

    end = odeint(f, x0, 0.0, 1.0, tight(), batch_dims=batch_dims)
    torch.testing.assert_close(end.x, x0 * math.exp(-1))
    sums = x0.reshape(*x0.shape[:batch_dims], -1).sum(-1) * (1 - math.exp(-1))
    torch.testing.assert_close(end.quadratures, torch.stack((sums, torch.ones_like(sums)), -1))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_falls_with_the_tolerance(name):
    x0 = float64([1.0], [2.0])
    found = []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9):
        solver = Solver(name, rtol=tol, atol=tol, max_steps=5000)
        end = odeint(lambda t, x: (x * (5 * t).cos(), x), x0, 0.0, 2.0, solver)
        exact = x0 * math.exp(math.sin(10) / 5)
        found.append(float((end.x - exact).abs().max()))
        assert found[-1] < 30 * tol
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "tsit5", "dopri8"])
def test_round_trip(name):
    flow = cnf.CNF(cnf.MLPField(2, (8,)).double(), "exact", tight(name))
    z = torch.randn(6, 2, dtype=torch.float64)
    x, log_det = flow.forward_and_log_det(z)
    back, minus = flow.inverse_and_log_det(x)
    torch.testing.assert_close(back, z, rtol=0, atol=3 * accuracy(name))
    torch.testing.assert_close(
        log_det + minus, torch.zeros(6).double(), rtol=0, atol=3 * accuracy(name)
    )


def test_values_alone_take_no_trace():
    class Field(torch.nn.Module):
        def forward(self, t, x):
            return -x

        def with_divergence(self, t, x, context):
            raise AssertionError("a trace was computed")

    flow = cnf.CNF(Field(), "exact", tight())
    z = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.forward(z), z * math.exp(-1))
    torch.testing.assert_close(flow.inverse(z), z * math.exp(1))


# ---------------------------------------------------------------- the ends of the span


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("learnable", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", METHODS)
def test_field_is_called_inside_the_span_and_at_its_very_end(name, span, learnable):
    t0, t1 = span
    f = Recorded(lambda t, x: ((40 * t).sin() - x, torch.ones_like(x)))
    times = (
        [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in span]
        if learnable
        else span
    )
    solver = Solver(name, rtol=1e-4, atol=1e-4, steps=7)
    end = odeint(f, float64([0.5], [2.0]), *times, solver)
    assert min(f.times) >= min(span)
    assert max(f.times) <= max(span)
    assert f.times[0] == t0
    if 1 in METHODS[name].nodes:
        assert f.times[-1] == t1
        assert f.times.count(t1) <= 2 * STAGES[name]
    torch.testing.assert_close(
        end.quadratures, torch.full((2, 1), t1 - t0, dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("name", METHODS)
def test_many_learnable_spans_are_kept_to(name):
    ends = torch.empty(50, 2, dtype=torch.float64).uniform_(-3, 3)
    for t0, t1 in ends:
        f = Recorded(lambda t, x: -x)
        odeint(
            f,
            float64([1.0]),
            t0,
            t1.clone().requires_grad_(),
            Solver(name, steps=1, rtol=1e-2, atol=1e-2),
        )
        assert min(t0, t1) <= min(f.times)
        assert max(f.times) <= max(t0, t1)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_first_step_beyond_the_span_is_cut(name):
    f = Recorded(lambda t, x: -1e-6 * x)
    end = odeint(f, float64([1.0]), 0.0, 0.3, Solver(name, first_step=5.0))
    assert max(f.times) == 0.3
    assert (end.stats.accepted, end.stats.rejected) == (1, 0)
    torch.testing.assert_close(end.x, float64([math.exp(-3e-7)]))


@pytest.mark.parametrize("name", METHODS)
def test_equal_ends_are_the_identity(name):
    x0 = torch.randn(3, 2, dtype=torch.float64)
    flow = cnf.CNF(lambda t, x: -x, "exact", Solver(name), times=(0.4, 0.4))
    x, log_det = flow.forward_and_log_det(x0)
    assert torch.equal(x, x0)
    assert torch.equal(log_det, torch.zeros(3).double())


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", METHODS)
def test_tiny_spans(name, sign):
    span = sign * 1e-12
    end = odeint(lambda t, x: (3 * x, x), float64([1.0]), 0.0, span, Solver(name))
    assert (end.x - 1).item() / span == pytest.approx(3, rel=1e-3)  # 1 + 3e-12 in float64
    assert end.quadratures.item() == pytest.approx(span, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_state_keeps_its_dtype_and_time_is_float64(dtype):
    f = Recorded(lambda t, x: (x * t, x))
    x0 = torch.ones(2, 2, dtype=dtype)
    end = odeint(f, x0, 1.0, 1.0 + 1e-4, Solver("dopri5"))
    assert end.x.dtype == end.quadratures.dtype == dtype
    t1 = 1.0 + 1e-4
    assert end.x.mean().item() == pytest.approx(
        math.exp((t1**2 - 1) / 2), abs=4 * torch.finfo(dtype).eps
    )
    assert end.quadratures.sum().item() == pytest.approx(4e-4, rel=1e-3)


def test_a_tolerance_below_the_dtype_is_raised_with_a_warning():
    x0 = torch.ones(2, 1)
    with pytest.warns(RuntimeWarning, match=r"rtol=1e-12 is below the resolution of torch.float32"):
        end = odeint(lambda t, x: -x, x0, 0.0, 1.0, Solver(rtol=1e-12, atol=1e-6))
    torch.testing.assert_close(end.x, x0 * math.exp(-1))


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("name", FIXED)
def test_evaluations_of_fixed_steps(name):
    f = Recorded(lambda t, x: -x)
    stats = odeint(f, float64([1.0]), 0.0, 1.0, Solver(name, steps=9)).stats
    assert stats.nfe == len(f.times) == 9 * STAGES[name]
    assert (stats.accepted, stats.rejected, stats.status) == (9, 0, "converged")


@pytest.mark.parametrize("first_step", [None, 0.9], ids=["chosen", "given"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_evaluations_of_adaptive_steps(name, first_step):
    f = Recorded(lambda t, x: (60 * (t - 0.5)).tanh() * 30 * x.sin())
    stats = odeint(f, float64([1.0]), 0.0, 1.0, Solver(name, first_step=first_step)).stats
    assert stats.accepted > 3
    assert stats.rejected > 0
    tries = stats.accepted + stats.rejected
    start = 1 if first_step else 2  # f at the start, and one more to choose the first step
    expected = start + (STAGES[name] - 1) * tries
    if not tableau(name).first_same_as_last:
        expected += stats.accepted - 1  # f at the start of every step after the first
    assert stats.nfe == len(f.times) == expected


def test_dopri5_takes_six_evaluations_a_step():
    f = Recorded(lambda t, x: -x)
    stats = odeint(f, float64([1.0]), 0.0, 1.0, Solver("dopri5")).stats
    assert stats.rejected == 0
    assert stats.nfe == len(f.times) == 2 + 6 * stats.accepted


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_the_gradient_costs_no_evaluation_in_the_forward_solve(name, gradient):
    f = Recorded(lambda t, x: -x)
    x0 = float64([1.0]).requires_grad_()
    stats = odeint(f, x0, 0.0, 1.0, Solver(name, steps=4, gradient=gradient)).stats
    assert stats.nfe == len(f.times) == (16 if name == "rk4" else 2 + 6 * stats.accepted)


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_same_seed_same_bits(gradient):
    flow = cnf.CNF(cnf.MLPField(4, (8,)).double(), "hutchinson", Solver(gradient=gradient))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(seed):
        z, log_det = flow.inverse_and_log_det(x, generator=torch.Generator().manual_seed(seed))
        return (
            z,
            log_det,
            *torch.autograd.grad((z**2).sum() + log_det.sum(), [x, *flow.parameters()]),
        )

    first, second, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])


def test_noise_is_drawn_once_a_solve():
    class Counting(cnf.Divergence):
        drawn, seen = 0, []

        def sample_noise(self, x, generator=None):
            self.drawn += 1
            return cnf.Hutchinson().sample_noise(x, generator)

        def __call__(self, field, t, x, context, noise, constants):
            self.seen.append(noise)
            return cnf.Hutchinson()(field, t, x, context, noise)

    divergence = Counting()
    cnf.CNF(cnf.MLPField(3, (8,)), divergence).inverse_and_log_det(torch.randn(4, 3))
    assert divergence.drawn == 1
    assert len(divergence.seen) > 10
    assert all(noise is divergence.seen[0] for noise in divergence.seen)


def test_the_generator_of_the_user_is_left_alone():
    flow = cnf.CNF(cnf.MLPField(3, (8,)), "exact")
    x = torch.randn(4, 3)
    before = torch.get_rng_state()
    flow.inverse_and_log_det(x)[1].sum().backward()
    flow.inverse_and_log_det(x, divergence="hutchinson", generator=torch.Generator())[
        1
    ].sum().backward()
    flow.inverse(x)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- what sets the step


def oscillator(t, x):
    """(rate, y)' = (0, rate cos(rate t) y): log_det = sin(rate)."""
    rate, y = x.unbind(-1)
    return torch.stack((torch.zeros_like(rate), rate * (rate * t).cos() * y), -1)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_one_hard_sample_is_as_accurate_among_easy_ones_as_alone(name):
    hard, easy = float64(20.0, 1.0), float64(0.0, 1.0).expand(255, 2)
    solver = Solver(name, rtol=1e-4, atol=1e-4, first_step=0.01)
    flow = cnf.CNF(oscillator, "exact", solver)
    alone = flow.forward_and_log_det(hard[None])[1][0]
    among = flow.forward_and_log_det(torch.cat((easy[:100], hard[None], easy[100:])))[1][100]
    assert abs(alone.item() - math.sin(20)) > 1e-9  # there is an error to dilute
    assert among.item() == pytest.approx(alone.item(), abs=1e-14)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_event_of_many_dimensions_is_measured_by_its_mean_square(name):
    wide = odeint(lambda t, x: (9 * t).cos() * x, float64([1.0] * 50), 0.0, 1.0, Solver(name))
    narrow = odeint(lambda t, x: (9 * t).cos() * x, float64([1.0]), 0.0, 1.0, Solver(name))
    assert wide.stats.nfe == narrow.stats.nfe


def resting(t, x):
    """A field that is zero at x = 0 and whose divergence there is 30 cos(30 t)."""
    return 30 * (30 * t).cos() * x


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_log_determinant_is_held_to_the_tolerance_unless_left_out(name):
    x, solver = torch.zeros(2, 1, dtype=torch.float64), Solver(name)
    flow = cnf.CNF(resting, "exact", solver)
    with cnf.record_solves() as solves:
        both = flow.forward_and_log_det(x)[1]
        state = flow.forward_and_log_det(
            x, solver=dataclasses.replace(solver, error_control="state")
        )[1]
    assert both.sub(math.sin(30)).abs().max() < 1e-3
    assert state.sub(math.sin(30)).abs().max() > 1e-2
    assert solves[1].nfe < solves[0].nfe / 2


def test_quadratures_that_are_not_controlled_do_not_change_the_steps():
    def f(t, x, *, count):
        rates = [(5 * t).cos() * x, (80 * t).cos() * 50 * torch.ones_like(x), torch.exp(20 * t) * x]
        return -x, torch.cat(rates[:count], -1)

    def solve(count, controlled):
        return odeint(
            lambda t, x: f(t, x, count=count),
            float64([1.0], [2.0]),
            0.0,
            1.0,
            controlled=controlled,
        )

    one, three, held = solve(1, 1), solve(3, 1), solve(3, None)
    assert one.stats.nfe == three.stats.nfe < held.stats.nfe
    assert torch.equal(one.x, three.x)
    assert torch.equal(one.quadratures, three.quadratures[:, :1])
    exact = torch.full((2,), 50 * math.sin(80) / 80, dtype=torch.float64)
    torch.testing.assert_close(held.quadratures[:, 1], exact, rtol=0, atol=1e-3)


def test_one_hard_quadrature_is_not_diluted_by_easy_ones():
    def f(t, x, *, easy):
        hard = 20 * (20 * t).cos() * torch.ones_like(x)
        return -x, torch.cat((torch.ones(len(x), easy, dtype=x.dtype), hard), -1)

    alone = odeint(lambda t, x: f(t, x, easy=0), float64([1.0]), 0.0, 1.0)
    among = odeint(lambda t, x: f(t, x, easy=99), float64([1.0]), 0.0, 1.0)
    assert alone.stats.nfe == among.stats.nfe
    assert among.quadratures[0, -1].item() == pytest.approx(alone.quadratures.item(), abs=1e-14)


def test_the_controller():
    control = Controller(5)
    assert control.after_acceptance(1.0) == pytest.approx(0.9)
    assert control.after_acceptance(0.0) == 10.0
    assert control.after_acceptance(1e-3) < 0.9 * 1e-3 ** (-0.85 / 5)  # the last error was smaller
    assert 0.2 <= control.after_rejection(1.1) <= 0.9
    assert control.after_rejection(1e9) == 0.2
    assert control.after_rejection(math.nan) == control.after_rejection(math.inf) == 0.2
    assert control.rejections == 4
    assert control.after_acceptance(1e-9) == 1.0  # no growth right after a rejection
    assert control.rejections == 0
    assert control.after_acceptance(1e-9) > 1.0


# ---------------------------------------------------------------- what is given


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_arguments_are_not_modified(gradient):
    flow = cnf.CNF(cnf.MLPField(3, (8,), context=2), "exact", Solver(gradient=gradient))
    x, context = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    copies = [v.detach().clone() for v in (x, context)]
    z, log_det = flow.inverse_and_log_det(x, context)
    (z.sum() + log_det.sum()).backward()
    assert all(torch.equal(v, c) for v, c in zip((x, context), copies, strict=True))
    assert x._version == context._version == 0


def test_a_field_that_writes_into_its_argument_is_refused_and_the_caller_spared():
    x = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="in-place"):
        odeint(lambda t, x: x.mul_(-1), x, 0.0, 1.0)
    assert torch.equal(x, torch.ones(2, 2))


STRIDES = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(6, 4),
    "sliced": lambda x: torch.cat((x, x), -1)[:, ::2],
    "reversed rows": lambda x: x.flip(0),
}


@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES)
def test_memory_layout_does_not_matter(strided):
    x = strided(torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    y = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    flow = cnf.CNF(cnf.ConcatSquashField(4, (8,)).double(), "exact")
    results = []
    for value in (x, y):
        z, log_det = flow.inverse_and_log_det(value)
        results.append((z, log_det, *torch.autograd.grad(z.sum() + log_det.sum(), value)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)], ids=["scalar", "vector", "image"])
def test_an_empty_batch(shape, divergence, gradient):
    weight = torch.nn.Parameter(torch.ones(()))
    field = torch.nn.Module()
    field.weight, field.forward = weight, lambda t, x: weight * x.sin()
    flow = cnf.CNF(field, divergence, Solver(gradient=gradient), event_dims=len(shape))
    x = torch.zeros(0, *shape, requires_grad=True)
    z, log_det = flow.inverse_and_log_det(x)
    assert (z.shape, log_det.shape) == (x.shape, (0,))
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape
    assert weight.grad.item() == 0


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 0), (3, 4), ()], ids=str)
def test_any_number_of_batch_dimensions(shape):
    flow = cnf.CNF(cnf.MLPField(2, (8,)).double(), "exact")
    x = torch.randn(*shape, 2, dtype=torch.float64)
    z, log_det = flow.inverse_and_log_det(x)
    flat = flow.inverse_and_log_det(x.reshape(math.prod(shape), 2))
    torch.testing.assert_close(z.reshape(-1, 2), flat[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det.reshape(-1), flat[1], rtol=1e-12, atol=1e-12)


def test_a_field_may_return_the_state_alone_or_no_quadratures():
    for f in (lambda t, x: -x, lambda t, x: (-x, None)):
        end = odeint(f, float64([2.0]), 0.0, 1.0, tight())
        assert end.quadratures is None
        torch.testing.assert_close(end.x, float64([2 * math.exp(-1)]))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_sample_at_rest_does_not_shrink_the_first_step_of_the_others(name):
    x = torch.randn(64, 2, dtype=torch.float64)
    resting_too = torch.cat((x, torch.zeros(1, 2, dtype=torch.float64)))
    alone, among = (
        odeint(lambda t, x: -x, y, 0.0, 1.0, Solver(name)).stats for y in (x, resting_too)
    )
    assert among.nfe == alone.nfe


def test_no_absolute_tolerance_and_a_state_of_zero():
    solution = odeint(lambda t, x: torch.ones_like(x), torch.zeros(3, 2), 0.0, 1.0, Solver(atol=0))
    torch.testing.assert_close(solution.x, torch.ones(3, 2))


def test_a_first_step_below_the_resolution_of_time_is_refused_at_once():
    with pytest.raises(cnf.SolverError) as caught:
        odeint(lambda t, x: -x, torch.ones(1, 1), 1.0, 2.0, Solver(first_step=1e-25))
    assert caught.value.status == "step_underflow"


def test_odeint_works_in_inference_mode():
    with torch.inference_mode():
        x = odeint(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0).x
    assert x.item() == pytest.approx(math.exp(-1), abs=1e-4)


def test_a_solver_by_name_is_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"use cnf\.Solver\('dopri5'\)"):
        odeint(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, "dopri5")


def test_fixed_steps_go_through_vmap_and_jacrev() -> None:
    torch.manual_seed(0)
    flow = cnf.CNF(cnf.MLPField(3, (8,)), "exact", cnf.Solver("rk4", steps=4)).double()
    z = torch.randn(5, 3).double()
    x, log_det = flow.forward_and_log_det(z)
    value, each = torch.func.vmap(flow.forward_and_log_det)(z)
    assert torch.allclose(value, x, atol=1e-12)
    assert torch.allclose(each, log_det, atol=1e-12)
    jacobian = torch.func.vmap(torch.func.jacrev(flow.forward))(z)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_det, atol=1e-4)
