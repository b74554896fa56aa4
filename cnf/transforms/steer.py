"""STEER: an end of the integration that is drawn anew for every batch."""

from __future__ import annotations

import math

import torch

from cnf.checks import check_number
from cnf.noise import draw
from cnf.transforms.times import Time, as_number

__all__ = ["check_steer", "steered"]


def check_steer(steer: float, times: tuple[Time, Time]) -> None:
    """Refuse a distance by which the end could pass the start.

    Raises:
        TypeError: not a number.
        ValueError: negative, not finite, or not below the span.

    Example:
        >>> check_steer(0.25, (0.0, 1.0))
    """
    check_number("steer", steer)
    if not (math.isfinite(steer) and steer >= 0):
        raise ValueError(f"steer={steer!r} must be finite and not negative, such as 0.25")
    start, end = (as_number(t) for t in times)
    if steer > 0 and not steer < abs(end - start):
        raise ValueError(
            f"steer={steer!r} must be below the span of the CNF, from {start:g} to {end:g}, which "
            "its end may not leave behind; use a smaller one, such as half the span"
        )


def steered(
    times: tuple[Time, Time], steer: float, generator: torch.Generator | None
) -> tuple[Time, Time]:
    """The (start, end) of an integration, the end moved by a distance uniform in [-steer, steer].

    Example:
        >>> start, end = steered((1.0, 0.0), 0.25, None)
        >>> start, -0.25 <= end <= 0.25
        (1.0, True)
    """
    check_steer(steer, times)
    host = torch.zeros((), dtype=torch.float64, device="cpu")
    shift = 2 * float(draw(torch.rand, (), like=host, generator=generator)) - 1
    return times[0], times[1] + steer * shift
