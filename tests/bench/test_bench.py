"""The bench scripts, run as a user runs them, at a tiny size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
FLOOR = "bare matrix products"
TORCH = f"cnf,torchdiffeq,zuko,torchdyn,torchode,{FLOOR}"
TINY = ["--batch", 8, "--width", 8, "--rounds", 1, "--threads", 1]


def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / script, *TINY, *arguments]
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


def tables(output: str) -> dict[str, dict[str, list[str]]]:
    """The cells by row by title; a row's name is the first 32 characters of its line."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in output.split("\n\n")[1:]:
        title, *lines = block.splitlines()
        rows = [line for line in lines[2:] if len(line) >= 32 + 6 * 10]
        found[title] = {line[:32].strip(): line[32:].split() for line in rows}
    return found


def test_training_step_times_every_mode(tmp_path):
    picture = tmp_path / "bars.png"
    done = run(
        "training_step.py", "--size", "all", "--steps", 2, "--tol", 1e-3, "--memory",
        "--only", TORCH, "--no-compile", "--plot", picture,
    )  # fmt: skip
    found = tables(done.stdout)
    assert len(found) == 4
    assert picture.stat().st_size > 0
    modes = {"cnf backprop", "cnf checkpoint", "cnf adjoint"}
    modes |= {"torchdiffeq adjoint", "torchdiffeq backprop"}
    for title, rows in found.items():
        assert modes | {FLOOR} <= rows.keys()
        assert rows["torchdiffeq adjoint"][1] == "1.00"
        assert rows[FLOOR][2] == "1.00"
        for mode in modes:
            _, _, _, forward, backward, operations, memory = rows[mode]
            assert forward == "8" or "rk4" not in title
            assert (backward == "0") == mode.endswith("backprop")
            assert 10 < float(operations) < 1000
            assert float(memory) >= 0
    assert done.stdout.count("all compute the same") == 4


def test_log_prob_times_evaluation_and_sampling(tmp_path):
    picture = tmp_path / "bars.png"
    done = run(
        "log_prob.py", "--steps", 2, "--tol", 1e-3, "--samples", 16,
        "--only", TORCH, "--no-compile", "--plot", picture,
    )  # fmt: skip
    found = tables(done.stdout)
    assert picture.stat().st_size > 0
    words = ["exact", "hutchinson", "sampling"] * 2
    assert all(word in title for word, title in zip(words, found, strict=True))
    for title, rows in found.items():
        ours = {"cnf sample", "cnf sample_and_log_prob"} if "sampling" in title else {"cnf"}
        assert ours | {"torchdiffeq", FLOOR} <= rows.keys()


def test_work_precision_falls_with_the_steps(tmp_path):
    picture = tmp_path / "curves.png"
    done = run("work_precision.py", "--steps", 2, 8, "--tols", 1e-2, 1e-6, "--plot", picture)
    assert picture.stat().st_size > 0
    errors: dict[str, list[float]] = {}
    for line in done.stdout.splitlines()[2:-1]:
        library, method, *_, log_prob_error = line.split()
        errors.setdefault(f"{library} {method}", []).append(float(log_prob_error))
    assert len(errors) == 12
    ours = [pair for name, pair in errors.items() if name.startswith("cnf")]
    assert all(coarse > fine for coarse, fine in ours)


def test_an_unknown_name_is_refused_with_those_there_are():
    done = run("training_step.py", "--method", "rk4", "--only", "nobody", check=False)
    assert done.returncode == 1
    assert "'cnf backprop'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_contestant_that_computes_something_else_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from _measure import Disagreement, check
    from _peer import Contestant

    def contestant(name: str, value: float, slope: float) -> Contestant:
        return Contestant(
            name, lambda: None, lambda: (torch.tensor(value), torch.tensor([slope, 1.0]))
        )

    reference = contestant("reference", 1.0, 2.0)
    check([reference, contestant("close", 1.0005, 2.001)], reference, 1e-5)
    for value, slope in [(1.002, 2.0), (1.0, 2.2), (float("nan"), 2.0)]:
        with pytest.raises(Disagreement, match="wrong computes something else than reference"):
            check([contestant("wrong", value, slope)], reference, 1e-5)
