"""The handwritten digits of MNIST, from files that are already here; nothing is downloaded.

Reference:
    LeCun et al., Gradient-based learning applied to document recognition, Proceedings of the IEEE
    86 (1998).
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from cnf.data.checksum import check_md5
from cnf.data.idx import load_idx

__all__ = ["MNIST_ADDRESS", "MNIST_MD5", "read_mnist"]

MNIST_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# Of the unpacked files: the sum of a .gz depends on who packed it.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read_mnist(folder: str | os.PathLike[str], *, checksum: bool = True) -> tuple[Tensor, Tensor]:
    """The training and test images of MNIST, or of a data set with the same names of files.

    Args:
        folder: where train-images-idx3-ubyte and t10k-images-idx3-ubyte are, plain or with .gz; or
            a folder with them in raw/ or MNIST/raw/, as torchvision lays them down. The files with
            labels are not needed; `read_idx` reads them, and `MNIST_MD5` has their sums.
        checksum: whether the files must be MNIST's by their MD5 sums. False for its relatives,
            such as Fashion-MNIST.

    Returns:
        Training images (60000, 1, 28, 28) and test images (10000, 1, 28, 28), uint8.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or another checksum shows that it is not MNIST's.
    """
    train, test = (
        read_images(find_idx(Path(folder), name), MNIST_MD5[name] if checksum else None)
        for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
    )
    return train, test


def find_idx(folder: Path, name: str) -> Path:
    """Where the idx file `name` is, in the folder or where torchvision has it below."""
    spellings = (name, name.replace("-idx", ".idx"))
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for file in (f"{spelling}{end}" for end in ("", ".gz") for spelling in spellings):
            if (place / file).is_file():
                return place / file
    raise FileNotFoundError(
        f"folder {str(folder)!r} has no file {name} or {name}.gz, nor has its raw or MNIST/raw; "
        f"get {MNIST_ADDRESS}{name}.gz"
    )


def read_images(path: Path, md5: str | None) -> Tensor:
    """Grey images (N, 1, H, W) from an idx file."""
    images, data = load_idx(path)
    if images.ndim != 3:
        raise ValueError(
            f"{str(path)!r} has the shape {tuple(images.shape)}, expected images (N, H, W); "
            "are these the labels?"
        )
    if md5 is not None:
        remedy = (
            "fetch it again, or pass checksum=False if it is not MNIST (but Fashion-MNIST, say)"
        )
        check_md5(data, md5, f"{str(path)!r}, unpacked,", remedy)
    return images.unsqueeze(1)
