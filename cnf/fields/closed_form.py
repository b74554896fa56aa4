"""Whether a field's closed form can be relied on: it must belong to the field as it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["is_linear", "offers", "refuse_hooks", "written_for"]

_METHODS = {
    "closed_form": ("with_divergence", "derivative_and_divergence"),
    "closed_quadratic_form": ("with_quadratic_form", "derivative_and_quadratic_form"),
}
_VALUES = ("forward", "derivative", "__call__")


def offers(field: Any, form: str) -> bool:
    """Whether a field has a closed form: "closed_form" or "closed_quadratic_form".

    Not if a subclass or a patch computes other values than the class that wrote the closed form,
    or if hooks change what a module gives: the closed form would silently be that of another field.

    Example:
        >>> from cnf.fields import MLPField
        >>> class Doubled(MLPField):
        ...     def forward(self, t, x, context=None):
        ...         return 2 * super().forward(t, x, context)
        >>> offers(MLPField(2), "closed_form"), offers(Doubled(2), "closed_form")
        (True, False)
    """
    methods = _METHODS[form]
    if not hasattr(field, methods[0]) or not getattr(field, form, True):
        return False
    if getattr(field, "forms_checked", False):  # a field bound for a solve
        return True
    if isinstance(field, nn.Module) and any(map(_changed, field.modules())):
        return False
    return written_for(field, methods, _VALUES)


def written_for(thing: Any, methods: Sequence[str], values: Sequence[str]) -> bool:
    """Whether one of some methods was written by the object, or the class, that last wrote values.

    Example:
        >>> class A:
        ...     def value(self): ...
        ...     def slope(self): ...
        >>> class B(A):
        ...     def value(self): ...
        >>> written_for(A(), ["slope"], ["value"]), written_for(B(), ["slope"], ["value"])
        (True, False)
    """
    own = getattr(thing, "__dict__", {})
    for names in (own, *(vars(kind) for kind in type(thing).__mro__)):
        if any(name in names for name in methods):
            return True
        if any(name in names for name in values):
            return False
    return False


def is_linear(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is W h + b and nothing else, be W parametrised or not.

    Example:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Identity())
        (True, False)
    """
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def refuse_hooks(layer: nn.Module) -> None:
    """Refuse hooks on a layer whose weight is read while it is not called.

    Raises:
        ValueError: there are some, such as those of the old torch.nn.utils.spectral_norm.
    """
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise ValueError(
            "a layer of this field has forward hooks, which would not run, for its weight is read "
            "directly; use torch.nn.utils.parametrizations in the place of hooks on weights"
        )


def _changed(part: nn.Module) -> bool:
    """Whether a module gives something else than its class says."""
    everywhere = torch.nn.modules.module
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or ("forward" in vars(part) and "with_divergence" not in vars(part))
    )
