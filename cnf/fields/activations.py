"""Activations by name. Smooth ones only: an adaptive solver pays for every kink."""

from __future__ import annotations

import copy

from torch import nn

from cnf.checks import check_choice

__all__ = ["ACTIVATIONS", "activation"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
}
"""Every activation that has a name."""


def activation(choice: str | nn.Module) -> nn.Module:
    """A new activation module, from its name or as a copy of a module.

    Raises:
        ValueError: a name that is not known.
        TypeError: neither a name nor a module.

    Example:
        >>> activation("softplus")
        Softplus(beta=1.0, threshold=20.0)
    """
    if isinstance(choice, nn.Module):
        return copy.deepcopy(choice)  # one each: a learnable activation is not shared by accident
    if not isinstance(choice, str):
        raise TypeError(
            f"activation must be a name or a module, got {type(choice).__name__}; "
            f"names are {', '.join(ACTIVATIONS)}"
        )
    check_choice("activation", choice, ACTIVATIONS, ", or a module")
    return ACTIVATIONS[choice]()
