"""A table of numbers in text: its separator, its header, and what is wrong with which cell."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["complaint", "parse_text"]

_MISSING = frozenset(["", "?", "-", ".", "na", "n/a", "#n/a", "null", "none", "missing"])


class Line(NamedTuple):
    """A line of the table: its number in the file, and its text."""

    number: int
    text: str


def parse_text(path: Path) -> NDArray[np.float64]:
    """Parse rows of numbers, (N, D)."""
    lines = _lines(path)
    delimiter = _delimiter(lines[0].text) if lines else None
    first = _without_end(_cells(lines[0].text, delimiter)) if lines else []
    header = _is_header(first)
    rows = lines[1:] if header else lines
    if not rows:
        raise ValueError(f"path {str(path)!r} holds no rows of numbers; expected one row a line")
    try:
        table = np.loadtxt(
            [line.text for line in rows],
            delimiter=delimiter,
            comments=None,
            quotechar='"',
            ndmin=2,
        )
        if table.shape[1] == len(first):
            return table
    except ValueError:
        pass
    names = first if header else []
    return _parse_cells(lines[0], rows, delimiter, len(first), names, str(path))


def _lines(path: Path) -> list[Line]:
    """The lines that hold something, but for comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path {str(path)!r} is not text in UTF-8 ({error.reason} at byte {error.start}); "
            "convert it"
        ) from error
    return [
        Line(number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _parse_cells(
    first: Line,
    rows: Iterable[Line],
    delimiter: str | None,
    width: int,
    names: Sequence[str],
    file: str,
) -> NDArray[np.float64]:
    """Parse lines cell by cell, (N, D): slower than NumPy, but knows what is wrong and where."""
    table: list[list[float]] = []
    for number, line in rows:
        cells = _cells(line, delimiter)
        while len(cells) > width and not cells[-1]:  # a separator ends the line
            cells.pop()
        for column, cell in enumerate(cells):
            if not _is_number(cell):
                name = f" ({names[column]!r})" if column < len(names) else ""
                raise ValueError(
                    f"{file}, line {number}, column {column + 1}{name}: {complaint(cell)}"
                )
        if len(cells) != width:
            what = f"{width} names in the header" if names else f"{width}"
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells, but line {first.number} has {what}; "
                "expected rows of equal length"
                + (", and a name for each column; or begin that line with #" if names else "")
            )
        table.append([float(cell) for cell in cells])
    return np.array(table, dtype=np.float64)


def complaint(cell: object) -> str:
    """What is wrong with a cell that is not a number, and what to do.

    Example:
        >>> complaint("red")
        "'red' is not a number; encode text as numbers, such as 0, 1, 2, or leave the column out"
    """
    if cell is None or str(cell).strip().lower() in _MISSING:
        seen = "the cell is empty" if cell == "" else f"{cell!r} is not a number"
        return f"{seen}; fill in missing values, or remove the row"
    if isinstance(cell, str) and _is_number(cell.replace(",", ".")):
        return f"{cell!r} is not a number; write decimals with a point"
    return (
        f"{cell!r} is not a number; encode text as numbers, such as 0, 1, 2, "
        "or leave the column out"
    )


def _delimiter(line: str) -> str | None:
    """What parts the cells; None is white space."""
    mark = next((mark for mark in ";,|\t" if mark in line), None)
    if mark == "\t":
        parts = [cell.split() for cell in line.split("\t")]
        if any(len(part) > 1 and all(map(_is_number, part)) for part in parts):
            return None  # numbers parted by blanks, too
    return mark


def _cells(line: str, delimiter: str | None) -> list[str]:
    """Cut a line into cells, at a delimiter outside quotes, or at white space."""
    if delimiter is None:
        return [cell.strip('"') for cell in re.findall(r'"[^"]*"|\S+', line)]
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _without_end(cells: Sequence[str]) -> list[str]:
    """The cells up to the last that is not empty."""
    return list(cells[: max((i + 1 for i, cell in enumerate(cells) if cell), default=0)])


def _is_header(cells: Sequence[str]) -> bool:
    """Whether the cells of a first line are names: no number among them, and letters."""
    names = [cell for cell in cells if cell.lower() not in _MISSING]
    return not any(map(_is_number, cells)) and any(c.isalpha() for name in names for c in name)


def _is_number(cell: str) -> bool:
    """Whether float() accepts the cell."""
    try:
        float(cell)
    except ValueError:
        return False
    return True
