"""How time enters a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_frequencies", "time_features"]


def time_features(t: Tensor, frequencies: int) -> Tensor:
    """tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies: () -> (1 + 2 frequencies,).

    The frequencies begin at half a period, so that t = 0 and t = 1 are told apart.
    """
    if not frequencies:
        return t.reshape(1)
    k = torch.arange(1, frequencies + 1, dtype=t.dtype, device=t.device)
    angle = math.pi * k * t
    return torch.cat((t.reshape(1), angle.sin(), angle.cos()))


def check_frequencies(frequencies: int) -> None:
    """Refuse what is not a number of frequencies.

    Raises:
        ValueError: not an integer, or below 0.
    """
    if isinstance(frequencies, bool) or not isinstance(frequencies, int) or frequencies < 0:
        raise ValueError(f"frequencies={frequencies!r} must be a number, 0 for t alone")
