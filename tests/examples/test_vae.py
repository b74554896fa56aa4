"""The comparison of posteriors, at a small size."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import cnf

SMALL = [
    *("--steps", 4, "--warm-up", 2, "--validate-every", 2, "--batch-size", 20, "--device", "cpu"),
    *("--hidden", 8, "--latent", 2, "--samples", 3, "--test-size", 20),
]
KINDS = ["gaussian", "planar", "radial", "sylvester", "iaf", "coupling", "ffjord"]


def test_every_posterior_is_compared_and_drawn(tmp_path, run_here):
    out = tmp_path / "run"
    text = run_here("vae.py", *SMALL, "--posterior", *KINDS, "--out", out)
    assert (out / "report.txt").read_text() in text
    rows = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in rows] == KINDS
    plain = torch.load(out / "gaussian" / "bounds.pt", weights_only=True)
    assert plain.shape == (2, 20)
    for row in rows:
        own = torch.load(out / row["model"] / "bounds.pt", weights_only=True)
        assert row["elbo"] == pytest.approx(-own[0].mean().item())
        assert row["bound"] == pytest.approx(-own[1].mean().item())
        assert 30 < row["bound"] < 60
        assert f"{row['elbo']:.2f} +- {row['elbo_error']:.2f}" in text
        assert row["steps"] == 4
        assert (row["elbo_gain"] is None) == (row["model"] == "gaussian")
    gain = own[1] - plain[1]
    assert rows[-1]["bound_gain"] == pytest.approx(gain.mean().item())
    assert rows[-1]["bound_gain_error"] == pytest.approx(gain.std().item() / 20**0.5)
    for name in ("reconstructions", "samples", "training"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 300
    log = [json.loads(line) for line in (out / "iaf" / "log.jsonl").read_text().splitlines()]
    assert any("val_loss" in record for record in log)


def test_a_comparison_that_was_cut_goes_on_with_what_is_missing(tmp_path, run_here):
    out = tmp_path / "run"
    run_here("vae.py", *SMALL, "--posterior", "gaussian", "--out", out)
    first = json.loads((out / "results.json").read_text())
    assert "--resume" in run_here(
        "vae.py", *SMALL, "--posterior", "iaf", "gaussian", "--out", out, code=1
    )
    run_here("vae.py", *SMALL, "--posterior", "iaf", "--out", out, "--resume")
    again = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in again] == ["gaussian", "iaf"]
    assert again[0] == first[0]
    assert again[1]["elbo_gain"] is not None
    longer = [*SMALL, "--steps", 6, "--posterior", "iaf", "--out", out, "--resume"]
    run_here("vae.py", *longer)
    assert json.loads((out / "results.json").read_text())[1]["steps"] == 6


def test_posteriors_begin_with_the_same_autoencoder_and_see_the_same_noise(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*SMALL, "--lr", 1e-12, "--posterior", "gaussian", "iaf", "coupling"]
    run_here("vae.py", *flags, "--out", out)
    rows = json.loads((out / "results.json").read_text())
    assert rows[1]["bound"] == pytest.approx(rows[0]["bound"], abs=1e-4)
    assert rows[2]["elbo"] == pytest.approx(rows[0]["elbo"], abs=1e-4)


def test_a_posterior_that_fails_is_told_and_the_others_go_on(tmp_path, run_here, monkeypatch):
    def forward_and_log_det(*_, **__):
        raise cnf.TrainingError("the loss is not finite")

    monkeypatch.setattr(cnf.CNF, "forward_and_log_det", forward_and_log_det)
    out = tmp_path / "run"
    text = run_here("vae.py", *SMALL, "--posterior", "ffjord", "gaussian", "--out", out, code=1)
    assert "ffjord failed: the loss is not finite" in text
    assert [row["model"] for row in json.loads((out / "results.json").read_text())] == ["gaussian"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--posterior", "iaf", "--rtol", "1e-3"], ["--rtol has no effect on iaf", "ffjord"]),
        (["--posterior", "gaussian", "--layers", "2"], ["--layers has no effect on gaussian"]),
        (["--test-size", "1"], ["--test-size=1"]),
        (["--warm-up", "0"], ["--warm-up=0 must be 1 or more"]),
        (["--samples", "0"], ["--samples=0 must be 1 or more"]),
        (["--data", "mnist"], ["--data=mnist needs --data-dir"]),
        (["--data-dir", "here"], ["needs no --data-dir"]),
    ],
)
def test_what_is_refused(tmp_path, run_here, arguments, words):
    told = run_here("vae.py", *arguments, "--out", tmp_path / "run", code=1)
    assert all(word in told for word in words)
