"""Conditioners: networks that predict the parameters of a coupling from the dimensions it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from cnf.fields.activations import ACTIVATIONS, activation
from cnf.fields.base import check_sizes
from cnf.fields.conv_image import ContextImage, image_features

__all__ = ["MLP", "Conditioner", "ConvNet", "default_conditioner", "make_activation", "zeroed"]

Conditioner = Callable[[tuple[int, ...], tuple[int, ...], int], nn.Module]
"""conditioner(inputs, outputs, context) -> a module of (x (B, *inputs), context (B, C) or None)
that returns (B, *outputs)."""

_NAMES = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, **ACTIVATIONS}  # kinks do no harm here


def make_activation(choice: str | nn.Module) -> nn.Module:
    """A new activation module of a conditioner, from its name or as a copy of a module."""
    made = activation(choice, _NAMES)
    if isinstance(made, nn.ReLU) and not isinstance(choice, nn.Module):
        made.inplace = True  # of what a layer has just made: saves a pass through memory
    return made


class MLP(nn.Module):
    """A multilayer perceptron of (x, context), zero at first.

    Args:
        inputs: shape of x.
        outputs: shape of what it returns.
        context: number of context features, 0 for none.
        hidden: widths of the hidden layers.
        activation: by name ("relu", "silu", "tanh", ...) or an elementwise module.

    Shapes:
        x (B, *inputs), context (B, C) -> (B, *outputs).

    Raises:
        ValueError: sizes that are not positive, an unknown activation.

    Example:
        >>> MLP((3,), (2, 4), context=5)(torch.randn(10, 3), torch.randn(10, 5)).shape
        torch.Size([10, 2, 4])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        check_sizes("hidden", hidden)
        widths = [math.prod(inputs) + context, *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), make_activation(activation)]
        last = zeroed(nn.Linear(widths[-1], math.prod(outputs)))
        self.network = nn.Sequential(*layers, last)
        self.outputs = tuple(outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, *outputs) for x (B, *inputs) and context (B, C)."""
        x = x.flatten(1)
        if context is not None:
            x = torch.cat([x, context], 1)
        return cast(Tensor, self.network(x).reshape(x.shape[0], *self.outputs))


class ConvNet(nn.Module):
    """A convolutional network of (image, context), zero at first: Glow's 3x3, 1x1, 3x3.

    Args:
        inputs: shape of x (C, H, W).
        outputs: shape of what it returns (C', H, W).
        context: number of context features N, 0 for none; they shift every hidden channel.
        hidden: channels of the hidden layers; the first and last kernels are 3x3, the others 1x1.
        activation: by name ("relu", "silu", "tanh", ...) or an elementwise module.
        context_shape: shape of a context that is an image (C'', H', W'), None for a vector. The
            context is that image, flattened: N = C'' H' W'. Its channels are joined to those of x.
            H' and W' are H and W, or a multiple by one factor, as where a coupling works on
            squeezed images: then its blocks of pixels become channels (`torch.nn.PixelUnshuffle`).

    Shapes:
        x (B, C, H, W), context (B, N) -> (B, C', H, W).

    Raises:
        ValueError: sizes that are not positive, an unknown activation, shapes that do not fit.

    Reference: Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> ConvNet((1, 4, 4), (2, 4, 4))(torch.randn(10, 1, 4, 4)).shape
        torch.Size([10, 2, 4, 4])
        >>> net = ConvNet((4, 4, 4), (2, 4, 4), context_shape=(3, 8, 8))
        >>> net(torch.randn(10, 4, 4, 4), torch.randn(10, 3 * 8 * 8)).shape
        torch.Size([10, 2, 4, 4])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str | nn.Module = "relu",
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_sizes("hidden", hidden)
        if context_shape is not None:
            context = image_features(context, context_shape)
        if len(inputs) != 3 or len(outputs) != 3 or tuple(inputs[1:]) != tuple(outputs[1:]):
            raise ValueError(
                f"inputs={tuple(inputs)!r} and outputs={tuple(outputs)!r} must be shapes (C, H, W) "
                "of one height and width"
            )
        if context and not hidden:
            raise ValueError("hidden=() leaves context no layer to enter by; use such as (64, 64)")
        widths = [inputs[0], *hidden]
        self.layers = nn.ModuleList()
        self.activations = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            self.layers.append(nn.Conv2d(n_in, n_out, 1 if i else 3, padding=0 if i else 1))
            self.activations.append(make_activation(activation))
        self.image: nn.Module | None = None
        self.contexts = nn.ModuleList()
        if context_shape is not None:
            first = cast(nn.Conv2d, self.layers[0])
            self.image = ContextImage(context_shape, inputs[1:], first)
        elif context:
            self.contexts.extend(nn.Linear(context, n) for n in hidden)
        self.last = zeroed(nn.Conv2d(widths[-1], outputs[0], 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C', H, W) for x (B, C, H, W) and context (B, N)."""
        for i, (layer, bend) in enumerate(zip(self.layers, self.activations, strict=True)):
            x = layer(x)
            if context is not None and self.image is None:
                x = x + self.contexts[i](context)[:, :, None, None]
            elif context is not None and self.image is not None and not i:
                x = x + self.image(context)
            x = bend(x)
        return cast(Tensor, self.last(x))


def default_conditioner(
    event_shape: tuple[int, ...], hidden: Sequence[int], activation: str | nn.Module
) -> Conditioner:
    """Convolutions for images (C, H, W), a perceptron for everything else."""
    kind = ConvNet if len(event_shape) == 3 else MLP
    return lambda inputs, outputs, context: kind(
        inputs, outputs, context, hidden=hidden, activation=activation
    )


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer with zero weights: flows start from the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
