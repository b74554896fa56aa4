"""bench/trace_cost.py at a tiny size, and a closed form that is wrong on purpose."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnf

BENCH = Path(__file__).parents[2] / "bench"
TINY = "--threads 1 --dims 2 6 --width 8 --batch 4 --shapes 1x3x3:4 --image-batch 2"
HEADS = ["ratio", "closed"]
WAYS = ["exact, closed form", "Hutchinson, 1 probe (closed form)", "Hutchinson, 1 probe (vjp)"]
WAYS += ["Hutch++", "exact, in chunks", "exact, one by one"]


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "trace_cost.py", *TINY.split(), "--steps", 1, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture
def trace(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_trace")


def make_case(trace, field: cnf.MLPField, dims: int, batch: int = 4):
    x = torch.randn(batch, dims)
    return trace.Case(f"MLP {dims}-D", field, x, cnf.Solver("rk4", steps=1))


def test_every_way_has_its_row(tmp_path):
    picture = tmp_path / "cost.png"
    done = run("--rounds", 2, "--limit", 2, "--plot", picture)
    assert done.stderr == ""
    assert picture.stat().st_size > 0
    _, *blocks, end = done.stdout.split("\n\n")
    titles = [block.splitlines()[0] for block in blocks]
    names = ["MLP 2-D, width 8, batch 4", "MLP 6-D, width 8, batch 4"]
    assert titles == [*names, "convolution 1x3x3, 4 channels, batch 2"]
    for block, title in zip(blocks, titles, strict=True):
        _, same, heads, *rows = block.splitlines()
        assert same.startswith("all exact traces are the same")
        assert heads.split() == ["log", "p", "ms", *HEADS, "step", "ms", *HEADS]
        cells = {row[:34].strip(): row[34:].split() for row in rows}
        assert list(cells) == WAYS
        assert all(len(row) == 6 for row in cells.values())
        assert cells[WAYS[2]][1] == cells[WAYS[2]][4] == "1.00"
        for way in WAYS:
            guessed = "exact" in way and "closed" not in way and "2-D" not in title
            assert ("~" in cells[way][0]) == guessed
    for line, title in zip(end.splitlines()[1:], titles, strict=False):
        assert line.startswith(title)
        assert "(1.05)" in line or "(1.30)" in line


def test_a_shape_that_cannot_be_read_is_refused():
    done = run("--shapes", "28x28", check=False)
    assert done.returncode == 2
    assert "1x28x28:32" in done.stderr


def test_a_wrong_closed_form_is_refused(trace):
    class Wrong(cnf.MLPField):
        def with_divergence(self, *arguments):
            dx, div = super().with_divergence(*arguments)
            return dx, div * (1 + 1e-6)

    assert trace.verify(make_case(trace, cnf.MLPField(3, (8, 8)), 3)) < 1e-12
    with pytest.raises(SystemExit, match="in chunks computes something else than exact"):
        trace.verify(make_case(trace, Wrong(3, (8, 8)), 3))


def test_a_closed_form_of_a_wrong_gradient_is_refused(trace):
    class Detached(cnf.MLPField):
        def divergence_constants(self):
            return tuple(constant.detach() for constant in super().divergence_constants())

    with pytest.raises(SystemExit, match="computes something else"):
        trace.verify(make_case(trace, Detached(3, (8, 8)), 3))


def test_a_wrong_estimate_is_refused(trace):
    class Wrong(cnf.MLPField):
        def with_quadratic_form(self, *arguments):
            dx, form = super().with_quadratic_form(*arguments)
            return dx, form + 1e-6

    with pytest.raises(SystemExit, match=r"closed form\) computes something else"):
        trace.verify(make_case(trace, Wrong(3, (8, 8)), 3))


@pytest.mark.parametrize("chunk", [1, 2])
def test_all_the_first_products_are_the_trace(trace, chunk):
    case = make_case(trace, cnf.MLPField(4, (8, 8)), 4)
    exact = case.flow(cnf.Exact()).log_prob(case.x)
    some = case.flow(trace.FirstProducts(4, chunk)).log_prob(case.x)
    torch.testing.assert_close(some, exact)
    exact.mean().backward()
    truth = [p.grad.clone() for p in case.field.parameters()]
    case.field.zero_grad()
    some.mean().backward()
    torch.testing.assert_close([p.grad for p in case.field.parameters()], truth)


@pytest.mark.parametrize("training", [False, True])
def test_the_extrapolated_time_is_near_the_time(trace, training):
    case = make_case(trace, cnf.MLPField(48, (64, 64)), 48, batch=64)
    guess = trace.extrapolated(case, trace.ONE, training=training, repeat=9)
    (contestant,) = trace.contestants(case, [trace.ONE], training=training)
    seconds = min(trace._seconds(contestant, case.x) for _ in range(3))
    assert 0.2 < guess / seconds < 5
