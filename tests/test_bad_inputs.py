"""Bad inputs fail soon and clearly, also without assertions; unusual but good ones work."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.training import fit

SCRIPT = Path(__file__).with_name("bad_inputs_script.py")
TABLE = runpy.run_path(str(SCRIPT))
NAN = float("nan")

SOLVERS = {
    "backprop": cnf.Solver(),
    "checkpoint": cnf.Solver(gradient="checkpoint"),
    "adjoint": cnf.Solver(gradient="adjoint"),
    "rk4": cnf.Solver("rk4"),
    "torchdiffeq": cnf.TorchDiffEq(),
    "torchdiffeq-adjoint": cnf.TorchDiffEq(gradient="adjoint"),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_divergence = pytest.mark.parametrize("divergence", ["exact", "hutchinson"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**options) -> cnf.FFJORD:
    return cnf.FFJORD(2, hidden=(8,), **options)


@pytest.mark.parametrize("case", TABLE["CASES"], ids=[case.name for case in TABLE["CASES"]])
def test_a_bad_input_is_refused_clearly(case) -> None:
    assert TABLE["complaint"](case) is None


def test_bad_inputs_are_refused_without_assertions_too() -> None:
    names = [case.name for case in TABLE["CASES"]]
    assert len(set(names)) == len(names) > 200
    result = subprocess.run(
        [sys.executable, "-O", "-W", "error", str(SCRIPT)],
        env={**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(names)} cases, 0 complaints" in result.stdout


def test_the_time_and_samples_of_a_failure_are_told() -> None:
    def field(t: Tensor, x: Tensor) -> Tensor:
        bad = (t > 0.5) & (x.detach()[:, :1] == 0)
        return x * torch.where(bad, NAN, -1.0)

    x = torch.ones(64, 2)
    x[[3, 40]] = 0.0
    with cnf.record_solves() as solves, pytest.raises(cnf.SolverError) as caught:
        cnf.CNF(field, "exact").forward_and_log_det(x)
    error = caught.value
    assert error.status == solves[0].status == "non_finite_field"
    assert error.samples == (3, 40)
    assert 0.49 <= error.t <= 0.51
    assert 0 < error.nfe == solves[0].nfe < 500


def test_a_failing_solve_in_backward_is_told_and_ends() -> None:
    """The flow contracts by e^-3000: nothing of it can be recovered backwards."""
    field = cnf.CNF(lambda t, x: -3000 * x**3 - 3000 * x, solver=cnf.Solver(gradient="adjoint"))
    x = torch.ones(4, 2, requires_grad=True)
    loss = field.forward(x).square().sum() + field.forward(x).sum()
    with pytest.raises((cnf.SolverError, RuntimeWarning)):
        loss.backward()


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
@each_divergence
def test_nan_on_request_leaves_the_other_samples_alone(bad: float, divergence: str) -> None:
    flow, x = small(divergence=divergence, context=3), torch.randn(8, 8, 2)
    context = torch.randn(8, 3)
    x[2, 3, 1] = bad
    good = torch.ones(8, 8, dtype=torch.bool)
    good[2, 3] = False
    mixed = flow.log_prob(x, context, on_nonfinite="nan", generator=seeded())
    alone = flow.log_prob(x[good], context.expand(8, 8, 3)[good], generator=seeded())
    assert mixed.shape == (8, 8)
    assert mixed[2, 3].isnan()
    assert torch.equal(mixed[good], alone)
    mixed[good].sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("event", [(2,), (1, 2, 2), ()], ids=["vector", "picture", "scalar"])
def test_nan_on_request_where_no_sample_is_finite(event: tuple[int, ...]) -> None:
    flow = cnf.Flow(cnf.StandardNormal(*event), cnf.CNF(lambda t, x: -x, event_dims=len(event)))
    log_prob = flow.log_prob(torch.full((3, *event), NAN), on_nonfinite="nan")
    assert log_prob.shape == (3,)
    assert log_prob.isnan().all()


@each_solver
@each_divergence
def test_an_empty_batch(solver: cnf.Solver, divergence: str) -> None:
    flow = small(divergence=divergence, solver=solver)
    for batch in ((0,), (3, 0)):
        log_prob = flow.log_prob(torch.zeros(*batch, 2))
        assert log_prob.shape == batch
        log_prob.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize("event", [(2,), (1, 2, 2), ()], ids=["vector", "picture", "scalar"])
def test_no_samples(event: tuple[int, ...]) -> None:
    flow = cnf.Flow(cnf.StandardNormal(*event), cnf.CNF(lambda t, x: -x, event_dims=len(event)))
    assert flow.sample(0).shape == (0, *event)
    x, log_prob = flow.sample_and_log_prob((2, 0))
    assert x.shape == (2, 0, *event)
    assert log_prob.shape == (2, 0)


@each_solver
def test_a_span_of_no_length_is_the_identity(solver: cnf.Solver) -> None:
    transform = cnf.CNF(cnf.MLPField(2, (8,)), "exact", solver, times=(0.3, 0.3))
    z = torch.randn(5, 2, requires_grad=True)
    x, log_det = transform.forward_and_log_det(z)
    assert torch.equal(x, z)
    assert not log_det.any()
    (2 * x).sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, 2.0))


@pytest.mark.parametrize(("start", "length"), [(0.0, 1e-12), (1e4, 1e-6)], ids=str)
def test_a_tiny_span_is_solved(start: float, length: float) -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    solution = cnf.odeint(lambda t, x: 3.0 * x, x, start, start + length)
    span = (start + length) - start
    assert solution.x.item() - 1 == pytest.approx(3.0 * span, rel=1e-3)


@pytest.mark.parametrize("one", [1, torch.tensor(1), torch.tensor([1.0]), torch.tensor(1.0).half()])
def test_any_number_is_a_time(one) -> None:
    solution = cnf.odeint(lambda t, x: -x, torch.ones(1, 1), 0, one)
    assert solution.x.item() == pytest.approx(0.36788, abs=1e-4)


def test_a_tolerance_below_the_resolution_warns_and_ends() -> None:
    flow, x = small(divergence="exact"), torch.randn(8, 2)
    tight = cnf.Solver(rtol=1e-12)
    with pytest.warns(RuntimeWarning, match=r"rtol=1e-12 .*float32; 4.8e-07"):
        log_prob = flow.log_prob(x, solver=tight)
    assert torch.allclose(log_prob, flow.log_prob(x), atol=1e-4)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.stack((x, -x), 1).flatten(0, 1)[::2],
    "padded": lambda x: torch.cat((x, x), 1)[:, :2],
    "expanded": lambda x: x[:1].expand(5, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_divergence
def test_the_layout_in_memory_does_not_matter(
    layout: Callable[[Tensor], Tensor], divergence: str
) -> None:
    flow, x = small(divergence=divergence), layout(torch.randn(5, 2))
    own = flow.log_prob(x, generator=seeded())
    assert torch.equal(own, flow.log_prob(x.contiguous().clone(), generator=seeded()))


@each_solver
def test_the_callers_tensors_are_not_touched(solver: cnf.Solver) -> None:
    flow = small(context=3, solver=solver)
    tensors = x, context = torch.randn(5, 2), torch.randn(5, 3)
    before = [t.clone() for t in tensors]
    flow.log_prob(x, context).sum().backward()
    flow.sample(3, context)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None
        assert not tensor.requires_grad


def test_a_field_that_writes_does_not_reach_the_callers_x() -> None:
    x = torch.ones(5, 2)
    with pytest.raises(RuntimeError, match="in-place"):
        cnf.CNF(lambda t, x: x.mul_(2.0)).forward(x)
    assert torch.equal(x, torch.ones(5, 2))


@each_solver
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("asked", [False, True], ids=["constant-x", "x-with-grad"])
def test_gradients_go_where_they_are_asked(solver: cnf.Solver, frozen: bool, asked: bool) -> None:
    flow = small(divergence="exact", solver=solver).requires_grad_(not frozen)
    x = torch.randn(5, 2, requires_grad=asked)
    log_prob = flow.log_prob(x)
    assert log_prob.requires_grad == (asked or not frozen)
    if log_prob.requires_grad:
        log_prob.sum().backward()
    assert (x.grad is not None) == asked
    for parameter in flow.parameters():
        assert (parameter.grad is not None) == (not frozen)


@pytest.mark.parametrize("made_in", ["normal", "inference"])
@each_divergence
def test_no_grad_and_inference_mode_give_the_same_value(divergence: str, made_in: str) -> None:
    with torch.inference_mode(made_in == "inference"):
        flow, x, context = small(divergence=divergence, context=2), torch.randn(5, 2), torch.ones(2)
    kept = flow.log_prob(x, context, generator=seeded())
    with torch.no_grad():
        assert torch.equal(kept, flow.log_prob(x, context, generator=seeded()))
    with torch.inference_mode():
        assert torch.allclose(kept, flow.log_prob(x, context, generator=seeded()), atol=1e-6)
        z, log_prob = flow.sample_and_log_prob(5, context)
    assert flow.log_prob(z, context).isfinite().all()
    assert log_prob.isfinite().all()


@each_solver
def test_autocast_leaves_the_state_in_float32(solver: cnf.Solver) -> None:
    flow, x = small(divergence="exact", solver=solver), torch.randn(64, 2)
    seen: list[torch.dtype] = []
    flow.transform.field.register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    expected = pytest.warns(RuntimeWarning, match="autocast to torch.bfloat16 resolves 0.008")
    with torch.autocast("cpu", torch.bfloat16), expected if solver.adaptive else nullcontext():
        log_prob = flow.log_prob(x)
        samples = flow.sample(3)
    assert set(seen) == {torch.float32}
    assert log_prob.dtype == samples.dtype == torch.float32
    assert torch.allclose(log_prob, flow.log_prob(x), atol=0.05)
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("features", [3072, (3, 32, 32)], ids=str)
def test_the_exact_trace_runs_in_three_thousand_dimensions(features) -> None:
    class Rates(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            k = torch.arange(3072).remainder(7).to(x).reshape(x.shape[1:])
            return 0.1 * k * x

    size = (features,) if isinstance(features, int) else features
    transform = cnf.CNF(Rates(), "exact", cnf.Solver("euler", steps=1), event_dims=len(size))
    with pytest.warns(RuntimeWarning, match="takes 3072 products with the Jacobian"):
        _, log_det = transform.forward_and_log_det(torch.ones(2, *size))
    truth = 0.1 * torch.arange(3072).remainder(7).sum().item()
    assert log_det.tolist() == pytest.approx([truth, truth], rel=1e-5)


NO_VALUES = {
    "sparse": (torch.eye(2).to_sparse(), r"is a sparse tensor .*\.to_dense\(\)"),
    "meta": (torch.zeros(2, 2, device="meta"), "is on (the )?meta.*cpu"),
}


@pytest.mark.parametrize("kind", NO_VALUES)
def test_tensors_without_values_are_refused(kind) -> None:
    x, message = NO_VALUES[kind]
    good = torch.zeros(2, 2)
    flow = cnf.RealNVP(2, layers=2, hidden=(4,), context=2)
    calls = {
        "log_prob": lambda: flow.log_prob(x, good),
        "context": lambda: flow.log_prob(good, x),
        "continuous": lambda: small().log_prob(x),
        "fit": lambda: fit(cnf.MaximumLikelihood(small()), x, steps=1, batch_size=2),
        "check": lambda: cnf.check(small(), x),
        "odeint": lambda: cnf.odeint(lambda t, x: -x, x, 0.0, 1.0),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            pytest.fail(f"{name}: {call()}")


def test_a_flow_on_the_meta_device_says_how_to_fill_it() -> None:
    with pytest.raises(ValueError, match=r"parameters are on the meta .*to_empty\(device='cpu'\)"):
        small().to("meta").log_prob(torch.zeros(2, 2))
