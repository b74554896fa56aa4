"""Which columns of a sample a transform of single numbers is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["check_columns", "chosen_columns", "of_columns"]


def check_columns(columns: Sequence[int]) -> tuple[int, ...]:
    """Different indices, one at least.

    Raises:
        TypeError: not a sequence.
        ValueError: indices that are negative, no integers, or not different; none at all.

    Example:
        >>> check_columns([0, 2])
        (0, 2)
    """
    if not isinstance(columns, Sequence) or isinstance(columns, str):
        raise TypeError(f"columns={columns!r} must be a sequence of indices, such as (0, 2)")
    whole = all(type(n) is int and n >= 0 for n in columns)
    if not (whole and columns and len(set(columns)) == len(columns)):
        raise ValueError(
            f"columns={tuple(columns)!r} must be different indices from 0, one at least"
        )
    return tuple(columns)


def chosen_columns(columns: tuple[int, ...] | None, x: Tensor) -> Tensor:
    """Which entries of the last dimension of x are meant, (D,); () where all are.

    Raises:
        ValueError: x of too few columns.
    """
    if columns is None:
        return torch.ones((), dtype=torch.bool, device=x.device)
    if x.ndim == 0 or x.shape[-1] <= max(columns):
        raise ValueError(f"x has shape {tuple(x.shape)}, too few columns for columns={columns}")
    return torch.tensor([i in columns for i in range(x.shape[-1])], device=x.device)


def of_columns(
    own: constraints.Constraint, columns: tuple[int, ...] | None, event_shape: Sequence[int]
) -> constraints.Constraint:
    """A constraint of samples: some columns have their own, the others are real."""
    if columns is not None:
        each = [own if i in columns else constraints.real for i in range(event_shape[-1])]
        own = constraints.stack(each, -1)
    return constraints.independent(own, len(event_shape))
