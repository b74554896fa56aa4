"""The small photographs of CIFAR-10, from its binary version; nothing is downloaded or unpickled.

Reference:
    Krizhevsky, Learning multiple layers of features from tiny images, technical report, University
    of Toronto (2009).
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.checksum import at_most, check_md5

__all__ = ["CIFAR10_ADDRESS", "CIFAR10_MD5", "read_cifar10"]

CIFAR10_ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
PYTHON = ("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1")
RECORD = 1 + 3 * 32 * 32  # the label, then red, green and blue, each by rows
BATCH = 10_000  # images in each published file
MOST = 100_000  # in a file of others
MEMBERS = 1000  # in an archive; the published one has 9
BAD_HEADERS = (ValueError, LookupError, OverflowError)  # what some make tarfile raise


def read_cifar10(path: str | os.PathLike[str], *, checksum: bool = True) -> tuple[Tensor, Tensor]:
    """The training and test images of CIFAR-10, from its binary version.

    Args:
        path: the archive cifar-10-binary.tar.gz, of which nothing is written to disk, with the
            files in cifar-10-batches-bin or without a folder; the folder with data_batch_1.bin to
            data_batch_5.bin and test_batch.bin; or the folder above.
        checksum: whether the data must be as published: the archive by its MD5 sum, each file by
            holding 10,000 images (for the single files no sums are published). Without it a file
            may have 1 to 100,000 images.

    Returns:
        Training images (50000, 3, 32, 32) and test images (10000, 3, 32, 32), uint8.

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if a file is damaged or not CIFAR-10's; or if only the Python version is there,
            which is pickled.
    """
    source = find_cifar10(Path(path))
    if source.is_dir():
        files: dict[str, bytes | memoryview] = {
            name: (source / name).read_bytes() for name in BATCHES if (source / name).is_file()
        }
    else:
        files = {**read_archive(source, checksum)}
    missing = [name for name in BATCHES if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{str(source)!r} lacks {', '.join(missing)}; get {CIFAR10_ADDRESS}"
        )
    images = [
        parse_batch(files.pop(name), f"{name} of {str(source)!r}", BATCH if checksum else None)
        for name in BATCHES
    ]
    return torch.cat(images[:-1]), images[-1]


def find_cifar10(path: Path) -> Path:
    """The folder of the batches, or the archive; unless only the pickled version is there."""
    if path.is_file() and path.name not in PYTHON:
        return path
    for place in (path, path / FOLDER):
        if any((place / name).is_file() for name in BATCHES):
            return place
    if (path / ARCHIVE).is_file():
        return path / ARCHIVE
    if path.name in PYTHON or any((path / name).exists() for name in PYTHON):
        raise ValueError(
            f"{str(path)!r} is the Python version of CIFAR-10, and no pickle is read, since it can "
            f"run any code; get the binary version, {CIFAR10_ADDRESS}, or trust the file and use "
            "torchvision_images('CIFAR10', folder)"
        )
    raise FileNotFoundError(
        f"{str(path)!r} is neither {ARCHIVE} nor a folder with it or with {BATCHES[0]} to "
        f"{BATCHES[-1]}; get {CIFAR10_ADDRESS}"
    )


def read_archive(path: Path, checksum: bool) -> dict[str, memoryview]:
    """The batches in the archive: its plain files of just these names, unpacked in memory."""
    data = path.read_bytes()
    if checksum:
        remedy = f"get {CIFAR10_ADDRESS} again, or pass checksum=False if you packed it yourself"
        check_md5(data, CIFAR10_MD5, repr(str(path)), remedy)
    try:
        return find_members(unpack(data))
    except (tarfile.TarError, EOFError, OSError, zlib.error, *BAD_HEADERS) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as an archive: {error}; get {CIFAR10_ADDRESS} again"
        ) from error


def unpack(data: bytes) -> io.BytesIO:
    """The tar file in a gzipped one, of no more bytes than the largest batches need."""
    limit = len(BATCHES) * MOST * RECORD + 2**20  # the rest: readme and headers
    tar = io.BytesIO()
    with gzip.open(io.BytesIO(data)) as file:
        tar.writelines(at_most(file, limit + 1))
    if tar.tell() > limit:
        raise ValueError(f"unpacked, it has more than {limit} bytes")
    tar.seek(0)
    return tar


def find_members(tar: io.BytesIO) -> dict[str, memoryview]:
    """The bytes of each batch in a tar file, as views: the size that a member claims takes none."""
    files: dict[str, memoryview] = {}
    with tarfile.open(fileobj=tar, mode="r:") as archive:
        for count, member in enumerate(archive):
            name = member.name.removeprefix("./").removeprefix(f"{FOLDER}/")
            if count == MEMBERS:  # or a circle, by a size below 0
                raise ValueError(f"it has more than {MEMBERS} members")
            if name not in BATCHES or not member.isreg():
                continue
            if member.issparse():
                raise ValueError(f"{name} is packed as a sparse file")
            if name in files:
                raise ValueError(f"it has two files {name}")
            files[name] = tar.getbuffer()[member.offset_data :][: member.size]
    return files


def parse_batch(data: bytes | memoryview, name: str, count: int | None) -> Tensor:
    """The images (N, 3, 32, 32) in the records of a file; N must be `count` if that is given."""
    n, rest = divmod(len(data), RECORD)
    if rest or not (n == count if count else 1 <= n <= MOST):
        some = f"a multiple of {RECORD} up to {MOST} x {RECORD}"
        expected = f"{count} x {RECORD} = {count * RECORD}" if count else some
        part = ", or pass checksum=False if it is a part of it" if count and n and not rest else ""
        raise ValueError(
            f"{name} has {len(data)} bytes, expected {expected} (a label and 3 x 32 x 32 pixels "
            f"each); get {CIFAR10_ADDRESS} again{part}"
        )
    records = np.frombuffer(data, np.uint8).reshape(n, RECORD)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if len(wrong):
        raise ValueError(
            f"{name} has the label {records[wrong[0], 0]} in record {wrong[0]}, expected 0 to 9; "
            f"it is not CIFAR-10's or damaged: get {CIFAR10_ADDRESS}"
        )
    return torch.from_numpy(np.array(records[:, 1:])).reshape(n, 3, 32, 32)
