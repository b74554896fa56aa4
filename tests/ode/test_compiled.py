"""compile=True: the same numbers as eager steps, few graphs, and the same errors.

Compiling takes seconds, so the flows are tiny and shared between tests where they can be.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import time
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cnf
from cnf.ode import Solver, odeint
from cnf.ode.inductor import options

GRADIENTS = ["backprop", "checkpoint", "adjoint"]
EULER = Solver("euler", steps=1, compile=True)
HEUN = Solver("heun", steps=2, compile=True)
# Nothing falls back unnoticed; what torch says while it compiles is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore", "error:compile=True")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    """Every parameter random, so that no gradient is zero by chance."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=100 * seed + i + 1))
    return module


def flow_of(field=None, divergence="exact", solver=EULER, dims=(2,)):
    field = randomised(cnf.MLPField(dims, (8,))) if field is None else field
    transform = cnf.CNF(field, divergence, solver, event_dims=len(dims))
    return cnf.Flow(cnf.StandardNormal(*dims), transform)


def eager(flow, **choices):
    """The solver of a flow, without compiling."""
    return dataclasses.replace(flow.transform.solver, compile=False, **choices)


def found(flow, x, context=None, solver=None, parameters=()):
    """Log-densities, and the gradients of their weighted sum in x, context and parameters."""
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    wanted = [v for v in (x, context) if v is not None] + [*flow.parameters(), *parameters]
    seed = torch.Generator().manual_seed(0)
    value = flow.log_prob(x, context, solver=solver, generator=seed)
    weight = 1 + torch.arange(len(x), dtype=x.dtype, device=x.device) / 8
    grads = torch.autograd.grad((weight * value.sin()).sum(), wanted, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(v) if g is None else g
                              for v, g in zip(wanted, grads, strict=True))]  # fmt: skip


