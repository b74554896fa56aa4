"""Images of whole numbers: fewer grey levels, mirrored copies, and black or white at random.

Reference:
    Salakhutdinov & Murray, On the quantitative analysis of deep belief networks, ICML 2008, which
    takes grey levels of MNIST as probabilities.
    Kingma & Dhariwal, Glow: Generative flow with invertible 1x1 convolutions, arXiv 1807.03039,
    which models 5 bits of each pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnf.checks import check_number

__all__ = ["random_binarization", "random_horizontal_flip", "reduce_bits"]


def reduce_bits(images: Tensor, bits: int) -> Tensor:
    """Keep the leading bits of each pixel: 256 grey levels become 2^bits.

        x // 2^(8 - bits)

    Args:
        images: pixels of any shape, uint8.
        bits: how many bits to keep, 1 to 8.

    Returns:
        Pixels from 0 to 2^bits - 1, uint8.

    Raises:
        TypeError: if images are not uint8.
        ValueError: if bits is not 1 to 8.

    Example:
        >>> reduce_bits(torch.tensor([0, 7, 8, 255], dtype=torch.uint8), 5)
        tensor([ 0,  0,  1, 31], dtype=torch.uint8)
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        seen = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of uint8, got {seen}; bits are those of bytes")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be an integer from 1 to 8")
    return images >> (8 - bits)


def random_horizontal_flip(
    images: Tensor, generator: torch.Generator | None = None, p: float = 0.5
) -> Tensor:
    """Mirror each image, left to right, with probability p.

    Args:
        images: batch (B, C, H, W) of any dtype. It is not changed.
        generator: source of randomness; None for PyTorch's own.
        p: the probability, of each image for itself.

    Returns:
        The batch (B, C, H, W), some of it mirrored.

    Raises:
        TypeError: if p is no number, or images are no tensor.
        ValueError: if p is no probability, or images are no batch of images.

    Example:
        >>> random_horizontal_flip(torch.tensor([[[[1, 2, 3]]]]), p=1.0)
        tensor([[[[3, 2, 1]]]])
    """
    check_number("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p={p!r} must be a probability, from 0 to 1")
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor (B, C, H, W), got {type(images).__name__}; "
            "use torch.as_tensor"
        )
    if images.ndim != 4:
        raise ValueError(
            f"images must be a batch (B, C, H, W), got {tuple(images.shape)}; "
            "use images.unsqueeze(0) for a single one"
        )
    device = images.device if generator is None else generator.device
    mirrored = torch.rand(len(images), generator=generator, device=device) < p  # (B,)
    return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def random_binarization(
    images: Tensor, generator: torch.Generator | None = None, levels: int = 256
) -> Tensor:
    """Make each pixel white or black at random, the whiter it is the likelier white.

        P(1) = x / (levels - 1)

    As `fit(augment=...)` it binarises dynamically: every batch anew. Give other levels by
    `functools.partial(random_binarization, levels=17)`.

    Args:
        images: pixels of any shape, from 0 to levels - 1. They are not changed.
        generator: source of randomness; None for PyTorch's own.
        levels: number of grey levels; 2 where the pixels are probabilities, from 0 to 1.

    Returns:
        Pixels of 0 and 1, of the shape and dtype of the images.

    Raises:
        TypeError: if images are no tensor.
        ValueError: if levels is no integer of 2 or more, or pixels are beyond them.

    Example:
        >>> random_binarization(torch.tensor([[0, 255]], dtype=torch.uint8))
        tensor([[0, 1]], dtype=torch.uint8)
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels={levels!r} must be an integer of 2 or more")
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor, got {type(images).__name__}; use torch.as_tensor"
        )
    if not bool(((images >= 0) & (images <= levels - 1)).all()):
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"images must hold pixels from 0 to {levels - 1} for levels={levels}, got values from "
            f"{low:.6g} to {high:.6g}; give levels=, the number of grey levels"
        )
    device = images.device if generator is None else generator.device
    drawn = torch.rand(images.shape, generator=generator, device=device).to(images.device)
    return (drawn * (levels - 1) < images).to(images.dtype)
