"""How time and context enter a convolutional network: they scale and shift what its layers give.

Time features tau (S,) are those of one time; (B, S) of a time of each sample.

A layer is (K * h + b) scale + shift. Scales are by channel, and shifts do not depend on the state:
so the Jacobian is that of the kernels, but for factors of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.conv_layers import Conv, more_channels

__all__ = ["Concat", "ConcatSquash", "Film", "Modulation", "modulated"]

Modulation = tuple[Tensor | None, Tensor | None]
"""Scale (H, 1, 1) or (B, H, 1, 1), and shift, so or of images (B or 1, H, height, width); None for
1 and for 0. A scale never comes without a shift."""


def modulated(a: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """a scale + shift."""
    if shift is None:
        return a
    return a + shift if scale is None else torch.addcmul(shift, a, scale)


class Film(nn.Module):
    """Hidden layers modulated by channel: scale 1 + gamma and shift beta, linear in (tau, context).

    Args:
        channels: of each hidden layer.
        conditions: number of time and context features.

    Shapes:
        tau (S,), context (B, N) or None -> a modulation of each layer, none of the last.
    """

    def __init__(self, channels: Sequence[int], conditions: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.linear = nn.Linear(conditions, 2 * sum(channels))

    def forward(self, tau: Tensor, context: Tensor | None) -> list[Modulation]:
        """Scales and shifts (H, 1, 1), or (B, H, 1, 1) with context."""
        gamma, beta = _by_channel(self.linear, tau, context).chunk(2, -3)
        scales, shifts = (1 + gamma).split(self.channels, -3), beta.split(self.channels, -3)
        return [*zip(scales, shifts, strict=True), (None, None)]


class ConcatSquash(nn.Module):
    """Layers gated and shifted by channel: scale sigmoid(w s + v), shift u s, s = (tau, context).

    Args:
        channels: of each layer, the last too.
        conditions: number of time and context features.
        gated_output: whether the last layer has a gate too.

    Shapes:
        tau (S,), context (B, N) or None -> a modulation of each layer.
    """

    def __init__(self, channels: Sequence[int], conditions: int, *, gated_output: bool) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.gated = self.channels if gated_output else self.channels[:-1]
        self.gate = nn.Linear(conditions, sum(self.gated))
        self.shift = nn.Linear(conditions, sum(channels), bias=False)

    def forward(self, tau: Tensor, context: Tensor | None) -> list[Modulation]:
        """Gates and shifts (H, 1, 1), or (B, H, 1, 1) with context."""
        gates = torch.sigmoid(_by_channel(self.gate, tau, context)).split(self.gated, -3)
        shifts = _by_channel(self.shift, tau, context).split(self.channels, -3)
        return list(zip_longest(gates, shifts))


class Concat(nn.Module):
    """tau and context as more channels of each layer's input, constant over the image.

    Padded by zeros like the others, they shift pixels near the border less: by s (K_s * 1).

    Args:
        layers: the network's convolutions.
        sizes: (H, W) of the images before each layer.
        conditions: number of time and context features.

    Shapes:
        tau (S,), context (B, N) or None -> a modulation of each layer.
    """

    def __init__(
        self, layers: Iterable[Conv], sizes: Sequence[tuple[int, int]], conditions: int
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(more_channels(layer, conditions) for layer in layers)

    def forward(self, tau: Tensor, context: Tensor | None) -> list[Modulation]:
        """Shifts (1, H, height, width), or (B, H, height, width) with context."""
        s = tau.unsqueeze(0) if tau.ndim == 1 else tau
        if context is not None:
            s = torch.cat((s.expand(context.shape[0], -1), context), 1)
        s = s.unflatten(1, (-1, 1, 1))
        pairs = zip(self.layers, self.sizes, strict=True)
        return [(None, layer(s.expand(-1, -1, *size))) for layer, size in pairs]


def _by_channel(layer: nn.Linear, tau: Tensor, context: Tensor | None) -> Tensor:
    """The layer of (tau, context): (n, 1, 1), or (B, n, 1, 1) with context or several times."""
    weight = layer.weight
    if context is None:
        return F.linear(tau, weight, layer.bias).unflatten(-1, (-1, 1, 1))
    of_time, of_context = weight.split((tau.shape[-1], context.shape[1]), 1)
    both = torch.addmm(F.linear(tau, of_time, layer.bias), context, of_context.t())
    return both.unflatten(-1, (-1, 1, 1))
