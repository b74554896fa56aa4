"""Whether a field's closed form can be relied on: it must belong to the field as it is called."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["is_linear", "offers"]

_METHODS = {
    "closed_form": ("with_divergence", "derivative_and_divergence"),
    "closed_quadratic_form": ("with_quadratic_form", "derivative_and_quadratic_form"),
}
_VALUES = ("forward", "derivative", "__call__")


def offers(field: Any, form: str) -> bool:
    """Whether a field has a closed form: "closed_form" or "closed_quadratic_form".

    Not if a subclass computes other values than the class that wrote the closed form, or if hooks
    change what a module gives: the closed form would silently be that of another field.

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
    if not isinstance(field, nn.Module):
        return True
    if any(part._forward_hooks or part._forward_pre_hooks for part in field.modules()):
        return False
    written = [vars(kind) for kind in type(field).__mro__]
    for names in written:
        if any(name in names for name in methods):
            return True
        if any(name in names for name in _VALUES):
            return False
    return True  # methods of the object itself


def is_linear(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is W h + b and nothing else, be W parametrised or not.

    Example:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Identity())
        (True, False)
    """
    return isinstance(layer, kind) and type(layer).forward is kind.forward
