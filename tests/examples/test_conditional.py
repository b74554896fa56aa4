"""Posteriors from simulations, at a small size."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import cnf

SMALL = ["--steps", "3", "--batch-size", "50", "--hidden", "8", "--device", "cpu"]
SMALL += ["--test-size", "40", "--calibration-size", "20", "--observations", "1"]
SMALL += ["--c2st-samples", "20"]
NAMES = ("linear-gaussian", "two-moons")


def test_both_problems_are_learned_both_ways_judged_and_drawn(tmp_path, run_here):
    out = tmp_path / "run"
    text = run_here("conditional.py", *SMALL, "--out", out)
    assert (out / "report.txt").read_text() in text
    rows = json.loads((out / "results.json").read_text())
    expected = [(problem, o) for problem in NAMES for o in ("likelihood", "flow-matching")]
    assert [(row["problem"], row["objective"]) for row in rows] == expected
    for row in rows:
        assert f"{row['log_prob']:.3f} +- {row['log_prob_error']:.3f}" in text
        assert row["steps"] == 3
        assert row["kl"] > 0.2  # nothing is learned in three steps
        assert 0 <= min(row["p_parameters"], row["p_density"]) <= 1
        assert (row["c2st"] is not None) == (row["problem"] == "two-moons")
        assert row["training_seconds"] > 0
    for problem, panels in zip(NAMES, (6, 4), strict=True):
        with Image.open(out / problem / "calibration.png") as image:
            assert image.width / image.height == pytest.approx(panels / 2, rel=0.05)
        with Image.open(out / problem / "posterior.png") as image:
            assert image.width < 1.1 * image.height
        assert (out / problem / "training.png").stat().st_size > 0


def test_a_run_that_was_cut_goes_on_with_what_is_missing(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*SMALL, "--problem", "linear-gaussian", "--out", out]
    run_here("conditional.py", *flags, "--objective", "likelihood")
    first = json.loads((out / "results.json").read_text())
    weights = (out / "linear-gaussian" / "likelihood" / "best.safetensors").read_bytes()
    run_here("conditional.py", *flags, "--resume")
    again = json.loads((out / "results.json").read_text())
    assert [row["objective"] for row in again] == ["likelihood", "flow-matching"]
    for name in ("log_prob", "kl", "steps"):
        assert again[0][name] == first[0][name], name
    assert (out / "linear-gaussian" / "likelihood" / "best.safetensors").read_bytes() == weights
    assert "--resume" in run_here("conditional.py", *flags, code=1)


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, run_here, monkeypatch):
    def forward(*_, **__):
        raise cnf.TrainingError("the loss is not finite")

    monkeypatch.setattr(cnf.MaximumLikelihood, "forward", forward)
    out = tmp_path / "run"
    flags = [*SMALL, "--problem", "linear-gaussian", "--out", out]
    text = run_here("conditional.py", *flags, code=1)
    assert "linear-gaussian/likelihood failed: the loss is not finite" in text
    rows = json.loads((out / "results.json").read_text())
    assert [row["objective"] for row in rows] == ["flow-matching"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--test-size", "1"], ["--test-size=1"]),
        (["--calibration-size", "0"], ["--calibration-size=0"]),
        (["--observations", "0"], ["--observations=0"]),
        (["--c2st-samples", "9"], ["--c2st-samples=9"]),
        (["--hidden", "0"], ["hidden", "0"]),
        (["--time-sampling", "uniform", "--objective", "likelihood"], ["--time-sampling"]),
        (["--objective", "flow-matching", "--blocks", "2"], ["one CNF", "blocks=1"]),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_trained(tmp_path, run_here, arguments, words):
    told = run_here("conditional.py", "--out", tmp_path / "run", *arguments, code=1)
    assert all(word in told for word in words), told
    assert not (tmp_path / "run").exists()
