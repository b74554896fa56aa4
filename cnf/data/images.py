"""Images as data for densities: training, validation and test, in whole grey levels.

data = image_data("mnist", "data/MNIST")
data.train  # (55000, 1, 28, 28), uint8
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.data.cifar import CIFAR10_ADDRESS, read_cifar10
from cnf.data.mnist import MNIST_ADDRESS, read_mnist
from cnf.data.pixels import reduce_bits
from cnf.data.vision import torchvision_images

__all__ = ["ImageData", "image_data"]

NAMES = ("digits", "mnist", "cifar10")
FILES = {
    "mnist": f"train-images-idx3-ubyte.gz and t10k-images-idx3-ubyte.gz from {MNIST_ADDRESS}",
    "cifar10": CIFAR10_ADDRESS,
}
DIGITS_TEST = 297  # of the 1797 digits


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images for training, validation and test.

        pixels 0, 1, ..., levels - 1

    Args:
        train: images (N, C, H, W), uint8.
        val: images (N', C, H, W), uint8.
        test: images (N'', C, H, W), uint8.
        levels: number of grey levels, 2 to 256; what a dequantisation must know.
        name: what the data are called.

    Raises:
        TypeError: if images are not uint8 tensors.
        ValueError: if images are not (N, C, H, W), differ in size, or have pixels beyond levels.

    Example:
        >>> ImageData(*torch.zeros(3, 5, 1, 8, 8, dtype=torch.uint8), levels=256, name="black")
        ImageData('black', train 5, val 5, test 5, images (1, 8, 8), levels=256)
    """

    train: Tensor
    val: Tensor
    test: Tensor
    levels: int
    name: str

    def __post_init__(self) -> None:
        levels = self.levels
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
            raise ValueError(f"levels={levels!r} must be an integer from 2 to 256")
        for part in ("train", "val", "test"):
            images = getattr(self, part)
            if not isinstance(images, Tensor) or images.dtype != torch.uint8:
                seen = images.dtype if isinstance(images, Tensor) else type(images).__name__
                raise TypeError(f"{part} must be a tensor of uint8, got {seen}")
            if images.ndim != 4 or images.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{part} must be images (N, C, H, W), all of one size, got "
                    f"{tuple(images.shape)} (train: {tuple(self.train.shape)})"
                )
            if images.numel() and int(images.max()) >= self.levels:
                raise ValueError(
                    f"{part} has a pixel of {int(images.max())}, expected 0 to {self.levels - 1} "
                    f"for levels={self.levels}"
                )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(getattr(self, part))}" for part in ("train", "val", "test"))
        return f"ImageData({self.name!r}, {sizes}, images {self.shape}, levels={self.levels})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def reduce_bits(self, bits: int) -> ImageData:
        """The same images with 2^bits grey levels, bits being 1 to 8.

        Raises:
            ValueError: if bits is not 1 to 8, or the images have not 256 grey levels.
        """
        if self.levels != 256:
            raise ValueError(f"bits are kept of 256 grey levels, {self.name} has {self.levels}")
        parts = (reduce_bits(images, bits) for images in (self.train, self.val, self.test))
        train, val, test = parts
        return replace(self, train=train, val=val, test=test, levels=2**bits)


def image_data(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    val: int | None = None,
    seed: int = 0,
    checksum: bool = True,
) -> ImageData:
    """A data set of images, split in three. Nothing is downloaded.

    "digits" are 1797 digits of 8 x 8 pixels and 17 grey levels, which are inside scikit-learn; they
    are split at random: 297 for test, `val` for validation. All others have 256 grey levels and
    come with a test set; the last `val` images of the training set, in the order of the files, are
    for validation.

    Args:
        name: "digits"; "mnist", see `read_mnist`; "cifar10", see `read_cifar10`; or a class of
            torchvision.datasets, see `torchvision_images`.
        folder: where the files are. "digits" needs none.
        val: number of images for validation; None is 200 of the digits and 5000 of all others.
        seed: of the random split of the digits; the others are split as published.
        checksum: whether "mnist" and "cifar10" must be as published; False for others with the same
            names of files. torchvision has its own checks.

    Returns:
        The images.

    Raises:
        FileNotFoundError: if the files are not there.
        ImportError: if scikit-learn or torchvision is needed and not installed.
        TypeError: if val or seed is no integer.
        ValueError: if name is not known, folder is missing or not needed, val does not leave images
            for training, or a file is damaged.

    Example:
        >>> image_data("digits")
        ImageData('digits', train 1300, val 200, test 297, images (1, 8, 8), levels=17)
    """
    if name == "digits":
        if folder is not None:
            raise ValueError(f"name='digits' needs no folder, got {folder!r}; leave it out")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed={seed!r} must be an integer, got {type(seed).__name__}")
        images = sklearn_digits()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator, device="cpu")
        test, train = images[order].split([DIGITS_TEST, len(images) - DIGITS_TEST])
        return hold_out(train, test, 200 if val is None else val, 17, name)
    if not isinstance(name, str) or not name[:1].isupper():
        other = ", or a class of torchvision.datasets such as FashionMNIST"
        check_choice("name", name, NAMES, other)
    if folder is None:
        place = FILES.get(name, "what torchvision reads")
        raise ValueError(f"name={name!r} needs folder=..., a folder to which you fetched {place}")
    if name == "mnist":
        train, test = read_mnist(folder, checksum=checksum)
    elif name == "cifar10":
        train, test = read_cifar10(folder, checksum=checksum)
    else:
        train, test = (torchvision_images(name, folder, split=part) for part in ("train", "test"))
    return hold_out(train, test, 5000 if val is None else val, 256, name)


def hold_out(train: Tensor, test: Tensor, val: int, levels: int, name: str) -> ImageData:
    """Set the last `val` training images apart."""
    if isinstance(val, bool) or not isinstance(val, int):
        raise TypeError(f"val={val!r} must be a number of images, got {type(val).__name__}")
    if not 0 <= val < len(train):
        raise ValueError(
            f"val={val} must be from 0 to {len(train) - 1}: {name} has {len(train)} images for "
            "training and validation"
        )
    first = len(train) - val
    return ImageData(train[:first], train[first:], test, levels, name)


def sklearn_digits() -> Tensor:
    """The 1797 digits (1797, 1, 8, 8) inside scikit-learn, of grey values 0 to 16, uint8."""
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            'the digits are inside scikit-learn; pip install "cnf[examples]"'
        ) from error
    return torch.from_numpy(datasets.load_digits().images).to(torch.uint8).unsqueeze(1)
