"""Context that is an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from cnf.fields.base import check_sizes
from cnf.fields.conv_layers import Conv, more_channels

__all__ = ["ContextImage", "image_features"]


class ContextImage(nn.Module):
    """What a context image adds to a layer, as more channels of the layer's input.

    An image that is some factor larger is folded: blocks of factor x factor pixels become channels,
    as by `torch.nn.PixelUnshuffle`.

    Args:
        shape: of the context image, (C', H', W').
        size: (H, W) of the layer's input.
        layer: the convolution.

    Shapes:
        context (B, C' H' W') -> of the layer's output, (B, n, height, width).

    Raises:
        ValueError: H' and W' are not one multiple of H and W.

    Example:
        >>> import torch
        >>> join = ContextImage((3, 8, 8), (4, 4), torch.nn.Conv2d(1, 5, 3, padding=1))
        >>> join(torch.randn(10, 3 * 8 * 8)).shape
        torch.Size([10, 5, 4, 4])
    """

    def __init__(self, shape: Sequence[int], size: Sequence[int], layer: Conv) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.factor = self.shape[1] // size[0]
        if not self.factor or self.shape[1:] != (self.factor * size[0], self.factor * size[1]):
            raise ValueError(
                f"context_shape={self.shape} does not fit images of {size[0]} x {size[1]}: the "
                "height and width must be theirs, or a multiple by one factor; resize the context "
                "image"
            )
        self.layer = more_channels(layer, self.shape[0] * self.factor**2)

    def forward(self, context: Tensor) -> Tensor:
        """(B, n, height, width) of context (B, C' H' W')."""
        channels, height, width = self.shape
        f = self.factor
        blocks = context.unflatten(1, (channels, height // f, f, width // f, f))
        image = blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # also of no samples
        return cast(Tensor, self.layer(image))


def image_features(context: int, shape: Sequence[int]) -> int:
    """The number of features of a context image, where `context` is 0 or that number.

    Raises:
        ValueError: the shape is no image's, or `context` is another number.
    """
    check_sizes("context_shape", shape, "the shape of an image (C, H, W)")
    features = math.prod(shape)
    if len(shape) != 3:
        raise ValueError(f"context_shape={tuple(shape)} must be the shape of an image, (C, H, W)")
    if context not in (0, features):
        raise ValueError(
            f"context={context!r} does not fit context_shape={tuple(shape)}, which has {features} "
            f"features; use context={features}, or leave it out"
        )
    return features
