"""Warnings that point at the caller's line, not into the library."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["warn"]

_LIBRARY = str(Path(__file__).parent)


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn, naming the innermost line outside of the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
