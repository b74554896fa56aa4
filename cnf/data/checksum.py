"""Is a file what it should be: no longer than that, and by its sum the published one?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BufferedIOBase

__all__ = ["at_most", "check_md5"]

PIECE = 2**20


def at_most(file: BufferedIOBase, count: int) -> Iterator[bytes]:
    """The next bytes of a file, up to `count`, in pieces.

    Memory thus grows with what is there: file.read(count) has room for all of `count` made first,
    and a compressed file may hold a thousand times its length.

    Example:
        >>> import io
        >>> list(at_most(io.BytesIO(b"some bytes"), 4))
        [b'some']
    """
    while piece := file.read(min(count, PIECE)):
        count -= len(piece)
        yield piece


def check_md5(data: bytes | bytearray, expected: str, name: str, remedy: str) -> None:
    """Compare the MD5 sum of `data` with the published one. It finds damage, not malice.

    Args:
        data: what was read.
        expected: the published sum, 32 hexadecimal digits.
        name: what `data` is called in the error.
        remedy: what to do about a difference.

    Raises:
        ValueError: if the sums differ.

    Example:
        >>> check_md5(b"", "d41d8cd98f00b204e9800998ecf8427e", "nothing", "fetch it again")
    """
    seen = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if seen != expected.lower():
        raise ValueError(f"{name} has the MD5 sum {seen}, expected {expected}; {remedy}")
