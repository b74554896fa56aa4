"""What a solve did: evaluations, steps, outcome; and a context manager that collects it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["SolveStats", "active_recorders", "record_solves"]


@dataclass
class SolveStats:
    """The statistics of one solve, as plain Python values.

    Attributes:
        kind: "forward" for a solve that computes values, "backward" for the work of its gradient.
        method: name of the Runge-Kutta method.
        t0: start time.
        t1: end time.
        nfe: evaluations of the vector field.
        accepted: steps taken (0 where a backend does not tell).
        rejected: steps tried and refused.
        status: "running", "converged", or the status of the `SolverError`.
        failed: samples that failed and became NaN (`Solver(on_failure="nan")`).
        next_step: size that a next step would have (adaptive methods).
    """

    kind: str
    method: str
    t0: float
    t1: float
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    status: str = "running"
    failed: int = 0
    next_step: float = 0.0


Recorders = tuple[list[SolveStats], ...]
_recorders: ContextVar[Recorders] = ContextVar("cnf_recorders", default=())


def active_recorders() -> Recorders:
    """The lists that collect at present; a backward solve reports to those of its forward solve."""
    return _recorders.get()


@contextmanager
def record_solves() -> Iterator[list[SolveStats]]:
    """Collect the statistics of every solve in the block, in order.

    Work in a backward pass is collected by the block in which the forward solve ran, because
    autograd may run it in another thread. Solves that other threads begin belong to no block but
    their own; to collect them here, run them in a copy of this context:

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,))

    Example:
        >>> import cnf, torch
        >>> flow = cnf.FFJORD(2)
        >>> with cnf.record_solves() as solves:
        ...     _ = flow.log_prob(torch.randn(5, 2))
        >>> [(s.kind, s.status) for s in solves], solves[0].nfe > 0
        ([('forward', 'converged')], True)
    """
    solves: list[SolveStats] = []
    token = _recorders.set((*_recorders.get(), solves))
    try:
        yield solves
    finally:
        _recorders.reset(token)
