"""What `fit` returns: how a run ended, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from cnf.training.folder import RunFolder
from cnf.training.run import Run

__all__ = ["FitResult", "Reason"]

Reason = Literal["steps", "patience", "max_time", "interrupted"]


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        stopped: Why: "steps", "patience", "max_time" or "interrupted".
        signal: Number of the signal that interrupted it, or None.
        step: Optimiser steps taken, in all calls together, as are `elapsed` and the evaluations.
        elapsed: Seconds.
        nfe_forward: Function evaluations of forward solves.
        nfe_backward: Function evaluations of backward solves.
        best_step: Step of the lowest validation loss, or None.
        best_loss: That loss, or None.
        ema: The moving average of the objective, as it is at the end.
        best: File of the best weights, or None.
        last: File of the last state, or None.
    """

    stopped: Reason
    signal: int | None
    step: int
    elapsed: float
    nfe_forward: int
    nfe_backward: int
    best_step: int | None
    best_loss: float | None
    ema: nn.Module
    best: Path | None
    last: Path | None

    @property
    def exit_code(self) -> int:
        """What a script should exit with: 0, or 130 after SIGINT and 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    @classmethod
    def of(cls, run: Run, folder: RunFolder, *, stopped: Reason, signal: int | None) -> FitResult:
        """The result of `run`, which `stopped` for this reason."""
        at = run.progress
        return cls(
            stopped=stopped,
            signal=signal,
            step=at.step,
            elapsed=at.elapsed,
            nfe_forward=at.nfe_forward,
            nfe_backward=at.nfe_backward,
            best_step=at.best_step,
            best_loss=at.best_loss,
            ema=run.ema.module,
            best=None if at.best_step is None else folder.best,
            last=folder.last,
        )
