"""Maximum likelihood."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnf.flow import Flow

__all__ = ["MaximumLikelihood"]


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a batch, in nats.

        loss = -1/B sum_i log p(x_i | context_i)

    Args:
        flow: the flow to train.

    Raises:
        TypeError: not a Flow.

    Example:
        >>> import cnf, torch
        >>> objective = MaximumLikelihood(cnf.FFJORD(2))
        >>> objective(torch.randn(16, 2)).shape
        torch.Size([])
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None, **choices: Any) -> Tensor:
        """The loss, a scalar.

        Args:
            x: batch (B, *event).
            context: (B, C) or None.
            choices: `divergence=`, `solver=`, `generator=` for this call.
        """
        return -self.flow.log_prob(x, context, **choices).mean()
