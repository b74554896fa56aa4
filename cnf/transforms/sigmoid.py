"""`Sigmoid`: the real line to the unit interval; its inverse is the logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from cnf.checks import check_number
from cnf.ode.inputs import check_floating
from cnf.transforms.base import Choices, Transform, check_choices, check_no_context
from cnf.transforms.columns import check_columns, chosen_columns, of_columns

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sigmoid"]


class Sigmoid(Transform):
    """The real line to the unit interval, number by number; the inverse is the logit.

        x = (sigmoid(z) - alpha) / (1 - 2 alpha),    z = logit(alpha + (1 - 2 alpha) x)
        log dx/dz = log sigmoid(z) + log sigmoid(-z) - log(1 - 2 alpha)

    With alpha the closed interval [0, 1] has finite logits, between -logit(1 - alpha) and
    logit(1 - alpha). In turn a z beyond these gives an x outside of it, by alpha / (1 - 2 alpha) at
    most; `UniformDequantization` behind it takes that to the nearest level.

    Args:
        alpha: between 0 and 0.5; published results have 0.05 for CIFAR-10, 1e-6 for MNIST.
        columns: which entries of the last dimension it is for, by index; the others, such as the
            real columns of a table, stay as they are. None for all.

    Shapes:
        z, x of any shape. The log-determinant is that of each number, and has the shape of x; a
        `Compose` or `Flow` sums it over samples.

    Raises:
        TypeError: x of another dtype than float32 and float64.
        ValueError: alpha that is not between 0 and 0.5, or lost in the rounding of x; columns that
            are not different, or beyond x; x without a logit in `inverse`, which has no
            log-determinant to say so (elsewhere that is -inf, and so is log_prob).

    Reference: Dinh et al., arXiv 1605.08803, section 4.1.

    Example:
        >>> f = Sigmoid(0.05)
        >>> f.forward(torch.zeros(2)), f.inverse(torch.tensor([0.0, 1.0]))
        (tensor([0.5000, 0.5000]), tensor([-2.9444,  2.9444]))
    """

    takes_context = False
    bounded = True

    def __init__(self, alpha: float = 0.05, columns: Sequence[int] | None = None) -> None:
        super().__init__()
        self.columns = None if columns is None else check_columns(columns)
        check_number("alpha", alpha)
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha={alpha!r} must lie between 0 and 0.5, such as 0.05")
        self.alpha = float(alpha)

    def codomain(self, event_shape: tuple[int, ...]) -> constraints.Constraint:
        """The interval from -alpha / (1 - 2 alpha) to 1 + alpha / (1 - 2 alpha)."""
        beyond = self.alpha / (1 - 2 * self.alpha)
        return of_columns(constraints.interval(-beyond, 1 + beyond), self.columns, event_shape)

    def extra_repr(self) -> str:
        """Alpha, and the columns."""
        return f"alpha={self.alpha}" + (f", columns={self.columns}" if self.columns else "")

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x in the unit interval and log dx/dz, of every number."""
        self._check(z, context, choices)
        x = (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)
        return self._of_columns(
            z, x, F.logsigmoid(z) + F.logsigmoid(-z) - math.log1p(-2 * self.alpha)
        )

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """The logit z of x and log dz/dx, of every number; 0 and -inf where x has none."""
        self._check(x, context, choices)
        # Each from its own side: 1 - s would lose the digits of an s near 1.
        s, rest = (self.alpha + (1 - 2 * self.alpha) * side for side in (x, 1 - x))
        outside = torch.minimum(s, rest) <= 0  # NaN stays NaN
        log_s, log_rest = (side.masked_fill(outside, 0.5).log() for side in (s, rest))
        log_det = math.log1p(-2 * self.alpha) - log_s - log_rest
        return self._of_columns(x, log_s - log_rest, log_det.masked_fill(outside, -torch.inf))

    def _of_columns(self, x: Tensor, value: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The value and log-determinant, x and 0 in the other columns."""
        if self.columns is None:
            return value, log_det
        chosen = chosen_columns(self.columns, x)
        return torch.where(chosen, value, x), torch.where(chosen, log_det, 0.0)

    def _check(self, x: Tensor, context: Tensor | None, choices: Choices) -> None:
        check_choices(choices)
        check_no_context(self, context)
        check_floating(x)
        if self.alpha < torch.finfo(x.dtype).eps:
            raise ValueError(
                f"alpha={self.alpha} is too small for {str(x.dtype).removeprefix('torch.')}: "
                "1 - alpha rounds to 1, whose logit is infinite; use 1e-6 or more"
            )
