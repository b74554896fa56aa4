"""Is a file the published one?"""

from __future__ import annotations

import hashlib

__all__ = ["check_md5"]


def check_md5(data: bytes, expected: str, name: str, remedy: str) -> None:
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
