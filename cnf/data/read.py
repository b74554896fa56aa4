"""Reading a table of numbers from a file, with errors that name the line and the cell."""

from __future__ import annotations

import csv
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["read_table"]


def read_table(path: str | os.PathLike[str], *, key: str | None = None) -> NDArray[np.float64]:
    r"""The table of numbers in a file, as float64.

    The suffix decides: .npy, .npz, and text for all others (.csv, .txt, .data, ...). Text is one
    row a line, in UTF-8, with cells parted by semicolons, else commas, else white space; whichever
    of these the first line shows. Blank lines and lines that begin with # are skipped; a first line
    without any number is taken for the header. Pickled objects are never loaded.

    Args:
        path: the file.
        key: which array of a .npz file to take; needed when it has several.

    Returns:
        Table (N, D). NaN and infinity are kept: `split_table` reports them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or empty, has rows of unequal length or cells that are no
            numbers, or its array is not a real matrix; or if key does not fit.

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
        raise ValueError(
            f"{name} has dtype {data.dtype}; expected real numbers: convert it with .astype(float)"
        )
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


def parse_text(path: Path) -> NDArray[np.float64]:
    """Parse rows of numbers, (N, D)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path {str(path)!r} is not text in UTF-8 ({error.reason} at byte {error.start}); "
            "convert it"
        ) from error
    lines = [
        (i, line)
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    delimiter = next((mark for mark in ";," if lines and mark in lines[0][1]), None)
    if lines and not any(is_number(cell) for cell in cells_of(lines[0][1], delimiter)):
        del lines[0]  # the header
    if not lines:
        raise ValueError(f"path {str(path)!r} holds no rows of numbers; expected one row a line")
    try:
        return np.loadtxt(
            [line for _, line in lines], delimiter=delimiter, comments=None, quotechar='"', ndmin=2
        )
    except ValueError:
        return parse_cells(lines, delimiter, str(path))  # slower, but knows what is wrong and where


def parse_cells(
    lines: list[tuple[int, str]], delimiter: str | None, name: str
) -> NDArray[np.float64]:
    """Parse numbered lines cell by cell, (N, D)."""
    rows: list[list[float]] = []
    for number, line in lines:
        cells = cells_of(line, delimiter)
        for column, cell in enumerate(cells, 1):
            if not is_number(cell):
                seen = f"{cell!r} is not a number" if cell else "the cell is empty"
                raise ValueError(
                    f"{name}, line {number}, column {column}: {seen}; "
                    "fill in or remove missing and text values"
                )
        if rows and len(cells) != len(rows[0]):
            raise ValueError(
                f"{name}, line {number}: {len(cells)} cells, "
                f"but line {lines[0][0]} has {len(rows[0])}; "
                "expected rows of equal length"
            )
        rows.append([float(cell) for cell in cells])
    return np.array(rows, dtype=np.float64)


def cells_of(line: str, delimiter: str | None) -> list[str]:
    """Cut a line into cells, at a delimiter outside quotes, or at white space."""
    cells = line.split() if delimiter is None else next(csv.reader([line], delimiter=delimiter))
    return [cell.strip() for cell in cells]


def is_number(cell: str) -> bool:
    """Whether float() accepts the cell."""
    try:
        float(cell)
    except ValueError:
        return False
    return True
