"""Maximum likelihood."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from cnf.checks import check_choice, tracing
from cnf.flow import Flow
from cnf.warn import warn

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

    Warns:
        RuntimeWarning: a mean log-probability of integers above 0, which is the solver's error.

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
        if self.flow.transform.quantized and not tracing() and nats.detach() < 0:
            warn(
                f"the mean log-probability of a batch of integers is {-nats.item():.4g} nats, and "
                "none is above 0: the steps of the solver are too coarse for what the field has "
                "become; use an adaptive method, tighter tolerances or more steps"
            )
        if self.unit == "nats":
            return nats
        return nats / (math.prod(self.flow.event_shape) * math.log(2))
