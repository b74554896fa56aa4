"""The parts of a loss by name: an objective tells them, a loop or a test collects them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from cnf.checks import tracing

__all__ = ["log_terms", "record_terms"]

_recorders: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("cnf_terms", default=())


def log_terms(**terms: Tensor) -> None:
    """Tell the parts of a loss by name, scalars, to whoever collects them by `record_terms`.

    It costs nothing where nobody does. `fit` writes them into its log.

    Example:
        >>> import torch
        >>> with record_terms() as terms:
        ...     log_terms(kinetic_energy=torch.tensor(2.0))
        >>> terms
        {'kinetic_energy': 2.0}
    """
    if tracing():
        return
    for recorder in _recorders.get():
        recorder.update({name: value.detach() for name, value in terms.items()})


@contextmanager
def record_terms() -> Iterator[dict[str, float]]:
    """Collect the parts of the losses computed in the block; numbers once it has ended.

    A name told twice has its last value.

    Example:
        >>> import cnf, torch
        >>> objective = cnf.MaximumLikelihood(cnf.FFJORD(2))
        >>> with record_terms() as terms:
        ...     loss = objective(torch.randn(16, 2))
        >>> list(terms)
        ['negative_log_likelihood']
    """
    terms: dict[str, Any] = {}
    token = _recorders.set((*_recorders.get(), terms))
    try:
        yield terms
    finally:
        _recorders.reset(token)
        for name, value in terms.items():
            terms[name] = float(value)
