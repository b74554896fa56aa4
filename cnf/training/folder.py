"""The folder of a run: `last.safetensors`, `best.safetensors`, `log.jsonl`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from cnf.errors import CheckpointError, SolverError, TrainingError
from cnf.training.checkpoint import load_checkpoint, save_checkpoint
from cnf.training.run import Run
from cnf.training.tree import pack

__all__ = ["RunFolder"]


class RunFolder:
    """Where a run keeps its files; without a folder it keeps none.

    Attributes:
        last: The state after the newest step that was saved.
        best: The state at the lowest validation loss.
        log: One JSON object per line.
        saved_step: The step of `last`, or -1.
    """

    def __init__(self, out: str | Path | None) -> None:
        self.out = None if out is None else Path(out)
        self.last = self.out and self.out / "last.safetensors"
        self.best = self.out and self.out / "best.safetensors"
        self.log = self.out and self.out / "log.jsonl"
        self.saved_step = -1
        self._good: Path | None = None

    def begin(self, run: Run, resume: bool | str | Path) -> None:
        """Make the folder, and restore `run` when it is to be resumed.

        Raises:
            CheckpointError: There is nothing to resume, or a run that would be overwritten.
        """
        if resume is True and self.last is None:
            raise ValueError("resume=True needs out=, the folder of the run")
        if self.out is not None:
            pack(run.state_dict())  # what cannot be saved is better known before the first step
            if resume is True and self.last is not None and not self.last.exists():
                raise CheckpointError(
                    f"{self.last} does not exist: there is nothing to resume. Start without "
                    "resume=True (--resume)."
                )
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"cannot make the folder {self.out}: {error.strerror or error}."
                ) from error
        source = self.last if resume is True else Path(resume) if resume else None
        if source is not None:
            run.restore(load_checkpoint(source), source)
            self._good = source
        elif self.last is not None and self.last.exists():
            raise CheckpointError(
                f"{self.last} holds a run. Continue it with resume=True (--resume), "
                "or choose another folder."
            )

    def save(self, run: Run, *, best: bool = False) -> None:
        """Write `last`, and `best` before it when this is the best state so far.

        Raises:
            TrainingError: A weight is not finite; nothing is written.
            CheckpointError: The disk refused.
        """
        if self.best is None or self.last is None:
            return
        _check_weights(run.objective, run.progress.step)
        _check_weights(run.ema.module, run.progress.step)
        state = run.state_dict()
        for path in [self.best, self.last] if best else [self.last]:
            save_checkpoint(path, state)
            self._good = path
        self.saved_step = run.progress.step

    @contextmanager
    def mentioned_in_errors(self) -> Iterator[None]:
        """Let a `TrainingError` or `SolverError` say where the last good checkpoint is."""
        try:
            yield
        except TrainingError as error:
            raise TrainingError(f"{error} {self._where()}") from error.__cause__
        except SolverError as error:
            if sys.version_info >= (3, 11):
                error.add_note(self._where())
            raise

    def rescue(self, run: Run) -> str:
        """Save what can be saved, and say where the last good checkpoint is."""
        with suppress(CheckpointError, TrainingError):
            self.save(run)
        return self._where()

    def _where(self) -> str:
        if self._good is not None:
            return f"Last good checkpoint: {self._good}"
        return "No checkpoint was saved before it" + (
            ": pass out= to save some." if self.out is None else "."
        )


def _check_weights(module: nn.Module, step: int) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"after step {step} the parameter {name} is not finite; this state was not saved."
            )
