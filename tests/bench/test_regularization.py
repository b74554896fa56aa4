"""bench/regularization.py at a tiny size: every contestant has its row, and the file says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
TINY = "--steps 2 --batch 16 --hidden 4 --test 20 --data moons"
NAMES = ["none", "rnode 0.01", "taylor 2", "steer 0.25", "potential", "ot-flow"]


def test_every_contestant_has_its_row(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, BENCH / "regularization.py", *TINY.split(), "--out", out]
    done = subprocess.run(
        [*map(str, command), "--only", *NAMES],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == NAMES
    assert found["rows"][0]["gain"] == [0, 0]
    assert all(row["nfe"] > 0 and row["energy"] > 0 for row in found["rows"])
    lines = [line for line in done.stdout.splitlines() if line.startswith(tuple(NAMES))]
    assert len(lines) == len(NAMES)
    mean = found["rows"][1]["log_prob"][0]
    assert f"{mean:.3f} +- " in lines[1]
