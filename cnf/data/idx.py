"""The idx format, in which MNIST and its relatives are published.

    0 0, type code, number of dimensions d | d sizes, big-endian, of 4 bytes | the elements

The first four are single bytes; the type code is 8 for unsigned bytes, the one that is read here.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.checksum import at_most, check_md5

__all__ = ["read_idx"]

# The codes of other elements, which no picture needs.
OTHER_TYPES = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
MAX_DIMS = 4  # of pictures in colour, (N, H, W, C)


def read_idx(path: str | os.PathLike[str], *, md5: str | None = None) -> Tensor:
    r"""The array in an idx file of unsigned bytes, plain or gzipped: pictures, or their labels.

    Whether it is gzipped is seen from the first bytes, not from the name. No more is unpacked than
    the header promises, and memory is taken only for what is there.

    Args:
        path: the file.
        md5: the MD5 sum that the unpacked file must have, as 32 hexadecimal digits; None for any.

    Returns:
        The elements, uint8, in the shape that the file names: (N, H, W) for the pictures of MNIST,
        (N,) for its labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no idx file, holds other elements or more than 4 dimensions, is cut
            off, too long or badly compressed, or has another checksum.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small-idx2-ubyte")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 20, 30]))
        >>> read_idx(path)
        tensor([[10, 20, 30]], dtype=torch.uint8)
    """
    path = Path(path)
    array, data = load_idx(path)
    if md5 is not None:
        check_md5(data, md5, f"{str(path)!r}, unpacked,", "fetch it again, or leave md5 out")
    return array


def load_idx(path: Path) -> tuple[Tensor, bytearray]:
    """The array in an idx file, uint8, and all bytes of the file, decompressed.

    The array is a view of these bytes.
    """
    name = str(path)
    with unpacked(path) as file:
        data = bytearray(file.read(4))
        check_type(data, name)
        ndim = data[3]
        data += file.read(4 * ndim)
        start = 4 + 4 * ndim
        if len(data) < start:
            raise ValueError(
                f"{name} is cut off: {len(data)} bytes, but the header alone, of {ndim} "
                f"dimensions, has {start}; fetch it again"
            )
        shape = struct.unpack(f">{ndim}I", data[4:])
        # The strides, which a tensor has even if it is empty, are 64-bit integers
        if math.prod(max(size, 1) for size in shape) >= 2**63:
            raise ValueError(
                f"{name} names the shape {shape}, larger than a tensor can be; fetch it again"
            )
        count = math.prod(shape)
        for piece in at_most(file, count + 1):  # one more, to see the end
            data += piece
    if len(data) != start + count:
        seen = f"cut off: {len(data)}" if len(data) < start + count else "too long: more"
        raise ValueError(
            f"{name} is {seen} bytes, expected {start + count} for the shape {shape} that its "
            "header names; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8)[start:]).reshape(shape), data


@contextmanager
def unpacked(path: Path) -> Iterator[BufferedIOBase]:
    """The file, open for reading, and decompressed on the way if it is gzipped."""
    if not path.is_file():
        raise FileNotFoundError(
            f"path {str(path)!r} is not a file; expected an idx file, or its gz"
        )
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            file.seek(0)
            yield file
            return
    try:
        with gzip.open(path) as file:
            yield file
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"path {str(path)!r} is gzipped, but damaged: {error}; fetch it again"
        ) from error


def check_type(head: bytes | bytearray, name: str) -> None:
    """Refuse what does not begin, in its first 4 bytes, like an idx file of unsigned bytes."""
    if len(head) < 4 or head[:2] != b"\0\0" or head[3] == 0:
        raise ValueError(
            f"{name} is no idx file: it begins with the bytes [{head.hex(' ')}], expected "
            "[00 00 08 dd] with dd dimensions, one or more"
        )
    kind, ndim = head[2], head[3]
    if kind != 8:
        raise ValueError(
            f"{name} holds elements of type {kind} ({OTHER_TYPES.get(kind, 'which idx lacks')}), "
            "expected 8, unsigned bytes; only these are read"
        )
    if ndim > MAX_DIMS:
        raise ValueError(
            f"{name} has {ndim} dimensions, expected 1 to {MAX_DIMS}: pictures (N, H, W) or labels "
            "(N,); is it an idx file?"
        )
