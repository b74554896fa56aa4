"""Maximum likelihood."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from cnf.checks import check_choice
from cnf.flow import Flow

__all__ = ["MaximumLikelihood"]

UNITS = ("nats", "bits_per_dim")


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a batch, in nats or in bits for each dimension.

        loss = -1/B sum_i log p(x_i | context_i),    divided by D log 2 for "bits_per_dim"

    Args:
        flow: the flow to train.
        unit: "nats", or "bits_per_dim", in which image models are compared: of a flow of integers
            a bound of their codelength, see `Flow.bits_per_dim`. The gradient is scaled with the
            loss, and so must be a limit of its norm.

    Raises:
        TypeError: not a Flow.
        ValueError: a unit that is not known.

    Example:
        >>> import cnf, torch
        >>> objective = MaximumLikelihood(cnf.FFJORD(2))
        >>> objective(torch.randn(16, 2)).shape
        torch.Size([])
    """

    def __init__(self, flow: Flow, *, unit: str = "nats") -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
        check_choice("unit", unit, UNITS)
        self.flow = flow
        self.unit = unit

    def extra_repr(self) -> str:
        """The unit."""
        return f"unit={self.unit!r}"

    def forward(self, x: Tensor, context: Tensor | None = None, **choices: Any) -> Tensor:
        """The loss, a scalar.

        Args:
            x: batch (B, *event).
            context: (B, C) or None.
            choices: `divergence=`, `solver=`, `generator=` for this call.
        """
        nats = -self.flow.log_prob(x, context, **choices).mean()
        if self.unit == "nats":
            return nats
        return nats / (math.prod(self.flow.event_shape) * math.log(2))
