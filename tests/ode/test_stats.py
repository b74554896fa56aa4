"""`record_solves`: every solve in its block, in order, backward ones too, and no other."""

from __future__ import annotations

import contextvars
import dataclasses
import threading

import pytest
import torch

import cnf
from cnf.ode import Solver, odeint, record_solves

X = torch.ones(2, 1)


def solve(solver=None, t1=1.0, x=X):
    return odeint(lambda t, x: -x, x, 0.0, t1, solver)


def test_solves_are_recorded_in_order():
    with record_solves() as solves:
        first = solve(Solver("rk4", steps=3))
        second = solve(t1=-2.0)
    assert solves == [first.stats, second.stats]
    assert dataclasses.asdict(solves[0]) == {
        "kind": "forward", "method": "rk4", "t0": 0.0, "t1": 1.0,
        "nfe": 12, "accepted": 3, "rejected": 0, "status": "converged",
        "failed": 0, "next_step": 0.0,
    }  # fmt: skip
    assert (solves[1].method, solves[1].t1) == ("dopri5", -2.0)


def test_nothing_is_recorded_outside_the_block():
    solve()
    with record_solves() as solves:
        pass
    solve()
    assert solves == []


def test_blocks_nest():
    with record_solves() as outer:
        one = solve()
        with record_solves() as inner:
            two = solve()
        three = solve()
    assert outer == [one.stats, two.stats, three.stats]
    assert len(inner) == 1
    assert inner[0] is two.stats


def test_an_exception_closes_the_block():
    with pytest.raises(ZeroDivisionError), record_solves() as solves:
        1 / 0  # noqa: B018
    solve()
    assert solves == []


def test_a_failed_solve_is_recorded_with_its_cause():
    with record_solves() as solves, pytest.raises(cnf.SolverError):
        odeint(lambda t, x: x / 0, X, 0.0, 1.0)
    assert [s.status for s in solves] == ["non_finite_field"]
    assert solves[0].nfe >= 1


@pytest.mark.parametrize(
    ("gradient", "kinds"),
    [
        ("backprop", ["forward"]),
        ("checkpoint", ["forward", "backward"]),
        ("adjoint", ["forward", "backward"]),
    ],
)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_work_of_backward_belongs_to_the_block_of_forward(method, gradient, kinds):
    calls = []

    def f(t, x):
        calls.append(t)
        return -x

    x = X.clone().requires_grad_()
    with record_solves() as solves:
        end = odeint(f, x, 0.0, 1.0, Solver(method, steps=4, gradient=gradient))
    with record_solves() as other:
        end.x.sum().backward()
    assert other == []
    assert [s.kind for s in solves] == kinds
    assert sum(s.nfe for s in solves) == len(calls)
    for backward in solves[1:]:
        assert (backward.t0, backward.t1, backward.status) == (1.0, 0.0, "converged")
        stages = 4 if method == "rk4" else 6
        assert backward.nfe >= stages * backward.accepted > 0
    if gradient == "checkpoint":
        forward, backward = solves
        assert backward.accepted == forward.accepted
        assert backward.rejected == 0
        assert backward.nfe == (4 if method == "rk4" else 7) * backward.accepted


def test_every_solve_of_a_flow_is_seen():
    flow = cnf.FFJORD(2, (8,), blocks=3)
    with record_solves() as solves:
        flow.log_prob(torch.randn(4, 2))
        flow.sample((4,))
    assert [(s.t0, s.t1) for s in solves] == [(1.0, 0.0)] * 3 + [(0.0, 1.0)] * 3


def test_threads_keep_their_records_apart():
    ready, records = threading.Barrier(2), {}

    def work(steps):
        with record_solves() as solves:
            ready.wait(timeout=10)
            for _ in range(20):
                solve(Solver("rk4", steps=steps))
        records[steps] = [s.accepted for s in solves]

    with record_solves() as outer:
        threads = [threading.Thread(target=work, args=(steps,)) for steps in (2, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert records == {2: [2] * 20, 5: [5] * 20}
    assert outer == []  # another thread's solves are not this block's


def test_a_copy_of_the_context_carries_the_record_into_threads():
    with record_solves() as solves:
        works = [(contextvars.copy_context(), steps) for steps in (2, 5)]
        threads = [
            threading.Thread(target=context.run, args=(solve, Solver("rk4", steps=steps)))
            for context, steps in works
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(s.accepted for s in solves) == [2, 5]


def test_statistics_are_plain_values():
    stats = solve().stats
    assert all(type(value) in (str, int, float) for value in dataclasses.asdict(stats).values())
