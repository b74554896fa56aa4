"""Checks of arguments that many places share; each error names argument, value and remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "check_bool",
    "check_choice",
    "check_count",
    "check_dense",
    "check_number",
    "check_positive",
    "check_values",
    "compiling",
    "exporting",
    "tracing",
]


def compiling() -> bool:
    """Whether torch.compile builds a graph from what runs, but torch.export does not."""
    return torch.compiler.is_dynamo_compiling() and not exporting()


def tracing() -> bool:
    """Whether values cannot be looked at: under torch.compile and torch.func's transforms."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def exporting() -> bool:
    """Whether torch.export traces: there is no second trace, so nothing may depend on values.

    torch 2.6 does not tell its strict mode from torch.compile.
    """
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def check_choice(name: str, value: object, choices: Iterable[str], other: str = "") -> None:
    """Refuse a value that is none of `choices`, naming the nearest one.

    Raises:
        ValueError: with the choices, and `other`, what else may be given.

    Example:
        >>> check_choice("method", "dopri5", ["dopri5", "rk4"])
    """
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = f"{', '.join(choices)}{other}"
    raise ValueError(f"{name}={value!r} is not known; expected one of {known}.{hint}")


def check_count(name: str, value: int) -> None:
    """Refuse a number that is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def check_number(name: str, value: float) -> None:
    """Refuse what is not a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, got {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a positive, finite number."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite")


def check_bool(name: str, value: bool) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, got {type(value).__name__}")


def check_dense(x: Tensor, name: str) -> None:
    """Refuse a sparse tensor.

    Raises:
        TypeError: naming the remedy.
    """
    if x.layout is not torch.strided:
        raise TypeError(f"{name} is a sparse tensor ({x.layout}); use {name}.to_dense()")


def check_values(x: Tensor, name: str) -> None:
    """Refuse a tensor without values, on the meta device.

    Raises:
        TypeError: naming the remedy.
    """
    if x.is_meta:
        raise TypeError(
            f"{name} is on the meta device, where tensors have no values; make it on another, "
            "such as device='cpu'"
        )
