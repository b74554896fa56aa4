"""Convolutions that keep, halve or double the size of images, and their linear parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.base import check_sizes
from cnf.fields.closed_form import is_linear

__all__ = ["Conv", "adjoint", "convolutions", "image_sizes", "is_known", "linear", "more_channels"]

Conv = nn.Conv2d | nn.ConvTranspose2d


def convolutions(
    channels: Sequence[int], kernel_size: int | Sequence[int], strides: Sequence[int]
) -> list[Conv]:
    """Layers of channels[0] -> channels[1] -> ..., padded by zeros.

    Args:
        channels: one number more than there are layers.
        kernel_size: odd, for all layers of stride 1; or one for each layer, 4 at other strides.
        strides: 1 keeps the size of an image, 2 halves it, -2 doubles it (a transposed convolution;
            both with kernels of 4 and padding by 1).

    Raises:
        ValueError: kernels that are even or not one a layer.
    """
    sizes = _kernel_sizes(kernel_size, strides)
    layers: list[Conv] = []
    for (n_in, n_out), k, stride in zip(pairwise(channels), sizes, strides, strict=True):
        if stride == -2:
            layers.append(nn.ConvTranspose2d(n_in, n_out, k, stride=2, padding=1))
        else:
            layers.append(nn.Conv2d(n_in, n_out, k, stride, padding=(k - 1) // 2))
    return layers


def more_channels(layer: Conv, channels: int) -> Conv:
    """What more channels of a layer's input add to its output: K * these, without a bias.

    Its kernel is random as if the layer had been built with them.
    """
    k, stride = layer.kernel_size[0], layer.stride[0]
    extra = type(layer)(channels, layer.out_channels, k, stride, padding=(k - 1) // 2, bias=False)
    with torch.no_grad():
        extra.weight.mul_(math.sqrt(channels / (channels + layer.in_channels)))
    return extra


def image_sizes(size: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(H, W) before each layer, and after the last.

    Args:
        size: (H, W) of the image.
        strides: 1, 2 or -2 for each layer.

    Raises:
        ValueError: another stride, an odd size at a stride of 2, or another size at the end.
    """
    if any(type(s) is not int or s not in (1, 2, -2) for s in strides):
        raise ValueError(
            f"strides={tuple(strides)!r} must be 1, 2 (halves an image) or -2 (doubles it)"
        )
    height, width = size
    sizes = [(height, width)]
    for i, stride in enumerate(strides):
        if stride == 2 and (height % 2 or width % 2):
            raise ValueError(
                f"strides={tuple(strides)!r}: layer {i + 1} cannot halve images of {height} x "
                f"{width}, an odd size; pad or crop the images, or use stride 1 there"
            )
        if stride == 2:
            height, width = height // 2, width // 2
        elif stride == -2:
            height, width = 2 * height, 2 * width
        sizes.append((height, width))
    if sizes[-1] != sizes[0]:
        raise ValueError(
            f"strides={tuple(strides)!r} turn images of {size[0]} x {size[1]} into {height} x "
            f"{width}, but a field keeps their size; use as many strides of -2 as of 2"
        )
    return sizes


def is_known(layer: nn.Module) -> bool:
    """Whether a layer is a convolution as `convolutions` builds them."""
    if isinstance(layer, nn.ConvTranspose2d):
        form = 4, 2, is_linear(layer, nn.ConvTranspose2d) and layer.output_padding == (0, 0)
    elif isinstance(layer, nn.Conv2d):
        k = layer.kernel_size[0]
        form = k, 1 if k % 2 else 2, is_linear(layer, nn.Conv2d) and (k % 2 == 1 or k == 4)
    else:
        return False
    k, stride, own = form
    return (
        own
        and layer.kernel_size == (k, k)
        and layer.stride == (stride, stride)
        and layer.padding == ((k - 1) // 2, (k - 1) // 2)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def linear(layer: nn.Module, h: Tensor) -> Tensor:
    """K * h, without the bias, for a known layer."""
    return _convolved(layer, h, transposed=isinstance(layer, nn.ConvTranspose2d))


def adjoint(layer: nn.Module, g: Tensor) -> Tensor:
    """The transpose of K on g, of the shape of the layer's output, for a known layer."""
    return _convolved(layer, g, transposed=not isinstance(layer, nn.ConvTranspose2d))


def _convolved(layer: nn.Module, h: Tensor, *, transposed: bool) -> Tensor:
    known = cast(Conv, layer)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    padding = (known.kernel_size[0] - 1) // 2
    return convolve(h, known.weight, stride=known.stride[0], padding=padding)


def _kernel_sizes(kernel_size: int | Sequence[int], strides: Sequence[int]) -> Sequence[int]:
    sizes = kernel_size
    if isinstance(sizes, int):
        sizes = [sizes if stride == 1 else 4 for stride in strides]
    check_sizes("kernel_size", sizes, "such as 3")
    if len(sizes) != len(strides):
        raise ValueError(
            f"kernel_size={kernel_size!r} names {len(sizes)} layers, but there are {len(strides)}: "
            "give one for each hidden layer and one for the last, or a single number"
        )
    for k, stride in zip(sizes, strides, strict=True):
        if stride == 1 and k % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size!r} must be odd, so that images keep their size"
            )
        if stride != 1 and k != 4:
            raise ValueError(
                f"kernel_size={kernel_size!r} must be 4 where the stride is 2 or -2, so that "
                "images are halved and doubled"
            )
    return sizes
