"""bench/discrete.py at a tiny size; flows that are none; the same architecture for all."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parents[2] / "bench"
TINY = "--threads 1 --features 5 --layers 2 --hidden 8 8 --bins 4 --batch 16 --rounds 2"
PEERS = ["zuko", "nflows", "normflows"]
INSTALLED = [name for name in PEERS if importlib.util.find_spec(name)]
FLOOR = "bare conditioners"


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "discrete.py", *TINY.split(), *arguments]
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


@pytest.fixture
def discrete(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_discrete")


def test_every_library_has_its_row_in_nine_tables(tmp_path):
    picture = tmp_path / "bars.png"
    done = run("--plot", picture)
    assert picture.stat().st_size > 0
    for name in PEERS:
        said = done.stdout.count(f"{name} skipped: {name} is not installed")
        assert said == (name not in INSTALLED)
    *blocks, end = done.stdout.split("\n\n")[1:]
    assert len(blocks) == 9
    for block in blocks:
        title, _, heads, *lines = block.splitlines()
        assert title.endswith("batch 16, cpu, threads 1")
        assert heads.split() == ["parameters", "ms", "ratio", "aten", "ops"]
        rows = {line[:20].strip(): line[20:].split() for line in lines if len(line) == 68}
        assert set(rows) == {"cnf", FLOOR, *INSTALLED}
        assert len({cells[0] for cells in rows.values()}) == 1  # of one size
        times = [float(cells[1]) for cells in rows.values()]
        assert times == sorted(times, reverse=True)
        ratios = [rows[name][2] for name in INSTALLED]
        assert "1.00" in ratios or not INSTALLED
        assert float(rows["cnf"][3]) > float(rows[FLOOR][3]) > 0
    summary = [line for line in end.splitlines()[1:] if not line.startswith("drawn")]
    assert len(summary) == 9
    assert all((line.split()[-2] == "-") == (not INSTALLED) for line in summary)


def test_an_unknown_name_leaves_nothing_to_time():
    done = run("--only", "nobody", "--flow", "affine", check=False)
    assert done.returncode == 1
    assert "'normflows'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["cnf", *PEERS])
@pytest.mark.parametrize(
    ("kind", "outputs"), [("affine", (6, 4)), ("spline", (33, 22)), ("maf", (10, 10))]
)
def test_the_architecture_is_the_same(discrete, name, kind, outputs):
    if name != "cnf":
        pytest.importorskip(name)
    architecture = discrete.Architecture(kind, 5, 2, (8, 8), bins=4)
    (model,) = discrete.models(architecture, name, "cpu")
    inputs = (5, 5) if kind == "maf" else (2, 3)
    ends = zip(inputs, outputs, strict=True)
    assert model.size == sum(8 * (i + 1) + 8 * 9 + 9 * o for i, o in ends)
    discrete.check(model, torch.randn(16, 5))
    x = torch.randn(1, 5)
    model.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in model.module.parameters())


class Scale(nn.Module):
    """x = 2 z, with a log-determinant that may be wrong."""

    def __init__(self, log_det: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.log_det = log_det

    def log_prob(self, x):
        z = (x - self.shift) / 2
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) - self.log_det

    def sample_and_log_prob(self, n):
        z = torch.randn(n, 3)
        told = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        return 2 * z + self.shift, told - 3 * torch.tensor(2.0).log()


@pytest.mark.parametrize(
    ("log_det", "match"), [(2.0, "off by"), (0.0, "off by"), (float("nan"), "log_prob is not")]
)
def test_what_is_no_flow_is_refused(discrete, log_det, match):
    def model(log_det):
        flow = Scale(log_det)
        draw = flow.sample_and_log_prob
        return discrete.Model("scale", flow, flow.log_prob, lambda n: draw(n)[0], draw)

    x = torch.randn(16, 3)
    assert discrete.check(model(3 * torch.tensor(2.0).log()), x) < 1e-5
    with pytest.raises(SystemExit, match=f"scale: .*{match}"):
        discrete.check(model(log_det), x)


def test_the_fastest_is_a_peer(discrete):
    fastest = importlib.import_module("discrete").fastest
    times = {"cnf": [1.0, 1.0, 1.0], FLOOR: [0.5, 0.5, 0.5]}
    assert fastest(times) is None
    times |= {"zuko": [2.0, 9.0, 2.0], "nflows": [3.0, 3.0, 3.0]}
    assert fastest(times) == "zuko"
