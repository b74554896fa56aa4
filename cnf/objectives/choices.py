"""A choice by name, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cnf.checks import check_choice

__all__ = ["as_function"]


def as_function(
    argument: str,
    value: str | Callable[..., Any],
    named: Mapping[str, Callable[[], Callable[..., Any]]],
    form: str,
) -> Callable[..., Any]:
    """What `named` has by that name, or the function itself.

    Args:
        argument: what it is called, for the message.
        value: a name or a function.
        named: makers, by name.
        form: how a function is called and what it returns, for the message.

    Raises:
        TypeError: neither.
        ValueError: a name that is not known.

    Example:
        >>> as_function("rounding", "up", {"up": lambda: round}, "(x) -> int")(1.6)
        2
    """
    if isinstance(value, str):
        check_choice(argument, value, named, ", or a function")
        return named[value]()
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{argument} must be a name or a function {form}, got {value!r}; names are "
            f"{', '.join(named)}"
        )
    return value
