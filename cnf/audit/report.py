"""What an audit found: its rows, its numbers, and how they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Audit", "AuditRow", "Finding", "GradientAudit", "first_sentence", "judge"]

_NAN = float("nan")


@dataclass(frozen=True)
class AuditRow:
    """One line of an audit."""

    name: str
    value: str
    verdict: str = "ok"  # begins so, or says what is wrong and what to do
    ok: bool = True


Finding = tuple[AuditRow, dict[str, Any]]
"""A row, and the numbers behind it by their names in `Audit`."""


def judge(name: str, value: str, error: float, limit: float, remedy: str) -> AuditRow:
    """The row of an error that must not exceed a limit, nor be NaN."""
    if error <= limit:
        return AuditRow(name, value)
    return AuditRow(name, value, f"{error:.0e} is more than {limit:.0e}: {remedy}", ok=False)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(" [")[0].split(". ")[0].rstrip(".")


@dataclass(frozen=True)
class GradientAudit:
    """One gradient mode: its error against the reference, and its cost."""

    error: float = (
        _NAN  # |g - g_ref| / |g_ref| of mean log p in all parameters; 0 if there are none
    )
    x_error: float = _NAN  # the same in x
    seconds: float = _NAN  # of a forward and backward pass, median of 3
    memory: float = _NAN  # its peak above the start, in bytes
    nfe: float = _NAN  # evaluations in the forward pass
    backward_nfe: float = _NAN
    failure: str = ""  # why the mode cannot be used, all numbers being NaN then


@dataclass(frozen=True)
class Audit:
    """What `check` found: rows to read, and the numbers behind them.

    A number is NaN where it could not be measured; its row says why. `print` gives the report.

    Example:
        >>> print(Audit(rows=(AuditRow("solve", "NFE 26"),)))
        cnf.check
          solve           NFE 26  ok
          => every row is ok
    """

    rows: tuple[AuditRow, ...]
    reference: str = "none"  # what the numbers were compared with
    deterministic: bool = True  # two evaluations of every field agreed bit for bit
    divergence_error: float = _NAN  # max |div - div by central differences|, in 1 / time
    log_det_error: float = _NAN  # max over the batch of |log p - log p_ref|, in nats, same noise
    log_det_rms: float = _NAN  # its root mean square over the batch
    z_error: float = _NAN  # max |z - z_ref|
    round_trip: float = _NAN  # max |forward(inverse(x)) - x|
    round_trip_relative: float = _NAN  # the same over the root mean square of x
    coupling: float = _NAN  # max |log p of a row alone - in the batch|, in nats
    trace_noise: float = _NAN  # std of log p by the estimator's noise, rms over the batch, in nats
    standard_error: float = _NAN  # what it leaves on the mean log p, trace_noise / sqrt(B)
    nfe: int = 0  # evaluations of the fields in one log_prob
    accepted: int = 0  # steps taken in it
    rejected: int = 0  # steps tried and refused in it
    gradient_check: float = _NAN  # |g_ref v - its central difference| / |g_ref|, v at random
    gradients: Mapping[str, GradientAudit] = field(default_factory=dict)  # by mode

    @property
    def ok(self) -> bool:
        """Whether no row needs anything done."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.value) for row in self.rows)
        lines = [f"  {row.name:<14}  {row.value:<{width}}  {row.verdict}" for row in self.rows]
        bad = sum(not row.ok for row in self.rows)
        end = f"{bad} of {len(lines)} rows need attention" if bad else "every row is ok"
        return "\n".join(["cnf.check", *lines, f"  => {end}"])
