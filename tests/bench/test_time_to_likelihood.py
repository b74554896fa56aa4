"""bench/time_to_likelihood.py at a tiny size; when a curve reaches its goal."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cnf
from cnf.data import toy

BENCH = Path(__file__).parents[2] / "bench"
TINY = "--seconds 0.4 --hidden 8 8 --batch 16 --test-size 50".split()  # noqa: SIM905


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("time_to_likelihood")
    sys.modules.pop("time_to_likelihood", None)


def test_every_method_has_a_curve(tmp_path):
    data = str(tmp_path / "rows.csv")
    np.savetxt(data, np.random.default_rng(0).normal(size=(300, 3)), delimiter=",")
    out, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    command = [sys.executable, BENCH / "time_to_likelihood.py", "--data", data, *TINY]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "--plot", str(plot)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads(out.read_text())
    assert list(curves) == ["likelihood", "flow matching", "OT flow matching", "both"]
    for name, curve in curves.items():
        assert name in done.stdout
        assert all(math.isfinite(row["log_prob"]) for row in curve)
        assert curve[-1]["seconds"] == pytest.approx(0.4)
        assert curve[-1]["steps"] > 0
    assert plot.stat().st_size > 0


def test_a_density_is_known_and_a_table_is_not(bench):
    batch, test, best = bench.load("8gaussians", 16, 500)
    assert batch().shape == (16, 2)
    assert best == pytest.approx(toy("8gaussians").log_prob(test.double()).mean().item())


def test_when_a_goal_is_reached(bench):
    curve = [{"seconds": s, "log_prob": v} for s, v in ((1.0, math.nan), (2.0, -3.0), (4.0, -2.0))]
    assert bench.reached(curve, -3.0) == 2.0
    assert bench.reached(curve, -2.5) == 4.0
    assert bench.reached(curve, -1.0) is None


def test_the_average_is_over_the_last_tenth_of_the_steps(bench):
    """Of weights 1, 2, ..., n it is about n times 10 / 11."""
    flow = cnf.FFJORD(2, (4,))
    run = bench.Trainer(cnf.FlowMatching(flow), lambda: torch.randn(4, 2), 0.0)
    weight = next(flow.parameters())
    for n in range(1, 201):
        with torch.no_grad():
            weight.fill_(float(n))
        run.step()
    mean = next(run.average.parameters())
    assert mean.mean().item() == pytest.approx(200 * 10 / 11, rel=0.06)
