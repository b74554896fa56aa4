"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import os
import platform
import re
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, or leave it as it was.

    The data go to a temporary file in the same folder, to the disk (fsync), and then take the name
    of the old file. The temporary file is removed after a fault; one that a killed process left
    behind is removed by the next call.

    Raises:
        OSError: The data could not be written; the old file is intact.
    """
    _sweep(path)
    temporary = path.with_name(
        f".{path.name}.{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    )
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove the temporary files of `path` whose writer, a process of this machine, is no more."""
    if os.name != "posix":
        return
    pattern = re.compile(
        rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)-[0-9a-f]+\.tmp"
    )
    for file in path.parent.iterdir():
        if (match := pattern.fullmatch(file.name)) and not _alive(int(match[1])):
            with suppress(OSError):
                file.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
