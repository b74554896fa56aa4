"""Which columns of a sample a transform of single numbers is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transforms

__all__ = ["Columns", "LessThanEq", "check_columns", "chosen_columns", "of_columns"]


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


class Columns(constraints.Constraint):
    """Vectors with a constraint for each number; torch's `stack`, as one of whole vectors."""

    event_dim = 1

    def __init__(self, columns: Sequence[constraints.Constraint]) -> None:
        super().__init__()
        self.columns = columns

    def check(self, value: Tensor) -> Tensor:
        """Whether all numbers (*batch, D) are as they must be (*batch,)."""
        return constraints.stack(self.columns, -1).check(value).all(-1)

    def __repr__(self) -> str:
        return f"Columns({self.columns})"


class LessThanEq(constraints.less_than):
    """Real numbers up to a bound, which belongs to them.

    Example:
        >>> LessThanEq(1.0).check(torch.tensor([1.0, 1.5]))
        tensor([ True, False])
    """

    def check(self, value: Tensor) -> Tensor:
        """Whether value (*shape) is at most the bound, (*shape)."""
        return value <= self.upper_bound


@biject_to.register(LessThanEq)
def _to_less_than(constraint: LessThanEq) -> transforms.Transform:
    return biject_to(constraints.less_than(constraint.upper_bound))


@biject_to.register(Columns)
def _to_columns(constraint: Columns) -> transforms.Transform:
    return transforms.StackTransform([biject_to(each) for each in constraint.columns], -1)


def of_columns(
    own: constraints.Constraint, columns: tuple[int, ...] | None, event_shape: Sequence[int]
) -> constraints.Constraint:
    """A constraint of samples: some columns have their own, the others are real."""
    if columns is None:
        return constraints.independent(own, len(event_shape))
    each = Columns([own if i in columns else constraints.real for i in range(event_shape[-1])])
    return constraints.independent(each, len(event_shape) - 1)
