"""Resume: a run in pieces, in other processes with other seeds, is bit for bit the run in one
piece.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnf.errors import CheckpointError
from cnf.training import fit, load_checkpoint, save_checkpoint

from .noisy_run import Noisy, noisy_run, rows
from .test_checkpoint import same

SCRIPT = "tests.training.noisy_run"
ROOT = Path(__file__).parents[2]


def state_of(folder: Path) -> dict[str, Any]:
    """The last state, without the time, which is never the same."""
    state = load_checkpoint(folder / "last.safetensors")
    state["progress"].pop("elapsed")
    return state


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, without the time."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "elapsed"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 200 steps in one piece."""
    out = tmp_path_factory.mktemp("whole")
    noisy_run(out, steps=200, seed=1)
    return out


# 16 of 50 rows: a batch crosses the border of an epoch at step 4; 25 steps are eight epochs
@pytest.mark.parametrize("steps", [1, 3, 4, 25, 90, 100, 199])
def test_resumed_run_is_bitwise_equal(whole: Path, tmp_path: Path, steps: int) -> None:
    noisy_run(tmp_path, steps=steps, seed=1)
    noisy_run(tmp_path, steps=200, seed=99, resume=True)
    expected, resumed = state_of(whole), state_of(tmp_path)
    if steps % 30:  # the shorter run looked at its last state too, which is no part of the course
        expected["progress"].update(
            {key: resumed["progress"][key] for key in ("best_step", "best_loss", "stale")}
        )
    expected["config"] = resumed["config"]
    assert same(expected, resumed)


def jitter(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Rows with noise, from the generator alone."""
    return batch + 0.1 * torch.randn(batch.shape, generator=generator)


@pytest.mark.parametrize("steps", [1, 3, 4, 25])
def test_resumed_run_has_the_same_augmented_batches(tmp_path: Path, steps: int) -> None:
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    noisy_run(whole, steps=40, seed=1, augment=jitter)
    noisy_run(cut, steps=steps, seed=1, augment=jitter)
    noisy_run(cut, steps=40, seed=99, augment=jitter, resume=True)
    noisy_run(plain, steps=40, seed=1)
    weights = [state_of(folder)["model"] for folder in (whole, cut, plain)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])
    with pytest.raises(CheckpointError, match="augment: 'function' in the checkpoint, 'absent'"):
        noisy_run(cut, steps=50, seed=1, resume=True)


def start(
    out: Path, *, pause: float, resume: str = "start", seed: int = 1
) -> subprocess.Popen[str]:
    """The run of 200 steps in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        SCRIPT,
        str(out),
        "200",
        str(seed),
        str(pause),
        resume,
    ]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(out: Path, lines: int) -> None:
    """Until the run has written so many lines."""
    log, end = out / "log.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        if time.monotonic() > end:
            raise TimeoutError(f"{log} does not grow")
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_processes_interrupted_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    """SIGINT, SIGTERM and SIGKILL, each in a process with another seed: no trace of it in the state
    or the log.
    """
    resume = "start"
    for number, lines, code in (
        (signal.SIGINT, 20, 130),
        (signal.SIGTERM, 50, 143),
        (signal.SIGKILL, 110, -9),
    ):
        run = start(tmp_path, pause=0.01, resume=resume, seed=1 if resume == "start" else lines)
        wait_for(tmp_path, lines)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
        assert run.returncode == code, errors
        assert ("stopping after this step" in errors) == (code > 0)
        resume = "resume"
    assert load_checkpoint(tmp_path / "last.safetensors")["progress"]["step"] < 200
    run = start(tmp_path, pause=0.0, resume=resume, seed=99)
    assert run.communicate(timeout=60)[1] == ""
    assert run.returncode == 0
    assert same(state_of(whole), state_of(tmp_path))
    assert log_of(whole) == log_of(tmp_path)


