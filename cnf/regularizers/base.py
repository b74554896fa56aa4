"""What a regulariser is, and what it sees of the path."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from cnf.checks import check_number

__all__ = ["Point", "Regularizer", "of_each", "squared_norm"]


class Point(NamedTuple):
    """One point of the path of every sample, as an integrand sees it.

    Attributes:
        field: f(t, x, context) -> dx (B, *event).
        t: time (), or (B,) under batch="independent".
        x: state (B, *event).
        context: (B, C) or None.
        dx: f there (B, *event), which need not be computed again.
        jacobian_square: ||df/dx||_F^2 (B,), or an unbiased estimate of it, where `uses_jacobian`;
            else None.
    """

    field: Any
    t: Tensor
    x: Tensor
    context: Tensor | None
    dx: Tensor
    jacobian_square: Tensor | None


class Regularizer(ABC):
    """A quantity integrated along the path of a CNF, to be made small.

        loss = -log p(x) + weight int_{t_0}^{t_1} g(t, x(t)) |dt|

    To add one, inherit, as a frozen dataclass with a field `weight`, and

    1. set `name`, under which its mean is logged, other than those of the ones beside it;
    2. write `integrand(point)`: g at one point of the path, (B,), not negative, a function of the
       point and the field's parameters alone, differentiable in both where grad mode is on;
    3. set `uses_jacobian` where g needs `point.jacobian_square`;
    4. override `check_field` where it is not for every field.

    Attributes:
        name: of its term in the log.
        weight: its factor in the loss, 0 or more; the integral itself is without it. With 0 it is
            only reported.
        uses_jacobian: whether the integrand needs the Jacobian's norm.

    Raises:
        TypeError: a weight that is no number.
        ValueError: a weight that is negative or not finite.

    Example:
        >>> import cnf, torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Distance(Regularizer):
        ...     weight: float
        ...     name = "distance"
        ...     def integrand(self, point):
        ...         return point.x.square().sum(-1)
        >>> objective = cnf.MaximumLikelihood(cnf.FFJORD(2), regularizers=[Distance(0.1)])
        >>> objective(torch.randn(16, 2)).shape
        torch.Size([])
    """

    weight: float
    uses_jacobian = False

    def __post_init__(self) -> None:
        check_number("weight", self.weight)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(
                f"weight={self.weight!r} must be finite and not negative, such as 0.01"
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of its term."""

    @abstractmethod
    def integrand(self, point: Point) -> Tensor:
        """g (B,) at one point of the path of each sample."""

    def check_field(self, field: Any) -> None:  # noqa: B027 - any field will do
        """Refuse a field that it cannot regularise.

        Raises:
            TypeError: naming the field that is needed.
        """


def of_each(regularizer: Regularizer, point: Point) -> Tensor:
    """The integrand (B,), checked.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor of another shape.
    """
    value = regularizer.integrand(point)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the integrand of {type(regularizer).__name__} must be a tensor (B,), got "
            f"{type(value).__name__}"
        )
    if value.shape != point.x.shape[:1]:
        raise ValueError(
            f"the integrand of {type(regularizer).__name__} must have the shape (B,) = "
            f"{tuple(point.x.shape[:1])}, got {tuple(value.shape)}; sum over the event"
        )
    return value


def squared_norm(v: Tensor) -> Tensor:
    """|v|^2 of each sample, (B, *event) -> (B,).

    Example:
        >>> import torch
        >>> squared_norm(torch.ones(2, 3))
        tensor([3., 3.])
    """
    square = v.square()
    return square if square.ndim == 1 else square.flatten(1).sum(1)
