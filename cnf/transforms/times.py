"""The times of a flow: of its two ends, fixed or learnable, and along its path."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cnf.checks import check_number

__all__ = ["Time", "as_number", "check_end_times", "own_copy", "path_times"]

Time = float | Tensor
"""A time of an end: a number, or a tensor () such as a learnable `nn.Parameter`."""


def check_end_times(times: tuple[Time, Time]) -> tuple[Time, Time]:
    """The pair (base time, data time), checked; integers become floats.

    Raises:
        TypeError: a time that is neither a number nor a floating-point tensor.
        ValueError: not a pair, or a tensor with more than one element.
    """
    if not isinstance(times, (tuple, list)) or len(times) != 2:
        raise ValueError(f"times={times!r} must be a pair, (base time, data time)")
    base, data = (_end_time(f"times[{i}]", t) for i, t in enumerate(times))
    return base, data


def _end_time(name: str, t: Time) -> Time:
    if not isinstance(t, Tensor):
        check_number(name, t)
        return t
    if not t.is_floating_point():
        raise TypeError(f"{name} is {t.dtype}; use a floating-point tensor, such as {name}.float()")
    if t.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor (), got shape {tuple(t.shape)}")
    return t


def as_number(t: Time) -> float:
    """A time as a number, without its gradient."""
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


def path_times(times: Iterable[float] | Tensor, start: float, end: float) -> list[float]:
    """The times along a path, checked: from start towards end, strictly monotone.

    Raises:
        TypeError: not a sequence.
        ValueError: a time that is not finite, beyond the span, or not after the one before it.

    Example:
        >>> path_times([0, 0.5, 1], 0.0, 1.0)
        [0.0, 0.5, 1.0]
    """
    if not isinstance(times, (Tensor, Iterable)):
        raise TypeError(f"times must be a sequence of numbers (T,), got {type(times).__name__}")
    if not isinstance(times, Tensor):
        times = torch.tensor(list(times), dtype=torch.float64, device="cpu")
    values = times.detach()
    if values.ndim != 1:
        raise ValueError(
            f"times must be a sequence of numbers (T,), got shape {tuple(values.shape)}"
        )
    ts = [float(t) for t in values.tolist()]
    sign = 1.0 if end >= start else -1.0
    for i, t in enumerate(ts):
        if not math.isfinite(t):
            raise ValueError(f"times[{i}] is {t}; times must be finite")
        if not sign * start <= sign * t <= sign * end:
            raise ValueError(f"times[{i}]={t:g} is not between {start:g} and {end:g}")
        if i and sign * t <= sign * ts[i - 1]:
            raise ValueError(
                f"times[{i}]={t:g} does not come after times[{i - 1}]={ts[i - 1]:g} on the way "
                f"from {start:g} to {end:g}; sort them and leave out repetitions"
            )
    return ts


def own_copy(times: tuple[Time, Time]) -> tuple[Time, Time]:
    """The same times, learnable ones as parameters of their own."""
    base, data = (
        nn.Parameter(t.detach().clone()) if isinstance(t, nn.Parameter) else t for t in times
    )
    return base, data