def assert_equal(ours, theirs, tol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        scale = 1 + (float(b.detach().abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * scale)


class Graphs:
    """Counts the graphs compiled in a block."""

    def __enter__(self):
        self.before = counters["stats"]["unique_graphs"]
        return self

    def __exit__(self, *_):
        self.number = counters["stats"]["unique_graphs"] - self.before


@pytest.fixture(scope="module")
def small():
    """A flow whose steps many tests share."""
    return flow_of()


@pytest.fixture(scope="module")
def adaptive():
    """A conditional flow of adaptive steps."""
    field = randomised(cnf.MLPField(2, (8,), context=2))
    return flow_of(field, solver=Solver("bosh3", rtol=1e-3, atol=1e-3, compile=True))


# ---------------------------------------------------------------- the same numbers


class Convolutional(nn.Module):
    """A user's field on pictures (2, 3, 4)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, t, x):
        return self.last(nn.functional.softplus(self.first(x)) * (1 + t))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_adaptive_steps_agree_with_eager(adaptive, gradient):
    x, context = normal(9, 2), normal(9, 2, seed=1)
    expected = found(adaptive, x, context, eager(adaptive, gradient=gradient))
    choice = dataclasses.replace(adaptive.transform.solver, gradient=gradient)
    assert_equal(found(adaptive, x, context, choice), expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_fixed_steps_agree_with_eager(small, gradient):
    x = normal(9, 2)
    expected = found(small, x, None, eager(small, gradient=gradient, steps=3))
    choice = dataclasses.replace(EULER, gradient=gradient, steps=3)
    assert_equal(found(small, x, None, choice), expected)


def test_dopri5_with_noise_agrees_with_eager():
    own = 0.5 * normal(3, 3)

    def field(t, x):
        return (x * 3).tanh() @ own.T * (4 * t).sin()

    solver = Solver(rtol=1e-4, atol=1e-4, compile=True)
    flow = flow_of(field, cnf.Hutchinson(probes=2), solver, dims=(3,))
    x = normal(6, 3)
    with torch.no_grad():
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        ours = flow.log_prob(x, generator=seeds[0])
        assert_equal([ours], [flow.log_prob(x, solver=eager(flow), generator=seeds[1])])
    assert (ours - flow.base.log_prob(x)).abs().max() > 0.1


def test_a_function_reaches_the_tensors_that_it_captures():
    own = (0.5 * normal(2, 2)).requires_grad_()
    flow, x = flow_of(lambda t, x: (x @ own.T).sin() + t), normal(6, 2)
    ours = found(flow, x, parameters=[own])
    assert ours[-1].abs().max() > 0.1
    assert_equal(ours, found(flow, x, None, eager(flow), [own]))
    with torch.no_grad():
        own.mul_(2.0)
    assert_equal(found(flow, x, None, None, [own]), found(flow, x, None, eager(flow), [own]))


FIELDS = {
    "squash-heun": lambda: flow_of(
        randomised(cnf.ConcatSquashField(3, (6,))),
        cnf.Hutchinson("gaussian"),
        Solver("heun", steps=2, compile=True),
        (3,),
    ),
    "convolution": lambda: flow_of(randomised(Convolutional()), "exact", EULER, (2, 3, 4)),
    "float64": lambda: flow_of().double(),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_every_kind_agree_with_eager(name):
    flow = FIELDS[name]()
    dtype = next(flow.parameters()).dtype
    x = normal(5, *flow.event_shape, dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-9
    assert_equal(found(flow, x), found(flow, x, None, eager(flow)), tol)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_steps_on_a_gpu_agree_with_eager(method):
    flow = flow_of(solver=Solver(method, steps=2, compile=True)).cuda()
    x = normal(9, 2).cuda()
    assert_equal(found(flow, x), found(flow, x, None, eager(flow)))


def test_independent_steps_agree_with_eager():
    def field(t, x):
        return -((x * x.abs()).tanh()) * (5 * t).cos()

    solver = Solver("bosh3", rtol=1e-4, compile=True, batch="independent")
    flow, x = cnf.CNF(field, "exact", solver), 3 * normal(20, 2)
    with torch.no_grad():
        ours = flow.inverse(x)
        theirs = flow.inverse(x, solver=dataclasses.replace(solver, compile=False))
    assert_equal([ours], [theirs])
    assert (ours - x).abs().max() > 0.1


def test_training_gives_the_same_weights(small):
    x, ours = normal(9, 2), copy.deepcopy(small)
    theirs = copy.deepcopy(small)
    theirs.transform.solver = eager(theirs)
    for flow in (ours, theirs):
        optimiser = torch.optim.SGD(flow.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimiser.step()
    moved = [p - q for p, q in zip(ours.parameters(), small.parameters(), strict=True)]
    assert max(float(d.abs().max()) for d in moved) > 0.05
    assert_equal(list(ours.parameters()), list(theirs.parameters()))
    # A flow that was trained can be copied and saved, and gives the same bits again.
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other.log_prob(x), ours.log_prob(x))
    torch.save(ours, io.BytesIO())


def test_other_weights_for_one_call(small):
    x = normal(9, 2)
    for gradient in ("backprop", "checkpoint"):
        results = []
        for choice in (EULER, eager(small)):
            own = {
                name: (0.5 * normal(*p.shape, seed=50 + i)).requires_grad_()
                for i, (name, p) in enumerate(small.named_parameters())
            }
            solver = {"solver": dataclasses.replace(choice, gradient=gradient)}
            value = torch.func.functional_call(small, own, (x,), solver)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), own.values())])
        assert_equal(*results)
        assert (results[0][0] - small.log_prob(x)).abs().max() > 0.01


def test_modes_without_gradient_give_the_same(small):
    x = normal(9, 2)
    value = small.log_prob(x)
    with torch.no_grad():
        plain = small.log_prob(x)
    with torch.inference_mode():
        inferred = small.log_prob(normal(9, 2))
    assert not plain.requires_grad
    assert_equal([plain, inferred], [value.detach()] * 2, 1e-6)
    z = small.transform.inverse(x)
    assert_equal([z.detach()], [small.transform.inverse(x, solver=eager(small)).detach()])


def test_empty_and_single_batches(small):
    for n in (0, 1):
        x = normal(n, 2)
        assert_equal(found(small, x), found(small, x, None, eager(small)))


# ---------------------------------------------------------------- few graphs


def test_new_batch_sizes_compile_at_most_once_more():
    flow = flow_of(solver=dataclasses.replace(EULER, steps=2))
    for call in (lambda x: flow.log_prob(x).sum().backward(), flow.transform.inverse):
        call(normal(7, 2))
        with Graphs() as new:
            for n in (9, 33, 12, 100, 2):
                call(normal(n, 2))
        assert new.number <= 1


def test_tolerances_and_step_sizes_compile_nothing(adaptive):
    x, context = normal(9, 2), normal(9, 2, seed=1)
    flow = adaptive
    flow.log_prob(x, context).sum().backward()
    given = dataclasses.replace(flow.transform.solver, first_step=0.1)
    flow.log_prob(x, context, solver=given).sum().backward()
    with Graphs() as new:
        for rtol, atol in ((1e-2, 1e-4), (1e-4, 1e-5), (0.0, 1e-3), (1e-3, 0.0)):
            choice = dataclasses.replace(flow.transform.solver, rtol=rtol, atol=atol, max_steps=777)
            flow.log_prob(x, context, solver=choice).sum().backward()
            first = dataclasses.replace(choice, first_step=0.01 + atol)
            flow.log_prob(x, context, solver=first).sum().backward()
    assert new.number == 0


def test_step_sizes_and_spans_of_fixed_steps_compile_nothing(small):
    x = normal(9, 2)
    small.log_prob(x).sum().backward()
    flow = cnf.CNF(small.transform.field, "exact", EULER, times=(0.3, 1.9))
    with Graphs() as new:
        for steps in (2, 5):
            choice = dataclasses.replace(EULER, steps=steps)
            small.log_prob(x, solver=choice).sum().backward()
            flow.forward_and_log_det(x, solver=choice)[1].sum().backward()
    assert new.number == 0


def test_many_flows_keep_graphs_of_their_own():
    """More than torch.compile's limit of graphs of one function: none falls back, none is lost."""
    x = normal(5, 1)
    flows = [flow_of(randomised(cnf.MLPField(1, (2,)), i), dims=(1,)) for i in range(20)]
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # 2.6
    assert len(flows) > getattr(config, name)
    with torch.no_grad(), Graphs() as new:
        values = [flow.log_prob(x) for flow in flows]
    assert 10 <= new.number <= 20
    with torch.no_grad(), Graphs() as again:
        for flow, value in zip(flows, values, strict=True):
            assert torch.equal(flow.log_prob(x), value)
            assert_equal([value], [flow.log_prob(x, solver=eager(flow))])
    assert again.number == 0


# ---------------------------------------------------------------- what cannot be compiled


def test_a_field_that_cannot_be_compiled_runs_eagerly_after_one_warning():
    def branching(t, x):
        return -x if x.sum() > 0 else -2 * x

    def listing(t, x):
        return x * torch.tensor([-2.0 if v > 0 else -1.0 for v in x[0].detach().tolist()])

    for field in (branching, listing):
        flow, x = flow_of(field), normal(4, 2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ours, again = found(flow, x), found(flow, x)
        said = [w for w in seen if "compile=True" in str(w.message)]
        assert [w.category for w in said] == [RuntimeWarning]
        assert "could not be compiled" in str(said[0].message)
        expected = found(flow, x, None, eager(flow))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


WRONG = {
    "shape": (lambda t, x: x[:, :1], ValueError, r"shape of x, \(4, 2\), got \(4, 1\)"),
    "dtype": (lambda t, x: x.double(), TypeError, "torch.float64"),
    "none": (lambda t, x: None, TypeError, "NoneType"),
    "random": (lambda t, x: x + torch.randn_like(x), ValueError, "random numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_at_fault_raises_its_own_error_without_a_warning(name):
    field, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        flow_of(field).log_prob(normal(4, 2))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_derivatives_are_refused(small, gradient):
    x = normal(9, 2).requires_grad_()
    value = small.log_prob(x, solver=dataclasses.replace(EULER, gradient=gradient))
    with pytest.raises(RuntimeError, match="gradient='backprop' and compile=False"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


def test_a_field_that_writes_into_its_argument():
    x = normal(4, 2)
    before = x.clone()
    solver = Solver("heun", steps=1, compile=True)
    end = odeint(lambda t, x: x.mul_(0.5), x, 0.0, 1.0, solver)
    assert torch.equal(x, before)
    torch.testing.assert_close(end.x, before * (1 + 0.5 + 0.125))


def test_faults_end_soon_with_their_causes():
    """One field, whose argument chooses the fault, so that it compiles once."""

    def f(t, x, fault):
        slow = -1e6 * (x - t.cos())
        bad = torch.where(fault == 1, torch.full_like(x, torch.nan), -x)
        return torch.where(fault == 2, x * x, torch.where(fault == 3, slow, bad))

    x, solver = torch.full((4, 1), 2.0), Solver("bosh3", compile=True)
    with torch.no_grad():
        good = odeint(f, x, 0.0, 1.0, solver, args=(torch.zeros(4, 1),))
        torch.testing.assert_close(good.x, x * torch.tensor(-1.0).exp(), rtol=1e-4, atol=0)
        for fault, status in ((1, "non_finite_field"), (2, "blow_up"), (3, "too_many_steps")):
            start = time.process_time()
            with pytest.raises(cnf.SolverError) as raised:
                odeint(f, x, 0.0, 1.0, solver, args=(torch.full((4, 1), float(fault)),))
            assert raised.value.status == status
            assert time.process_time() - start < 5.0
        one = torch.tensor([[0.0], [1.0], [0.0], [2.0]])
        some = odeint(f, x, 0.0, 1.0, dataclasses.replace(solver, on_failure="nan"), args=(one,))
        assert some.x.isnan().flatten().tolist() == [False, True, False, True]


# ---------------------------------------------------------------- the fast tanh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_compiled_tanh(dtype):
    special = [0.0, 1e-38, -1e-30, 1e-8, -1e-4, 7.9988, 8.0, -9.02, 1e4, -1e30, 3e38]
    infinite = [float("inf"), -float("inf"), float("nan")]
    x = torch.cat((torch.linspace(-12, 12, 40001), torch.tensor(special + infinite))).to(dtype)
    value = torch.compile(torch.tanh, fullgraph=True, options=options("cpu"))(x)
    truth = x.double().tanh()
    assert value.dtype == dtype
    assert value[-1].isnan()
    error = (value - truth)[:-1].abs()
    assert error.max() < (5e-7 if dtype == torch.float32 else 1e-15)
    assert value[:-1].abs().max() <= 1.0
    tiny = (x.abs() < 1e-3) & (x.abs() > 1e-37)
    torch.testing.assert_close(value[tiny].double(), truth[tiny], rtol=1e-6, atol=1e-45)


def test_backward_leaves_alone_what_the_steps_share():
    """Inductor (torch 2.13) overwrites an input of which it left out a copy."""
    field, estimate = randomised(cnf.ConcatSquashField(3, (6,))), cnf.Hutchinson("gaussian")

    def f(t, x, noise):
        dx, divergence = estimate(lambda t, x, c: field(t, x), t, x, None, noise)
        return dx, divergence.unsqueeze(1)

    found = []
    for solver in (HEUN, dataclasses.replace(HEUN, compile=False)):
        x, noise = normal(5, 3).requires_grad_(), normal(5, 1, 3, seed=1)
        solution = odeint(f, x, 0.0, 1.0, solver, args=(noise,))
        (solution.x.square().sum() + solution.quadratures.sum()).backward()
        found.append((solution.quadratures.detach(), x.grad))
    assert_equal(*found)
