"""The flows of images, at a small size."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from cnf.data import ImageData, image_data
from cnf.training import load_checkpoint

TINY = ["--steps", 3, "--batch-size", 20, "--device", "cpu", "--threads", 1, "--hidden", 4]
SHORT = ["--test-size", 10, "--draws", 2, "--validate-every", 2]


def rows_of(out):
    return {row["model"]: row for row in json.loads((out / "results.json").read_text())}


def test_models_are_trained_compared_and_drawn(tmp_path, run_here):
    out = tmp_path / "run"
    models = ["ffjord", "glow", "realnvp"]
    flags = [*TINY, *SHORT, "--layers", 2, "--blocks", 1, "--levels", 1, "--model", *models]
    text = run_here("images.py", *flags, "--out", out)
    assert (out / "report.txt").read_text() in text
    rows = rows_of(out)
    assert list(rows) == ["histogram", "Gaussian", *models]
    for name, row in rows.items():
        assert f"{row['bits']:.4f} +- {row['bits_error']:.4f}" in text
        assert 2 < row["bits"] < 4.5, name
        assert 0 < row["bits_error"] < 0.5
    for name in models:
        assert rows[name]["bound"] < rows[name]["bits"] + 0.1
        assert (rows[name]["steps"], rows[name]["stopped"]) == (3, "steps")
        log = (out / name / "log.jsonl").read_text().splitlines()
        losses = [record["val_loss"] for record in map(json.loads, log) if "val_loss" in record]
        assert rows[name]["bits"] == pytest.approx(losses[-1], abs=0.4)
    assert rows["ffjord"]["trace"] == "exact"
    assert rows["glow"]["trace"] == "none needed"
    for picture in ("samples", "interpolations", "training"):
        with Image.open(out / f"{picture}.png") as image:
            assert image.width > image.height


def test_the_baselines_are_what_they_say(run_here, tmp_path, monkeypatch):
    run_here("images.py", "--help")
    import images

    generator = torch.Generator().manual_seed(0)
    train, val, test = (
        (torch.rand(n, 1, 2, 2, generator=generator) ** 2 * 4).to(torch.uint8)
        for n in (4000, 10, 3000)
    )
    data = ImageData(train, val, test, 4, "squares")
    p = torch.tensor([(k + 1) ** 0.5 - k**0.5 for k in range(4)]).double() / 2
    entropy = -(p * p.log2()).sum().item()  # of each pixel, which are independent
    found = images.histogram(data, test)
    assert found.bits == pytest.approx(entropy, abs=4 * found.bits_error)
    y = (train.double().flatten(1) + 0.5) / 4
    variance = y.var(0) + 1 / (12 * 16)
    differential = (0.5 * (2 * math.pi * math.e * variance).log2()).mean().item()
    found = images.gaussian(data, test, 0)
    assert found.bits == pytest.approx(differential + 2, abs=4 * found.bits_error + 0.01)
    assert found.model == "Gaussian"
    few = ImageData(train[:3], val, test, 4, "few")
    assert images.gaussian(few, test, 0).model == "Gaussian, ridge"


def test_interpolations_go_from_image_to_image(run_here):
    run_here("images.py", "--help")
    import images

    data = image_data("digits")
    args = images.image_flags().parse_args(["--hidden", "4", "--blocks", "1", "--layers", "2"])
    for model in ("ffjord", "glow"):
        torch.manual_seed(0)
        flow = images.build(images.with_defaults(args, model), data)
        x = data.test[:6]
        flow.log_prob(x)  # sets what glow takes from data
        shown = images.interpolations(flow, x).unflatten(0, (3, images.STAGES))
        assert shown[:, 0].equal(x[:3])
        assert shown[:, -1].equal(x[3:])
        steps = (shown[:, 1:].float() - shown[:, :-1].float()).abs().flatten(2).mean(-1)
        whole = (x[3:].float() - x[:3].float()).abs().flatten(1).mean(-1)
        assert (steps.max(1).values < 0.5 * whole).all()


def test_a_flow_starts_from_the_mean_and_deviation_of_the_images(run_here):
    run_here("images.py", "--help")
    import images

    data = image_data("digits")
    args = images.image_flags().parse_args([])
    flow = images.build(images.with_defaults(args, "realnvp"), data)
    z = flow.transform.inverse(data.train).double()
    assert z.mean(0).abs().max() < 0.1
    assert 0.5 < z.std(0).min() < z.std(0).max() < 1.2


def test_the_noise_may_be_learned_and_the_trace_estimated(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*TINY, *SHORT, "--blocks", 1, "--levels", 1, "--model", "ffjord"]
    flags += ["--hidden", 4, 4, 4, "--dequantization", "variational", "--probes", 2]
    text = run_here("images.py", *flags, "--out", out)
    row = rows_of(out)["ffjord"]
    assert "Hutchinson, 2 probes (+- " in text
    assert 0 < row["trace_error"] < 0.1
    assert 2 < row["bits"] < 5
    names = load_checkpoint(out / "ffjord" / "last.safetensors")["model"]
    assert any(".q." in name for name in names)


def test_a_run_that_was_cut_goes_on_with_what_is_missing(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*TINY, *SHORT, "--layers", 2, "--out", out, "--max-time", 0.5, "--steps", 10**6]
    run_here("images.py", *flags, "--model", "realnvp")
    first = rows_of(out)["realnvp"]
    run_here("images.py", *flags, "--model", "realnvp", "glow", "--resume")
    again = rows_of(out)
    assert list(again) == ["histogram", "Gaussian", "realnvp", "glow"]
    for name in ("bits", "bound", "steps", "training_seconds"):
        assert again["realnvp"][name] == first[name], name
    assert again["glow"]["stopped"] == "max_time"
    assert "--resume" in run_here("images.py", *flags, "--model", "realnvp", code=1)


def test_a_run_that_has_ended_is_made_longer(tmp_path, run_here):
    out = tmp_path / "run"
    flags = [*TINY, *SHORT, "--layers", 2, "--out", out]
    run_here("images.py", *flags, "--model", "realnvp", "glow")
    first = rows_of(out)
    text = run_here("images.py", *flags, "--model", "realnvp", "--resume", "--steps", 5)
    again = rows_of(out)
    assert (again["realnvp"]["steps"], again["glow"]) == (5, first["glow"])
    assert again["realnvp"]["bits"] != first["realnvp"]["bits"]
    assert f"{first['glow']['bits']:.4f}" in text  # the report has it, too


def test_files_bits_and_flips_are_flags(tmp_path, run_here, monkeypatch):
    digits = image_data("digits")

    def eight_bits(name, folder):
        assert (name, folder) == ("FashionMNIST", tmp_path)
        parts = ((x * 15).to(torch.uint8) for x in (digits.train, digits.val, digits.test))
        return ImageData(*parts, levels=256, name=name)

    monkeypatch.setattr("cnf.data.image_data", eight_bits)
    out = tmp_path / "run"
    flags = [*TINY, *SHORT, "--layers", 2, "--model", "realnvp", "--out", out]
    flags += ["--data", "FashionMNIST", "--data-dir", tmp_path, "--bits", 3, "--flip"]
    text = run_here("images.py", *flags)
    assert "10 test images of 1 x 8 x 8, 8 grey levels" in text
    assert load_checkpoint(out / "realnvp" / "last.safetensors")["course"]["augment"] == "function"
    told = run_here("images.py", *[f for f in flags if f != "--flip"], "--resume", code=1)
    assert "augment" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "mnist"], ["--data=mnist needs --data-dir"]),
        (["--data", "mnist", "--data-dir", "nowhere"], ["nowhere"]),
        (["--data", "mnits"], ["mnist", "Did you mean"]),
        (["--data-dir", "here"], ["--data-dir"]),
        (["--bits", "3"], ["--bits", "17"]),
        (["--flip"], ["--flip", "mirrored"]),
        (["--test-size", "1"], ["--test-size=1"]),
        (["--draws", "0"], ["--draws=0"]),
        (["--probes", "1"], ["--probes=1"]),
        (["--alpha", "0.5"], ["alpha", "0.5"]),
        (["--levels", "5"], ["levels=5"]),
        (["--model", "glow", "--rtol", "1e-3"], ["--rtol has no effect on glow"]),
        (["--model", "realnvp", "--levels", "2"], ["--levels has no effect on realnvp"]),
        (["--model", "realnvp", "--probes", "4"], ["--probes has no effect on realnvp"]),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_trained(tmp_path, run_here, arguments, words):
    told = run_here("images.py", "--out", tmp_path / "run", *arguments, code=1)
    assert all(word in told for word in words), told
    assert not (tmp_path / "run").exists()
