"""The example of reverse KL, at a small size."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

import cnf
from cnf.data import potential
from cnf.plotting import plot_energies

SMALL = ["--batch-size", "20", "--device", "cpu", "--test-size", "100", "--threads", "1"]
FFJORD = ["--hidden", "4", "--rtol", "1e-1", "--atol", "1e-1"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:the effective sample size:RuntimeWarning",
    "ignore:the largest of .* weights have a Pareto shape:RuntimeWarning",
)


def test_every_flow_is_fitted_to_a_target_and_drawn(tmp_path, run_here):
    out = tmp_path / "run"
    models = ["planar-2", "realnvp", "ffjord"]
    flags = [*SMALL, *FFJORD, "--steps", 4, "--models", *models, "--out", out]
    text = run_here("posterior2d.py", *flags, "--potential", 2, 1)
    assert (out / "report.txt").read_text() in text
    rows = json.loads((out / "results.json").read_text())
    assert [(row["potential"], row["model"]) for row in rows] == [
        (number, model) for number in (1, 2) for model in models
    ]
    for row in rows:
        truth = potential(row["potential"]).log_normalizer
        assert row["gap"] == pytest.approx(row["free_energy"] + truth)
        assert row["gap"] > -3 * row["free_energy_error"]
        assert f"{row['free_energy']:.4f} +- {row['free_energy_error']:.4f}" in text
        assert 0 < row["effective"] <= 1
        assert row["steps"] == 4
        assert row["training_seconds"] > 0
    with Image.open(out / "posterior2d.png") as image:
        assert image.width > 1.6 * image.height  # four panels in a row, two rows


def test_a_run_that_was_cut_goes_on_with_what_is_missing(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*SMALL, "--steps", 4, "--out", out, "--models", "planar-2"]
    run_here("posterior2d.py", *flags, "--potential", 3)
    first = json.loads((out / "results.json").read_text())
    weights = (out / "potential3" / "planar-2" / "best.safetensors").read_bytes()
    text = run_here("posterior2d.py", *flags, "--potential", 3, 4, "--resume")
    again = json.loads((out / "results.json").read_text())
    assert [row["potential"] for row in again] == [3, 4]
    for name in ("free_energy", "log_z", "steps", "training_seconds"):
        assert again[0][name] == first[0][name], name
    assert (out / "potential3" / "planar-2" / "best.safetensors").read_bytes() == weights
    assert text.count("planar-2  ") == 2
    longer = run_here(
        "posterior2d.py", *SMALL, "--steps", 6, "--out", out, "--models", "planar-2",
        "--potential", 4, "--resume",
    )  # fmt: skip
    assert [row["steps"] for row in json.loads((out / "results.json").read_text())] == [4, 6]
    assert "potential 3" in longer  # what is known is told again
    assert "--resume" in run_here("posterior2d.py", *flags, "--potential", 3, code=1)


def test_a_flow_that_fails_is_told_and_the_others_go_on(tmp_path, run_here, monkeypatch):
    def fail(*_, **__):
        raise cnf.TrainingError("no step is small enough")

    monkeypatch.setattr(cnf.CNF, "forward_and_log_det", fail)
    out = tmp_path / "run"
    flags = [*SMALL, *FFJORD, "--steps", 2, "--out", out, "--potential", 1]
    text = run_here("posterior2d.py", *flags, "--models", "ffjord", "planar-2", code=1)
    assert "potential 1, ffjord failed: no step is small enough" in text
    rows = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in rows] == ["planar-2"]


@pytest.mark.usefixtures("run_here")  # finds what the script imports
@pytest.mark.parametrize("field", ["mlp", "concatsquash", "potential", "hollow"])
def test_what_a_field_makes_of_x_is_sharper_at_the_start(field):
    path = Path(__file__).parents[2] / "examples" / "posterior2d.py"
    script = runpy.run_path(str(path), run_name="posterior2d")
    flags = ["--field", field, "--hidden", "8", "8", "--blocks", "2"]
    args = script["with_defaults"](script["posterior_flags"]().parse_args(flags), "ffjord")
    states = []
    for build in (script["ffjord"], script["sharp_ffjord"]):
        torch.manual_seed(0)
        states.append(build(args, 2).state_dict())
    usual, sharp = states
    changed = {name: sharp[name] for name in usual if not sharp[name].equal(usual[name])}
    assert sorted(name.rpartition(".")[2] for name in changed) == ["bias"] * 2 + ["weight"] * 2
    for name, value in changed.items():
        expected = usual[name].clone()
        expected[..., :2] *= script["SHARPNESS"] if name.endswith("weight") else 1.0
        expected *= script["SHARPNESS"] if name.endswith("bias") else 1.0
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "planar-2", "--hidden", "8"], ["--hidden has no effect on planar-2"]),
        (["--models", "realnvp", "--rtol", "1e-3"], ["--rtol", "ffjord"]),
        (["--test-size", "1"], ["--test-size=1"]),
        (["--annealing", "2"], ["--annealing=2.0", "0 to 1"]),
        (["--batch-size", "0", "--models", "planar-2"], ["samples=0"]),
    ],
)
def test_a_wrong_flag_is_told(tmp_path, run_here, arguments, words):
    told = run_here("posterior2d.py", "--out", tmp_path / "run", *arguments, code=1)
    assert all(word in told for word in words), told


def test_what_cannot_be_drawn_is_refused():
    for rows in ({}, {"target": {}}):
        with pytest.raises(ValueError, match="rows must have one target at least"):
            plot_energies(rows)
