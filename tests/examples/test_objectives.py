"""--objective of density2d.py and table.py: flow matching, likelihood, one after the other."""

from __future__ import annotations

import json
import re

import pytest

from cnf.training import load_checkpoint

TINY = ["--hidden", "8", "--batch-size", "50", "--device", "cpu"]
OTHERS = "--coupling optimal-transport --path trigonometric --time-sampling uniform".split()  # noqa: SIM905


def likelihood(report: str) -> float:
    return float(re.search(r"test log-likelihood +(\S+) \+-", report)[1])


@pytest.mark.filterwarnings("ignore:hidden=")  # narrow networks are quick
@pytest.mark.parametrize("flags", [[], OTHERS])
def test_flow_matching_trains_and_is_tested_by_likelihood(tmp_path, run_here, flags):
    out = tmp_path / "plane"
    matching = ["--objective", "flow-matching", *TINY, *flags]
    done = run_here("density2d.py", *matching, "--steps", 30, "--test-size", 50, "--out", out)
    assert -8 < likelihood(done) < -2.8
    assert "evaluations a step" not in done  # nothing was solved in training
    assert "30 steps" in done
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line["flow_matching"] == line["loss"] for line in lines if "loss" in line)
    config = load_checkpoint(out / "last.safetensors")["config"]
    assert config["objective"] == "flow-matching"
    assert config["path"] == ("trigonometric" if flags else "linear")
    table = run_here("table.py", *matching, "--steps", 5, "--out", tmp_path / "table")
    assert -200 < likelihood(table) < 0


@pytest.mark.filterwarnings("ignore:hidden=")
def test_both_matches_and_then_fine_tunes(tmp_path, run_here):
    flags = ["--objective", "both", *TINY, "--steps", 6, "--fine-tune", 4, "--test-size", 50]
    done = run_here("density2d.py", *flags, "--out", tmp_path)
    assert "10 steps" in done
    first = load_checkpoint(tmp_path / "flow-matching" / "last.safetensors")
    second = load_checkpoint(tmp_path / "last.safetensors")
    assert (first["progress"]["step"], second["progress"]["step"]) == (6, 4)
    assert first["progress"]["nfe_forward"] == 0 < second["progress"]["nfe_forward"]
    again = run_here("density2d.py", *flags, "--out", tmp_path, "--resume")  # all is there
    assert likelihood(again) == likelihood(done)
    longer = [4 + 3 if flag == 4 else flag for flag in flags]
    done = run_here("density2d.py", *longer, "--out", tmp_path, "--resume")
    assert "13 steps" in done


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--path", "linear"], "--path has no effect with --objective likelihood"),
        (["--objective", "flow-matching", "--fine-tune", "3"], "choose --objective both"),
        (["--objective", "flow-matching", "--model", "nsf"], "use --model ffjord"),
        (["--objective", "both", "--blocks", "2"], "--blocks 1"),
    ],
)
@pytest.mark.parametrize("script", ["density2d.py", "table.py"])
def test_what_cannot_be_is_refused(tmp_path, run_here, script, arguments, told):
    assert told in run_here(script, *arguments, "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()
