"""Optional packages: imported where they are used, with a message that says how to get them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(name: str) -> ModuleType:
    """Module `name` of the extra `examples`.

    Raises:
        ImportError: It is not installed.

    Example:
        >>> require("safetensors.torch").__name__
        'safetensors.torch'
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'cnf.training needs {package}: pip install "cnf[examples]"') from error
