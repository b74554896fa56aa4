"""cnf in each of its modes."""

from __future__ import annotations

import copy

import torch
from _peer import Contestant, Peer
from _problem import Problem
from torch import Tensor

import cnf
from cnf.ode import SolveStats


class CNFPeer(Peer):
    """A flow of cnf, with the evaluations that it reports itself."""

    def __init__(self, problem: Problem, gradient: str, *, compiled: bool, name: str) -> None:
        self.flow = make_flow(problem, gradient, compiled=compiled)
        self.solves: list[SolveStats] = []
        super().__init__(
            name,
            self._solve,
            self._transport,
            lambda: sum(solve.nfe for solve in self.solves),
            list(self.flow.parameters()),
            eager=not compiled,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """By the flow's own method, with all its checks."""
        with cnf.record_solves() as self.solves:
            return self.flow.log_prob(x)

    def _solve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with cnf.record_solves() as self.solves:
            return self.flow.transform.inverse_and_log_det(x)

    def _transport(self, z: Tensor) -> Tensor:
        with cnf.record_solves() as self.solves:
            return self.flow.transform.forward(z)


def make_flow(problem: Problem, gradient: str, *, compiled: bool) -> cnf.Flow:
    """The problem's network as a flow, with a copy of the weights."""
    solver = cnf.Solver(
        problem.method,
        rtol=problem.tol,
        atol=problem.tol,
        steps=problem.steps,
        max_steps=100_000,
        gradient=gradient,  # type: ignore[arg-type]
        compile=compiled,
    )
    transform = cnf.CNF(copy.deepcopy(problem.field), problem.trace, solver)
    return cnf.Flow(cnf.StandardNormal(problem.dims), transform)


def peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    """Each gradient mode, eager and compiled; one of each without gradients."""
    made: list[Peer] = []
    for compiled in (False, True):
        for gradient in ("backprop", "checkpoint", "adjoint") if gradients else ("backprop",):
            name = "cnf" + f" {gradient}" * gradients + " compiled" * compiled
            made.append(CNFPeer(problem, gradient, compiled=compiled, name=name))
    return made


def sampling(problem: Problem, number: int) -> list[Contestant]:
    """`flow.sample`, and `sample_and_log_prob` to show what the trace would cost."""
    made = []
    for compiled in (False, True):
        flow, suffix = make_flow(problem, "backprop", compiled=compiled), " compiled" * compiled
        made.append(_draw(f"cnf sample{suffix}", flow, number, trace=False, compiled=compiled))
        name = f"cnf sample_and_log_prob{suffix}"
        made.append(_draw(name, flow, number, trace=True, compiled=compiled))
    return made


def _draw(name: str, flow: cnf.Flow, number: int, *, trace: bool, compiled: bool) -> Contestant:
    def run() -> Tensor:
        with cnf.record_solves() as solves:
            if trace:
                x = flow.sample_and_log_prob((number,))[0]
            else:
                x = flow.sample((number,))
        contestant.nfe = (sum(solve.nfe for solve in solves), None)
        return x

    def check() -> tuple[Tensor, None]:
        torch.manual_seed(0)
        return run(), None

    contestant = Contestant(name, run, check, forward=None if compiled else run)
    return contestant
