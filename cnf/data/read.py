"""Reading a table of numbers from a file, with errors that name the line and the cell."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnf.data.text import complaint, parse_text

__all__ = ["read_table"]


def read_table(path: str | os.PathLike[str], *, key: str | None = None) -> NDArray[np.float64]:
    r"""The table of numbers in a file, as float64.

    The suffix decides: .npy, .npz, and text for all others (.csv, .txt, .data, ...). Text is one
    row a line, in UTF-8, with cells parted by semicolons, else commas, bars, tabs or white space;
    whichever of these the first line shows. Blank lines and lines that begin with # are skipped. A
    first line of names is the header, with a name for each column. Pickled objects are never
    loaded.

    Args:
        path: the file.
        key: which array of a .npz file to take; needed when it has several.

    Returns:
        Table (N, D). NaN and infinity are kept: `split_table` reports them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or empty, has rows of unequal length or cells that are
            empty or no numbers, or its array is not a real matrix; or if key does not fit.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small.csv")
        >>> _ = path.write_text("height;weight\n1.8;75\n1.6;60\n")
        >>> read_table(path)
        array([[ 1.8, 75. ],
               [ 1.6, 60. ]])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path {str(path)!r} is not a file; expected a .npy, .npz or text table"
        )
    suffix = path.suffix.lower()
    if key is not None and suffix != ".npz":
        raise ValueError(f"key={key!r} only fits a .npz file, got {str(path)!r}; leave it out")
    if suffix in (".npy", ".npz"):
        return as_matrix(load_array(path, key), str(path))
    return parse_text(path)


def as_matrix(data: Any, name: str) -> NDArray[np.float64]:
    """Check that `data` is a real matrix with at least one cell, and return it as float64 (N,
    D).
    """
    data = np.asarray(data)
    if data.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {data.dtype}; expected real numbers: {remedy(data)}")
    if data.ndim != 2:
        raise ValueError(
            f"{name} has shape {data.shape}; expected a matrix (N, D): "
            "use reshape(-1, 1) for a single column"
        )
    if data.size == 0:
        raise ValueError(
            f"{name} is empty, of shape {data.shape}; expected at least one row and one column"
        )
    return np.asarray(data, dtype=np.float64)


def remedy(data: NDArray[Any]) -> str:
    """What to do with an array that is not of numbers: of its first cell that is none, if any."""
    if data.dtype.kind in "OUS":
        for place, cell in np.ndenumerate(data):
            try:
                float(cell)  # of what kind it is, only Python knows
            except (TypeError, ValueError):
                return f"at {list(place)} {complaint(str(cell) if cell is not None else None)}"
    return "convert it with .astype(float)"


def check_finite(x: Tensor, name: str) -> None:
    """Raise if a row of x (N, D) has NaN or infinity."""
    bad = (~x.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        more = ", ..." if len(bad) > 10 else ""
        raise ValueError(
            f"{name} has NaN or infinity in {len(bad)} of {len(x)} rows: "
            f"{', '.join(map(str, bad[:10]))}{more}; "
            "remove these rows or fill them in"
        )


def load_array(path: Path, key: str | None) -> Any:
    """Load the array of a .npy file, or array `key` of a .npz file, without pickle."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded
            if key is None and len(loaded.files) == 1:
                key = loaded.files[0]
            if key in loaded.files:
                return loaded[key]
            names = loaded.files
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"path {str(path)!r} cannot be read: {error}. "
            "It may be cut off, or hold pickled objects, which are refused; "
            "save it again with np.save(path, array.astype(float))"
        ) from error
    raise ValueError(
        f"key must be one of {', '.join(map(repr, names))} for {str(path)!r}, got {key!r}"
    )
