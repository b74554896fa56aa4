"""FFJORD's network: layers gated and shifted by time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cnf.fields.activations import activation as make_activation
from cnf.fields.base import VectorField, check_sizes

__all__ = ["ConcatSquashField"]


class _ConcatSquashLinear(nn.Module):
    """(W x + b) * sigmoid(w_t s + b_t) + w_bt s, with s = (t, context)."""

    def __init__(self, n_in: int, n_out: int, conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.gate = nn.Linear(conditions, n_out)
        self.shift = nn.Linear(conditions, n_out, bias=False)

    def forward(self, s: Tensor, x: Tensor) -> Tensor:
        return self.linear(x) * torch.sigmoid(self.gate(s)) + self.shift(s)


class ConcatSquashField(VectorField):
    """FFJORD's vector field: a perceptron whose every layer is gated and shifted by time.

        layer(t, x) = (W x + b) * sigmoid(w_t t + b_t) + w_bt t

    Context, where there is any, stands beside t in the gates and shifts.

    Args:
        features: dimensions of a sample, D, or its shape.
        hidden: widths of the hidden layers.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", ...) or a module.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, an unknown activation, x or context of a wrong
            shape.

    Reference: Grathwohl et al., arXiv 1810.01367.

    Example:
        >>> field = ConcatSquashField(2, hidden=(64, 64, 64))
        >>> field(torch.tensor(0.5), torch.randn(10, 2)).shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "tanh",
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        widths = [self.dims, *hidden, self.dims]
        self.layers = nn.ModuleList(
            _ConcatSquashLinear(n_in, n_out, 1 + context) for n_in, n_out in pairwise(widths)
        )
        self.activations = nn.ModuleList(make_activation(activation) for _ in hidden)

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        s = t.reshape(1)  # (1,), or (B, 1 + C) with context
        if context is not None:
            s = torch.cat((s.expand(len(context), 1), context), -1)
        *hidden, output = self.layers
        for layer, activation in zip(hidden, self.activations, strict=True):
            x = activation(layer(s, x))
        return output(s, x)
