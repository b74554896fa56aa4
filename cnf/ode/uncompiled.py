"""Functions that `torch.compile` leaves out of its graph; imported where it is at work.

Importing this module imports the compiler, which takes a second and changes the validation of
torch's distributions: `import cnf` alone does neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["run"]


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_REASON = (
    "a solve has no fixed graph: leave out fullgraph=True; cnf.Solver(compile=True) compiles steps"
)
_says_why = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
_options = {"reason": _REASON} if _says_why else {}
run: Callable[..., Any] = torch.compiler.disable(_run, **_options)
"""run(function, *args, **kwargs): the function's result, computed outside of the graph."""
