"""The image data sets of torchvision as plain tensors, where it is installed."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cnf.checks import check_choice

__all__ = ["torchvision_images"]

# What a picture of each mode of Pillow becomes. Others have more than 8 bits, or transparency.
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


def torchvision_images(
    name: str, folder: str | os.PathLike[str], *, split: str = "train", **options: Any
) -> Tensor:
    """The images of a data set of torchvision, without its labels.

    Nothing is downloaded unless `download=True` is among the options.

    Args:
        name: a class of torchvision.datasets, such as "FashionMNIST", "SVHN" or "CIFAR10".
        folder: the `root` of that class.
        split: "train" or "test", or what else the class knows as its `split`.
        options: further arguments of the class, such as `download`, `transform` or
            `transforms` (to resize, say), or `train` beside a `split` of another meaning (EMNIST).

    Returns:
        The images (N, C, H, W), uint8, C = 1 for grey and 3 for colours.

    Raises:
        ImportError: if torchvision is not installed.
        FileNotFoundError: if it does not find the data in the folder.
        ValueError: if it has no such data set or split, or the images differ in size or are not of
            8 bits.
    """
    dataset = load(name, folder, split, options)
    size = len(dataset)  # type: ignore[arg-type]  # Dataset leaves it to its subclasses
    if not size:
        raise ValueError(f"{name} in {os.fspath(folder)!r} is empty; expected an image at least")
    if options.get("transform") is None and options.get("transforms") is None:
        ends = (as_pixels(dataset[0], 0), as_pixels(dataset[size - 1], size - 1))
        whole = stored(getattr(dataset, "data", None), size, *ends)
        if whole is not None:
            return whole
    return stack(dataset, size)


def load(
    name: str, folder: str | os.PathLike[str], split: str, options: dict[str, Any]
) -> Dataset[Any]:
    """The data set `name` of torchvision, from files in the folder."""
    try:
        datasets = import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # the latter if built for another torch
        raise ImportError(
            f"the data set {name!r} is read by torchvision, which cannot be imported ({error}); "
            f"pip install torchvision, of the version that fits torch {torch.__version__} "
            "(image_data's own 'mnist' and 'cifar10' do without it)"
        ) from error
    known: dict[str, Any] = {
        key: value
        for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, Dataset)
    }
    check_choice("name", name, sorted(known))
    arguments = inspect.signature(known[name]).parameters
    if "train" in arguments:
        check_choice("split", split, ["train", "test"])
        options = {"train": split == "train", **options}
    elif "split" in arguments:
        options = {"split": split, **options}
    else:
        raise ValueError(
            f"name={name!r} has neither `train` nor `split`; stack its images yourself"
        )
    try:
        dataset: Dataset[Any] = known[name](root=os.fspath(folder), **options)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"torchvision cannot load {name} ({split}) from folder {os.fspath(folder)!r}: {error}; "
            f"torchvision_images({name!r}, folder, download=True) fetches it"
        ) from error
    return dataset


def stored(data: object, size: int, first: Tensor, last: Tensor) -> Tensor | None:
    """All images (N, C, H, W) from a data set's own array, if it shows what its items show.

    That is much faster than asking for each; some arrays have the channels last, some have none.
    """
    if isinstance(data, np.ndarray) and data.dtype == np.uint8:
        data = torch.from_numpy(np.require(data, requirements=["C", "W"]))
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.shape[:1] != (size,):
        return None
    for images in [data, data.permute(0, 3, 1, 2)] if data.ndim == 4 else [data.unsqueeze(1)]:
        if torch.equal(images[0], first) and torch.equal(images[-1], last):
            return images.contiguous()
    return None


def stack(dataset: Dataset[Any], size: int) -> Tensor:
    """All images (N, C, H, W), one by one."""
    first = as_pixels(dataset[0], 0)
    images = first.new_empty(size, *first.shape)
    for i in range(size):
        image = as_pixels(dataset[i], i)
        if image.shape != first.shape:
            raise ValueError(
                f"image {i} is {tuple(image.shape)}, but image 0 is {tuple(first.shape)}; expected "
                "images of one size: pass transform=torchvision.transforms.Resize((H, W)), or "
                "Grayscale()"
            )
        images[i] = image
    return images


def as_pixels(sample: Any, index: int) -> Tensor:
    """The image (C, H, W), uint8, of an item: a picture of Pillow or a tensor, before its label."""
    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3:
            return image
        seen = f"{image.dtype} {tuple(image.shape)}"
    else:
        mode = getattr(image, "mode", None)
        if mode in MODES:
            array = torch.from_numpy(np.array(image.convert(MODES[mode])))
            return array.unsqueeze(0) if array.ndim == 2 else array.permute(2, 0, 1)
        seen = repr(image)
    raise ValueError(
        f"image {index} is {seen}, expected a picture of mode {', '.join(MODES)} or a uint8 tensor "
        "(C, H, W); convert it by transform="
    )
