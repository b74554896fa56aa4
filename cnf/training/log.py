"""What a person sees of a run: the progress bar, and the log with one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cnf.errors import CheckpointError
from cnf.training.atomic import write_atomically
from cnf.training.extras import require
from cnf.training.step import StepReport

__all__ = ["Log", "ProgressBar"]


class Log:
    """The file `log.jsonl`, which continues after a resume as if the run had never stopped.

    Lines past the step at which the run continues are dropped, and so is a line that a kill left
    half written. Values that are not finite become null.

    Args:
        path: The file, or None to write nothing.
        step: The step at which the run continues; 0 begins a new file.
        rescue: Called when a line cannot be written; it returns what is added to the error.

    Raises:
        CheckpointError: The file cannot be read or written.
    """

    def __init__(
        self, path: Path | None, *, step: int, rescue: Callable[[], str] = lambda: ""
    ) -> None:
        self._path = path
        self._rescue = rescue
        self._file: IO[str] | None = None
        if path is not None:
            try:
                kept = _lines_until(path, step) if step > 0 and path.exists() else []
                write_atomically(path, "".join(kept).encode())
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise self._error(error) from error

    def write(self, values: Mapping[str, Any]) -> None:
        """Add one line, at once."""
        if self._file is not None:
            finite = {name: value if _finite(value) else None for name, value in values.items()}
            try:
                self._file.write(json.dumps(finite, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise self._error(error, self._rescue()) from error

    def _error(self, error: OSError, more: str = "") -> CheckpointError:
        return CheckpointError(
            f"cannot write the log {self._path}: {error.strerror or error}. Free space, or choose "
            f"another folder. {more}".rstrip()
        )

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written is tried once more
                self._file.close()


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _lines_until(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class ProgressBar:
    """A tqdm bar: smoothed loss, function evaluations of the step (forward/backward), steps per
    second, time left.

    Args:
        show: Without it there is no bar, and tqdm is not needed.
        steps: Where the run ends.
        step: Where it stands.
    """

    def __init__(self, *, show: bool, steps: int, step: int) -> None:
        self._loss: float | None = None
        self._validation = ""
        self._bar = (
            require("tqdm").tqdm(
                total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5
            )
            if show
            else None
        )

    def advance(self, report: StepReport) -> None:
        """One step further."""
        if self._bar is not None:
            loss = report.loss
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
            solves = report.nfe_forward or report.nfe_backward  # a discrete flow has none
            nfe = f", nfe {report.nfe_forward}/{report.nfe_backward}" if solves else ""
            text = f"loss {self._loss:.4f}{nfe}{self._validation}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def validated(self, loss: float) -> None:
        """Keep the last validation loss in sight."""
        self._validation = f", val {loss:.4f}"

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
