"""A multilayer perceptron as a vector field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from cnf.fields.activations import activation as make_activation
from cnf.fields.base import VectorField, check_sizes

__all__ = ["MLPField"]


class MLPField(VectorField):
    """A vector field by a multilayer perceptron.

        f(t, x, c) = W_n s(... s(W_1 [x, tau(t), c] + b_1) ...) + b_n
        tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        hidden: widths of the hidden layers, any number of them.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", "silu", ...) or a module.
        frequencies: number of Fourier frequencies by which time enters, 0 for t alone.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, an unknown activation, x or context of a wrong
            shape.

    Example:
        >>> field = MLPField(2, hidden=(64, 64), context=3)
        >>> field(torch.tensor(0.5), torch.randn(10, 2), torch.randn(10, 3)).shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        frequencies: int = 3,
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        if isinstance(frequencies, bool) or not isinstance(frequencies, int) or frequencies < 0:
            raise ValueError(f"frequencies={frequencies!r} must be a number, 0 for t alone")
        self.frequencies = frequencies
        self.inputs = [self.dims, 1 + 2 * frequencies, *([context] if context else [])]
        widths = [sum(self.inputs), *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), make_activation(activation)]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], self.dims))

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        first, *layers = cast("tuple[nn.Linear, ...]", tuple(self.network))
        # The rows of W^T for x, tau and c: time is added once a batch, and products with few
        # columns, as in the gradient with respect to x, are several times faster this way round.
        weight = first.weight.t().contiguous()  # (D + T + C, H)
        of_x, of_time, *of_context = weight.split(self.inputs)
        bias = torch.addmv(first.bias, of_time.t(), self._time_features(t))  # (H,)
        if context is not None:
            bias = torch.addmm(bias, context, of_context[0])  # (B, H)
        h = torch.addmm(bias, x, of_x)  # (B, H)
        for layer in layers:
            h = layer(h)
        return h  # (B, D)

    def _time_features(self, t: Tensor) -> Tensor:
        if not self.frequencies:
            return t.reshape(1)
        k = torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        angle = math.pi * k * t
        return torch.cat((t.reshape(1), angle.sin(), angle.cos()))  # (T,)
