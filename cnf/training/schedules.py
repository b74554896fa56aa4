"""Values that follow the training step: of the weight of a term, of a temperature."""

from __future__ import annotations

from collections.abc import Callable

from cnf.checks import check_count

__all__ = ["linear"]


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A value that goes from `start` to `end` in so many steps, and stays there.

        start + (end - start) min(1, step / steps)

    For `fit(..., anneal={"beta": linear(0.0, 1.0, 1000)})`: KL warm-up of `cnf.variational.ELBO`,
    annealing of `cnf.ReverseKL`.

    Raises:
        ValueError: steps not a positive integer.

    Example:
        >>> beta = linear(0.0, 1.0, 10)
        >>> [beta(step) for step in (0, 5, 10, 20)]
        [0.0, 0.5, 1.0, 1.0]
    """
    check_count("steps", steps)
    return lambda step: start + (end - start) * min(1.0, step / steps)
