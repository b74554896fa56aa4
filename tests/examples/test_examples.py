"""The example scripts, run as a user runs them, at a small size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnf.training import load_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--hidden", "8", "--batch-size", "50", "--device", "cpu"]


NETWORKS = ["realnvp", "nice", "maf", "iaf", "nsf", "nsf-ar", "hint"]
FORMULAS = ["planar", "radial", "sylvester"]
TINY = ["--batch-size", "50", "--device", "cpu", "--steps", "3", "--layers", "2"]


def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *SMALL, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0 or not check, done.stderr
    return done


def likelihood(report: str) -> float:
    return float(re.search(r"test log-likelihood +(\S+) \+-", report)[1])


def test_density2d_trains_reports_and_draws(tmp_path):
    out = tmp_path / "run"
    done = run("density2d.py", "--steps", 4, "--test-size", 100, "--out", out)
    assert -8 < likelihood(done.stdout) < -2.8
    assert done.stdout.strip().startswith((out / "report.txt").read_text().strip())
    names = {"flow.png", "path.png", "path.gif", "best.safetensors", "last.safetensors"}
    assert names | {"log.jsonl", "report.txt"} <= {p.name for p in out.iterdir()}
    again = run("density2d.py", "--steps", 4, "--out", out, check=False)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.filterwarnings("ignore:hidden=")  # narrow networks are quick
@pytest.mark.parametrize("model", NETWORKS + FORMULAS)
def test_a_discrete_model_is_a_flag(tmp_path, run_here, model):
    hidden = ["--hidden", 8] if model in NETWORKS else []
    flags = [*TINY, *hidden, "--model", model]
    plane = run_here("density2d.py", *flags, "--test-size", 100, "--out", tmp_path / "plane")
    assert -8 < likelihood(plane) < -2.8
    assert "evaluations" not in plane
    assert {"flow.png", "path.png", "path.gif"} <= {p.name for p in (tmp_path / "plane").iterdir()}
    table = run_here("table.py", *flags, "--out", tmp_path / "table")
    assert -100 < likelihood(table) < 0
    assert (tmp_path / "table" / "table.png").exists()


@pytest.mark.parametrize(
    ("arguments", "flag", "takers"),
    [
        (["--model", "maf", "--rtol", "1e-3"], "--rtol", "ffjord"),  # even at its default
        (["--model", "nsf", "--solver-s", "3"], "--solver-steps", "ffjord"),  # an abbreviation
        (["--model", "hint", "--compile"], "--compile", "ffjord"),
        (["--model", "planar", "--hidden", "8"], "--hidden", "realnvp"),
        (["--layers", "3"], "--layers", "planar"),
    ],
)
@pytest.mark.parametrize("script", ["density2d.py", "table.py"])
def test_a_flag_without_effect_is_refused(tmp_path, run_here, script, arguments, flag, takers):
    told = run_here(script, *arguments, "--out", tmp_path / "run", code=1)
    assert f"{flag} has no effect on" in told
    assert takers in told.split("choose from")[1]
    assert not (tmp_path / "run").exists()


def test_a_model_has_its_own_defaults_and_a_flag_wins(tmp_path, run_here):
    for steps, flags in ((2, ["--steps", "2"]), (1, ["--steps", "1", "--lr", "0.5"])):
        out = tmp_path / str(steps)
        run_here("density2d.py", "--model", "sylvester", *flags, "--test-size", 50, "--out", out)
        config = load_checkpoint(out / "last.safetensors")["config"]
        assert config["steps"] == steps
        assert config["lr"] == (0.5 if "--lr" in flags else 3e-2)
        assert config["model"] == "sylvester"
        assert "rtol" not in config


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_table_runs_with_every_trace_and_gradient(tmp_path, trace, gradient):
    out = tmp_path / "run"
    done = run(
        "table.py", "--steps", 3, "--trace", trace, "--gradient", gradient, "--out", out,
        "--method", "rk4", "--solver-steps", 3,
    )  # fmt: skip
    assert -100 < likelihood(done.stdout) < 0
    assert "Gaussian" in done.stdout
    assert (out / "table.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "8gausians"], ["8gaussians", "did you mean"]),
        (["--rtol", "-1"], ["rtol", "-1"]),
        (["--steps", "0"], ["steps"]),
    ],
    ids=["data", "rtol", "steps"],
)
def test_a_wrong_flag_is_told_without_a_traceback(tmp_path, arguments, words):
    done = run("density2d.py", "--out", tmp_path / "run", *arguments, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    flags = ["--trace", "hutchinson", "--steps", 60, "--test-size", 50]
    run("density2d.py", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "cut"
    command = [sys.executable, EXAMPLES / "density2d.py", *SMALL, *flags, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):  # it logs every ten steps
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"--resume" in stdout
    assert load_checkpoint(out / "last.safetensors")["progress"]["step"] < 60
    run("density2d.py", *flags, "--out", out, "--resume")
    whole, cut = (load_checkpoint(tmp_path / d / "last.safetensors") for d in ("whole", "cut"))
    for section in ("model", "ema"):
        for name, value in whole[section].items():
            assert value.equal(cut[section][name]), name


def test_a_table_of_dependent_columns_is_refused_before_training(tmp_path):
    file = tmp_path / "table.csv"
    rows = [f"{i % 7},{i * i % 11},{2 * (i % 7)}" for i in range(60)]
    file.write_text("a,b,c\n" + "\n".join(rows))
    done = run("table.py", "--data", file, "--steps", 10**6, "--out", tmp_path / "run", check=False)
    assert done.returncode == 1
    assert "linear combination" in done.stderr


def test_an_unusable_device_is_told_without_a_traceback(tmp_path):
    done = run("density2d.py", "--device", "gpu", "--out", tmp_path / "run", check=False)
    assert done.returncode == 1
    assert "--device=gpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_single_step_is_a_run_too(tmp_path):
    done = run("table.py", "--steps", 1, "--out", tmp_path / "run")
    assert "1 steps" in done.stdout


def test_traces_are_compared_on_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    done = run("trace.py", "--steps", 3, "--hidden", 8, 8, "--out", out)
    assert "(exact trace)" in done.stdout
    assert "exact, closed form" in done.stdout
    assert "USDT" not in done.stderr
    assert (out / "trace.png").stat().st_size > 0
