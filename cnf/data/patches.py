"""Small squares of photographs, a standard test of density estimators (BSDS300).

    train = remove_mean(image_patches(read_pictures("BSDS300/train"), 100_000))  # (100000, 63)

Reference:
    Uria et al., Neural autoregressive distribution estimation, arXiv 1605.02226, section 7.3.2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnf.checks import check_count
from cnf.data.density import Source

__all__ = ["image_patches", "read_pictures", "remove_mean"]


def read_pictures(folder: str | os.PathLike[str]) -> list[NDArray[np.uint8]]:
    """The pictures in a folder as grey values (H, W), 0 to 255, in the order of their names.

    Args:
        folder: a folder of pictures alone, but for hidden files.

    Raises:
        ImportError: if Pillow is not installed.
        FileNotFoundError: if there is no such folder, or nothing in it.
        ValueError: if Pillow cannot read one of the files.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading pictures needs Pillow; pip install "cnf[examples]"') from error
    path, pictures = Path(folder), []
    files = sorted(path.iterdir()) if path.is_dir() else []
    for file in files:
        if file.name.startswith("."):
            continue
        try:
            with Image.open(file) as picture:
                pictures.append(np.asarray(picture.convert("L")))
        except (UnidentifiedImageError, IsADirectoryError, PermissionError) as error:
            raise ValueError(
                f"folder {str(path)!r} holds {file.name!r}, which Pillow cannot read as a picture; "
                "move it elsewhere"
            ) from error
    if not pictures:
        raise FileNotFoundError(f"folder {str(path)!r} is not a folder with pictures in it")
    return pictures


def image_patches(
    pictures: Sequence[NDArray[Any]],
    n: int,
    *,
    size: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Squares at random places of random pictures, as numbers in [0, 1).

        (pixel + u) / 256,    u uniform in [0, 1)

    Args:
        pictures: grey values (H, W) of each picture, integers from 0 to 255.
        n: number of patches.
        size: side of a patch, in pixels.
        generator: source of all randomness; None seeds one by 0.

    Returns:
        The patches (n, size, size), float32; floor(256 x) are the pixels.

    Raises:
        ValueError: if n or size is not positive, there is no picture, or one is smaller than a
            patch or holds no grey values.

    Example:
        >>> picture = np.random.default_rng(0).integers(0, 256, (20, 30))
        >>> image_patches([picture], 100).shape
        torch.Size([100, 8, 8])
    """
    check_count("n", n)
    check_count("size", size)
    grey = [_as_grey(picture, size, i) for i, picture in enumerate(pictures)]
    if not grey:
        raise ValueError("pictures is empty; expected an array (H, W) at least")
    generator = generator or torch.Generator().manual_seed(0)
    source = Source(generator, torch.float64, torch.device("cpu"))
    chosen = source.index(len(grey), n)
    places = source.uniform(n, 2)
    patches = torch.empty(n, size, size, device="cpu")
    for i, picture in enumerate(grey):
        windows = picture.unfold(0, size, 1).unfold(1, size, 1)  # (rows, columns, size, size)
        mine = (chosen == i).nonzero().flatten()
        row, column = (places[mine] * places.new_tensor(windows.shape[:2])).long().unbind(1)
        patches[mine] = windows[row, column].float()
    # In steps that float32 holds exactly behind 8 bits: nothing is rounded up to the next pixel.
    noise = torch.randint(2**16, patches.shape, generator=generator, device="cpu") / 2**16
    return (patches + noise) / 256


def remove_mean(patches: Tensor) -> Tensor:
    """Patches (n, H, W) less the mean of each, and without the last pixel: (n, H W - 1).

    That pixel is minus the sum of the others; with it there would be no density.

    Raises:
        ValueError: if patches have another shape, or a single pixel.

    Example:
        >>> remove_mean(torch.tensor([[[0.0, 1.0], [2.0, 5.0]]]))
        tensor([[-2., -1.,  0.]])
    """
    if patches.ndim != 3 or patches.shape[1] * patches.shape[2] < 2:
        raise ValueError(
            f"patches must be (n, H, W) of two pixels or more, got {tuple(patches.shape)}"
        )
    x = patches.flatten(1)
    return (x - x.mean(1, keepdim=True))[:, :-1]


def _as_grey(picture: NDArray[Any], size: int, index: int) -> Tensor:
    """The grey values (H, W), checked."""
    grey = np.asarray(picture)
    if grey.ndim != 2 or grey.dtype.kind not in "iu" or min(grey.shape) < size:
        raise ValueError(
            f"pictures[{index}] must hold integers (H, W), at least {size} x {size}, "
            f"got {grey.dtype} {grey.shape}; average the channels, or use read_pictures"
        )
    if grey.min() < 0 or grey.max() > 255:
        raise ValueError(
            f"pictures[{index}] must hold grey values from 0 to 255, got {grey.min()} to "
            f"{grey.max()}"
        )
    return torch.from_numpy(grey.astype(np.uint8))
