"""A linear layer with a mask on its weights."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MaskedLinear"]


class MaskedLinear(nn.Linear):
    """A linear layer in which an output sees some of the inputs.

        y = (W * M) x + b

    The mask is no part of the state. It is written anew when weights are loaded, because buffers
    that come from the meta device are empty memory.

    Args:
        sees: M (outputs, inputs), boolean, on the CPU.

    Example:
        >>> import torch
        >>> layer = MaskedLinear(torch.tensor([[True, False]]))
        >>> torch.equal(layer(torch.tensor([[0.0, 5.0]])), layer.bias[None])
        True
    """

    mask: Tensor

    def __init__(self, sees: Tensor) -> None:
        super().__init__(sees.shape[1], sees.shape[0])
        self._sees = sees
        self.register_buffer("mask", sees.to(self.weight), persistent=False)

    def masked_weight(self) -> Tensor:
        """W * M."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.masked_weight(), self.bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.mask.is_meta:
            self.mask = self._sees.to(self.weight)  # which load_state_dict(assign=True) has given
        else:
            self.mask.copy_(self._sees)
