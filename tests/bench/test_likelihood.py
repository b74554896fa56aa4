"""bench/likelihood.py at a tiny size; scores in the data's units; verdicts; BSDS300's split."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnf.data import gaussian_log_prob, split_table

BENCH = Path(__file__).parents[2] / "bench"
TINY = (
    "--layers 2 --hidden 8 8 --bins 4 --steps 3 --spline-steps 2 --ffjord-steps 2 --batch 16 "
    "--libraries cnf zuko nflows"
)
PEERS = ["zuko", "nflows"]
INSTALLED = [name for name in PEERS if importlib.util.find_spec(name)]


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "likelihood.py", *TINY.split(), *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture
def likelihood(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_likelihood")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal([3.0, -1.0, 7.0], [1.0, 10.0, 0.1], (400, 3))


def test_every_flow_has_its_row_and_the_file_says_the_same(tmp_path, rows):
    table, out = tmp_path / "rows.csv", tmp_path / "scores.json"
    np.savetxt(table, rows, delimiter=",")
    done = run("--data", table, "--seeds", 0, 1, "--out", out)
    for name in PEERS:
        said = done.stdout.count(f"{name} skipped: {name} is not installed")
        assert said == (name not in INSTALLED)
    head, *blocks, _ = done.stdout.split("\n\n")
    assert "3-D, 320 / 40 / 40 points; 2 layers, hidden 8 x 8, 4 bins; batch 16" in head
    report = json.loads(out.read_text())
    exact = split_table(rows)
    gaussian = gaussian_log_prob(exact.train, exact.test) + exact.log_det_standardisation
    assert report["gaussian"][0] == pytest.approx(float(gaussian.mean()), abs=1e-3)
    scores = {(row["kind"], row["library"], row["seed"]): row for row in report["scores"]}
    assert len(scores) == len(report["scores"]) == 2 * (3 * (1 + len(INSTALLED)) + 1)
    for kind in ("affine", "spline", "maf"):
        assert len({row["parameters"] for key, row in scores.items() if key[0] == kind}) == 1
        assert {row["steps"] for key, row in scores.items() if key[0] == kind} == {
            2 if kind == "spline" else 3
        }
        for seed in (0, 1):
            ours = scores[kind, "cnf", seed]
            assert "verdict" not in ours
            for name in INSTALLED:
                peer = scores[kind, name, seed]
                gap = ours["log_prob"] - peer["log_prob"]
                assert peer["cnf_minus_it"][0] == pytest.approx(gap, abs=1e-6)
                assert 0 < peer["cnf_minus_it"][1] < peer["standard_error"] + 1
    assert scores["affine", "cnf", 0]["log_prob"] != scores["affine", "cnf", 1]["log_prob"]
    wanted = [(t, s) for s in (0, 1) for t in ("RealNVP", "NSF", "MAF", "FFJORD")]
    assert len(blocks) == 8
    assert all(f"({t}), seed {s}" in b for (t, s), b in zip(wanted, blocks, strict=True))
    printed = [line.split() for b in blocks for line in b.splitlines() if line.startswith("cnf ")]
    ours = [row for row in report["scores"] if row["library"] == "cnf"]
    for cells, row in zip(printed, ours, strict=True):
        assert int(cells[1]) == row["parameters"]
        assert float(cells[2]) == pytest.approx(row["log_prob"], abs=1e-4)


class Normal(nn.Module):
    """A Gaussian of independent features."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def log_prob(self, x):
        return torch.distributions.Normal(self.shift, self.log_scale.exp()).log_prob(x).sum(1)


class CalledNormal(nn.Module):
    """The same as zuko has it: the density is what a call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = Normal()

    def forward(self):
        return self.normal


@pytest.mark.parametrize("called", [False, True])
def test_a_score_is_in_the_units_of_the_data(likelihood, rows, called):
    table = split_table(rows)
    plan = likelihood.Plan(300, 64, 2e-2, seed=0)
    score = likelihood.run("k", "l", lambda: CalledNormal() if called else Normal(), table, plan)
    fitted = torch.distributions.Normal(table.mean, table.std)
    truth = fitted.log_prob(table.restore(table.test)).sum(1)
    assert score.parameters == 6
    assert (score.log_prob - truth).abs().mean() < 0.05
    assert score.mean == pytest.approx(float(truth.mean()), abs=0.02)
    held = fitted.log_prob(table.restore(table.val)).sum(1)
    assert score.val == pytest.approx(float(held.mean()), abs=0.02)
    assert score.error == pytest.approx(float(truth.std()) / 40**0.5, rel=0.05)


def test_the_weights_of_the_lowest_validation_loss_are_scored(likelihood):
    best, model = likelihood._Best(), nn.Linear(1, 1)
    for step, value in enumerate([3.0, 1.0, float("nan"), 2.0]):
        nn.init.constant_(model.weight, step)
        seen = best.offer(value, model)
        assert seen == value or seen != seen
    assert best.value == 1.0
    assert best.model.weight.item() == 1


def test_all_libraries_see_the_same_batches(likelihood, rows):
    table, seen = split_table(rows), {}
    for name in ("one", "two"):
        seen[name] = []

        def make(name=name):
            flow = Normal()
            if name == "two":
                torch.rand(7)  # another number of draws in making the flow
            plain = flow.log_prob
            flow.log_prob = lambda x: seen[name].append(x.clone()) or plain(x)
            return flow

        likelihood.run("k", name, make, table, likelihood.Plan(12, 64, 1e-2, seed=3))
    pairs = list(zip(seen["one"], seen["two"], strict=True))
    assert len(pairs) >= 12
    assert all(torch.equal(a, b) for a, b in pairs)


def test_verdicts(likelihood):
    bench = importlib.import_module("likelihood")
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()  # so that the standard error is 0.1

    def score(mean):
        return likelihood.Score("maf", "l", 0, 1, mean + noise, 0.0, 1.0, 1, 1)

    for gap, verdict in [(0.19, "within"), (-0.19, "within"), (0.21, "above"), (-0.21, "below")]:
        assert bench.verdict(score(gap), score(0.0)) == verdict


def test_the_patches_of_bsds300_come_from_three_sets_of_pictures(likelihood, tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 4)):
        (tmp_path / part).mkdir()
        for i in range(n):
            grey = generator.integers(0, 12, (12, 12)) * (i + 1)  # contrast tells the picture
            image.fromarray(grey.astype(np.uint8)).save(tmp_path / part / f"{i:02}.png")
    table = importlib.import_module("_likelihood_data").load(f"bsds300:{tmp_path}", (500, 200, 100))
    assert [len(x) for x in (table.train, table.val, table.test)] == [500, 200, 100]
    torch.testing.assert_close(table.train.mean(0), torch.zeros(63), atol=1e-5, rtol=0)
    torch.testing.assert_close(table.train.std(0, correction=0), torch.ones(63))
    order = np.random.RandomState(0).permutation(20)

    def contrasts(z):
        return 256 * table.restore(z).std(1) / np.arange(12).std()

    for z, pictures in ((table.val, order[18:]), (table.test, range(4))):
        possible = torch.tensor([i + 1.0 for i in pictures])
        ratios = contrasts(z)[:, None] / possible
        assert float((ratios - 1).abs().amin(1).max()) < 0.35
    done = run("--data", f"bsds300:{tmp_path}", "--patches", 300, 50, 50, "--flows", "maf")
    assert "63-D, 300 / 50 / 50 points" in done.stdout
