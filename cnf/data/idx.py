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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.checksum import check_md5

__all__ = ["read_idx"]

# The codes of other elements, which no picture needs.
OTHER_TYPES = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}


def read_idx(path: str | os.PathLike[str], *, md5: str | None = None) -> Tensor:
    r"""The array in an idx file of unsigned bytes, plain or gzipped: pictures, or their labels.

    Whether it is gzipped is seen from the first bytes, not from the name.

    Args:
        path: the file.
        md5: the MD5 sum that the unpacked file must have, as 32 hexadecimal digits; None for any.

    Returns:
        The elements, uint8, in the shape that the file names: (N, H, W) for the pictures of MNIST,
        (N,) for its labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no idx file, holds other elements, is cut off, too long or badly
            compressed, or has another checksum.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small-idx2-ubyte")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 20, 30]))
        >>> read_idx(path)
        tensor([[10, 20, 30]], dtype=torch.uint8)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path {str(path)!r} is not a file; expected an idx file, or its gz"
        )
    data = unpack(path)
    array = parse_idx(data, str(path))
    if md5 is not None:
        check_md5(data, md5, f"{str(path)!r}, unpacked,", "fetch it again, or leave md5 out")
    return array


def unpack(path: Path) -> bytes:
    """The bytes of a file, decompressed if it is gzipped."""
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"path {str(path)!r} is gzipped, but damaged: {error}; fetch it again"
        ) from error


def parse_idx(data: bytes, name: str) -> Tensor:
    """The array in the bytes of an idx file, uint8."""
    if len(data) < 4 or data[:2] != b"\0\0" or data[3] == 0:
        raise ValueError(
            f"{name} is no idx file: it begins with the bytes [{data[:4].hex(' ')}], expected "
            "[00 00 08 dd] with dd dimensions, one or more"
        )
    kind, ndim = data[2], data[3]
    if kind != 8:
        raise ValueError(
            f"{name} holds elements of type {kind} ({OTHER_TYPES.get(kind, 'which idx lacks')}), "
            "expected 8, unsigned bytes; only these are read"
        )
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(
            f"{name} is cut off: {len(data)} bytes, but the header alone, of {ndim} dimensions, "
            f"has {start}; fetch it again"
        )
    shape = struct.unpack(f">{ndim}I", data[4:start])
    expected = start + math.prod(shape)
    if len(data) != expected:
        what = "cut off" if len(data) < expected else "too long"
        raise ValueError(
            f"{name} is {what}: {len(data)} bytes, expected {expected} for the shape {shape} that "
            "its header names; fetch it again"
        )
    return torch.from_numpy(np.array(np.frombuffer(data, np.uint8)[start:])).reshape(shape)