@pytest.mark.parametrize(
    "optimizer", ["SGD", "Adam", "RMSprop", "Adagrad", "NAdam", "Adadelta", "RAdam", "Rprop"]
)
def test_other_optimizers(tmp_path: Path, optimizer: str) -> None:
    def run(out: Path, steps: int, *, resume: bool = False) -> dict[str, Any]:
        torch.manual_seed(9 if resume else 0)
        objective = Drawn()
        kind = getattr(torch.optim, optimizer)(objective.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.MultiStepLR(kind, [3, 3, 7])
        fit(
            objective,
            draw,
            steps=steps,
            batch_size=4,
            optimizer=kind,
            scheduler=schedule,
            out=out,
            resume=resume,
            progress=False,
        )
        return state_of(out)

    run(tmp_path / "pieces", 4)
    pieces = run(tmp_path / "pieces", 10, resume=True)
    assert same(run(tmp_path / "whole", 10), pieces)


class Drawn(nn.Module):
    """Least squares without noise of its own, from fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, 2) -> ()
        """Mean square."""
        return (self.center - x).square().mean()


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Samples around one."""
    return 1 + torch.randn(count, 2, generator=generator)


def test_patience_counts_across_a_resume(tmp_path: Path) -> None:
    def run(steps: int, *, resume: bool) -> Any:
        return noisy_run(
            tmp_path,
            steps=steps,
            seed=1,
            resume=resume,
            patience=3,
            validate_every=10,
            validate=lambda ema: float(ema.calls),
        )

    assert run(20, resume=False).stopped == "steps"
    result = run(200, resume=True)
    assert (result.stopped, result.step, result.best_step) == ("patience", 40, 10)


def test_elapsed_and_evaluations_add_up(tmp_path: Path) -> None:
    first = noisy_run(tmp_path, steps=10, seed=1, pause=0.01)
    second = noisy_run(tmp_path, steps=20, seed=1, resume=True)
    assert second.elapsed > first.elapsed > 0.1


def test_other_settings_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    noisy_run(tmp_path, steps=10, seed=1)
    before = (tmp_path / "last.safetensors").read_bytes()
    for options, message in (
        (
            {"config": {"model": "other", "new": 1}},
            r"(?s)config\['model'\]: 'noisy' in .*config\['new'\]: 'absent' in .*, 1 now",
        ),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm: 0.5 in the checkpoint, 1.0 now"),
        ({"ema_decay": 0.9}, "ema_decay: 0.999 in"),
        ({"scheduler": None}, "scheduler: 'OneCycleLR' in the checkpoint, 'NoneType' now"),
    ):
        with pytest.raises(CheckpointError, match=message):
            noisy_run(tmp_path, steps=20, seed=1, resume=True, **options)
    objective = Noisy()
    with pytest.raises(
        CheckpointError, match=r"(?s)batch_size: 16 in the checkpoint, 8 now.*optimizer: 'AdamW'"
    ):
        fit(objective, rows(), steps=20, batch_size=8, out=tmp_path, resume=True, progress=False)
    with pytest.raises(
        CheckpointError, match=r"train: 'torch.float32 \(50, 2\)' in .*\(60, 2\)' now"
    ):
        fit(objective, rows(60), steps=20, batch_size=16, out=tmp_path, resume=True, progress=False)
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert (
        noisy_run(
            tmp_path, steps=12, seed=1, resume=True, max_time=100.0, config={"model": "noisy"}
        ).step
        == 12
    )


def test_other_architecture_is_left_unchanged(tmp_path: Path) -> None:
    fit(nn.Sequential(Drawn()), draw, steps=2, batch_size=2, out=tmp_path, progress=False)
    other = nn.Sequential(Drawn(), Drawn())
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: 1\.center"):
        fit(other, draw, steps=4, batch_size=2, out=tmp_path, resume=True, progress=False)
    assert not other[0].center.any()


def test_other_parameter_groups(tmp_path: Path) -> None:
    fit(Drawn(), draw, steps=2, batch_size=2, out=tmp_path, progress=False)
    other = Drawn()
    optimizer = torch.optim.Adam(
        [{"params": [other.center]}, {"params": [nn.Parameter(torch.ones(1))]}]
    )
    with pytest.raises(
        CheckpointError, match=r"groups of \[1\] parameters in the checkpoint, of \[1, 1\] now"
    ):
        fit(
            other,
            draw,
            steps=4,
            batch_size=2,
            optimizer=optimizer,
            out=tmp_path,
            resume=True,
            progress=False,
        )
    assert not other.center.any()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        noisy_run(tmp_path, steps=10, seed=1, resume=True)
    save_checkpoint(tmp_path / "last.safetensors", {"ema": {}})
    with pytest.raises(CheckpointError, match="does not hold a training run: it lacks model"):
        noisy_run(tmp_path, steps=10, seed=1, resume=True)


def test_damaged_last_points_to_best_which_can_be_resumed(tmp_path: Path) -> None:
    noisy_run(tmp_path, steps=60, seed=1)
    last, best = tmp_path / "last.safetensors", tmp_path / "best.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=f"checksum mismatch.*Good checkpoint beside it: {best}"
    ):
        noisy_run(tmp_path, steps=70, seed=1, resume=True)
    assert noisy_run(tmp_path, steps=70, seed=1, resume=best).step == 70


def test_log_drops_lines_past_the_resumed_step_and_torn_ones(tmp_path: Path) -> None:
    noisy_run(tmp_path, steps=10, seed=1, validate_every=100)
    log = tmp_path / "log.jsonl"
    whole = log_of(tmp_path)
    with log.open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 3, "lo')
    noisy_run(tmp_path, steps=12, seed=1, validate_every=100, resume=True)
    lines = log_of(tmp_path)
    assert lines[: len(whole)] == whole
    assert [line["step"] for line in lines[len(whole) :]] == [11, 12, 12]
    assert lines[len(whole)]["loss"] != 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_on_a_gpu(tmp_path: Path) -> None:
    noisy_run(tmp_path / "whole", steps=60, seed=1, device="cuda")
    noisy_run(tmp_path / "pieces", steps=30, seed=1, device="cuda")
    noisy_run(tmp_path / "pieces", steps=60, seed=9, device="cuda", resume=True)
    whole, pieces = state_of(tmp_path / "whole"), state_of(tmp_path / "pieces")
    assert same({**whole, "config": None}, {**pieces, "config": None})
