"""Solves inside a program that is compiled as a whole: the same numbers as outside of it.

Inductor (torch 2.13) computes `torch.add(x, a @ b, alpha=h)` with the h of its first call.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import cnf

pytestmark = pytest.mark.filterwarnings("ignore")  # what the compiler says is its own affair


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def rotated(x: Tensor, steps: int) -> Tensor:
    """A solve of a matrix product, whose steps change from call to call."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    solver = cnf.Solver("rk4", steps=steps)
    return 2 * cnf.odeint(lambda t, x: x @ turn, x, 0.0, 1.0, solver).x


def test_a_solve_of_other_steps_is_not_that_of_the_first() -> None:
    x, compiled = torch.randn(4, 2), torch.compile(rotated)
    for steps in (1, 2, 5):
        assert torch.equal(compiled(x, steps), rotated(x, steps))


SOLVERS = {
    "dopri5": cnf.Solver(),
    "rk4": cnf.Solver("rk4", steps=3),
    "checkpoint": cnf.Solver(gradient="checkpoint"),
    "adjoint": cnf.Solver(gradient="adjoint"),
    "independent": cnf.Solver(batch="independent"),
    "torchdiffeq": cnf.TorchDiffEq(),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_training_and_sampling_are_those_of_eager_mode(solver) -> None:
    flow, x = cnf.FFJORD(2, hidden=(8,), solver=solver), torch.randn(8, 2)
    module = torch.compile(flow, backend="aot_eager")
    sample = torch.compile(flow.sample, backend="aot_eager")
    for batch in (x, x[:5], x):
        found = []
        for log_prob in (flow, module):
            flow.zero_grad()
            value = log_prob(batch)
            value.sum().backward()
            found.append([value.detach(), *(p.grad.clone() for p in flow.parameters())])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    for _ in range(2):
        drawn = [f((6,), generator=torch.Generator().manual_seed(0)) for f in (flow.sample, sample)]
        assert torch.equal(*drawn)


def test_everything_that_a_solve_returns_comes_out_of_the_program() -> None:
    flow, x = cnf.FFJORD(2, hidden=(8,)), torch.randn(8, 2)
    penalties = [cnf.KineticEnergy(0.1)]

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        noise = torch.Generator().manual_seed(0)
        probes = cnf.Hutchinson(probes=3)
        return (
            *flow.log_prob(x, divergence=probes, generator=noise, return_stderr=True),
            *flow.log_prob_and_integrals(x, regularizers=penalties),
            flow.trajectory(x, [0.0, 0.3, 1.0]),
            flow.score(x),
        )

    expected = everything(x)
    compiled = torch.compile(everything, backend="aot_eager")
    for found in (compiled(x), compiled(x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_steps_stay_compiled_inside_a_compiled_program() -> None:
    flow, x = cnf.FFJORD(2, hidden=(8,), solver=cnf.Solver("euler", steps=2)), torch.randn(8, 2)
    steps = dataclasses.replace(flow.transform.solver, compile=True)
    module = torch.compile(flow, backend="eager")
    counters.clear()
    module(x, solver=steps)
    assert counters["inductor"], "no step was compiled"
    torch.testing.assert_close(module(x, solver=steps), flow(x), rtol=1e-5, atol=1e-5)


def test_one_graph_is_refused_with_the_remedy() -> None:
    says_why = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
    with pytest.raises(RuntimeError, match=r"Solver\(compile=True\)" if says_why else "disable"):
        torch.compile(cnf.FFJORD(2, hidden=(8,)), fullgraph=True)(torch.randn(8, 2))
