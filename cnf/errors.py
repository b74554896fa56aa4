"""The exceptions of `cnf` that are not plain `ValueError` or `TypeError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["CheckpointError", "SolverError", "TrainingError"]


class SolverError(RuntimeError):
    """An ODE solve that could not reach its end time, with the cause.

    Attributes:
        status: "non_finite_field", "blow_up", "step_underflow" (stiff), "too_many_steps" or
            "tolerance_below_resolution" (of the dtype).
        t: time that the solve had reached.
        dt: the step that it tried last (0.0 before the first one).
        nfe: function evaluations spent.
        samples: indices (into the flattened batch) of the samples at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: str,
        t: float,
        dt: float = 0.0,
        nfe: int = 0,
        samples: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.t = t
        self.dt = dt
        self.nfe = nfe
        self.samples = tuple(samples)

    def explained(self, more: str) -> SolverError:
        """The same error, with a sentence more."""
        return SolverError(
            f"{self} {more}",
            status=self.status,
            t=self.t,
            dt=self.dt,
            nfe=self.nfe,
            samples=self.samples,
        )

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions are rebuilt from their message alone
        return type(self).__new__, (type(self), *self.args), vars(self)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or does not fit the model."""


class TrainingError(RuntimeError):
    """A training run that cannot go on, such as one whose loss is not finite."""
