"""The comparison of models, at a small size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import cnf

SMALL = ["--steps", "3", "--batch-size", "50", "--device", "cpu", "--hidden", "8", "--layers", "2"]


def test_a_density_is_compared_and_drawn(tmp_path, run_here):
    out = tmp_path / "run"
    models = ["ffjord", "realnvp", "planar"]
    flags = [*SMALL, "--test-size", 100, "--models", *models, "--out", out]
    text = run_here("compare.py", *flags)
    assert (out / "compare.txt").read_text() in text
    rows = json.loads((out / "compare.json").read_text())
    assert [row["model"] for row in rows] == models
    for row in rows:
        assert f"{row['log_prob']:.4f} +- {row['log_prob_error']:.4f}" in text
        assert -8 < row["log_prob"] < -2.8
        assert row["steps"] == 3
        assert min(row["training_seconds"], row["log_prob_ms"], row["sample_ms"]) > 0
    true = float(text.split("true density")[1].split()[0])
    assert rows[0]["gap"] == pytest.approx(true - rows[0]["log_prob"], abs=1e-4)
    with Image.open(out / "compare.png") as image:
        assert image.width > 3.5 * image.height  # four panels in a row


def test_a_table_is_compared_with_a_gaussian(tmp_path, run_here):
    file, out = tmp_path / "table.csv", tmp_path / "run"
    np.savetxt(file, np.random.default_rng(0).normal(size=(100, 3)), delimiter=",")
    flags = [*SMALL, "--models", "maf", "hint", "--data", file, "--out", out]
    text = run_here("compare.py", *flags, "--columns", 0, 2)
    gaussian = float(text.split("Gaussian")[2].split()[0])  # the second is its row
    rows = json.loads((out / "compare.json").read_text())
    assert rows[1]["gap"] == pytest.approx(rows[1]["log_prob"] - gaussian, abs=1e-4)
    assert (out / "compare.png").stat().st_size > 0
    told = run_here("compare.py", *flags, "--columns", 0, 3, code=1)
    assert "--columns=[0, 3]" in told


def test_a_comparison_that_was_cut_goes_on_with_what_is_missing(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*SMALL, "--test-size", 100, "--out", out, "--max-time", 0.5, "--steps", 10**6]
    run_here("compare.py", *flags, "--models", "nice")
    first = json.loads((out / "compare.json").read_text())
    weights = (out / "nice" / "best.safetensors").read_bytes()
    run_here("compare.py", *flags, "--models", "nice", "maf", "--resume")
    again = json.loads((out / "compare.json").read_text())
    assert [row["model"] for row in again] == ["nice", "maf"]
    for name in ("log_prob", "steps", "training_seconds"):
        assert again[0][name] == first[0][name], name
    assert (out / "nice" / "best.safetensors").read_bytes() == weights
    assert again[1]["stopped"] == "max_time"
    assert "--resume" in run_here("compare.py", *flags, "--models", "nice", code=1)


def test_a_model_that_fails_is_told_and_the_others_go_on(tmp_path, run_here, monkeypatch):
    def log_prob(*_, **__):
        raise cnf.TrainingError("the loss is not finite")

    monkeypatch.setattr(cnf.FFJORD, "log_prob", log_prob)
    out = tmp_path / "run"
    flags = [*SMALL, "--test-size", 100, "--out", out, "--models", "ffjord", "nice"]
    text = run_here("compare.py", *flags, code=1)
    assert "ffjord failed: the loss is not finite" in text
    assert [row["model"] for row in json.loads((out / "compare.json").read_text())] == ["nice"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "maf", "nsf", "--rtol", "1e-3"], ["--rtol has no effect on maf, nsf"]),
        (["--models", "planar", "--hidden", "8"], ["--hidden", "planar"]),
        (["--test-size", "1"], ["--test-size=1"]),
        (["--data", "8gausians"], ["8gaussians", "did you mean"]),
        (["--layers", "0"], ["layers", "0"]),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_trained(tmp_path, run_here, arguments, words):
    told = run_here("compare.py", "--out", tmp_path / "run", *arguments, code=1)
    assert all(word in told for word in words), told
    assert not (tmp_path / "run").exists()
