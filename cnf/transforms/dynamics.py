"""A vector field and its divergence as the right-hand side of a solve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnf.divergence import Divergence
from cnf.fields.base import Field
from cnf.ode.rhs import Derivative

__all__ = ["Dynamics"]


class Dynamics:
    """(t, x, context, noise) -> f(t, x, context) and div f, for one solve.

    It keeps the parameters of the moment: a backward pass that evaluates the field again must use
    them even if `torch.func.functional_call` has taken them out of the module since.

    Args:
        field: f(t, x) or f(t, x, context).
        divergence: how div f is computed; None for values only.
    """

    def __init__(self, field: Field, divergence: Divergence | None) -> None:
        self.field = field
        self.divergence = divergence
        self.bound = _BoundField(field)

    @property
    def identity(self) -> tuple[Any, Hashable]:
        """The field, and what else its compiled steps depend on."""
        field = self.field if isinstance(self.field, nn.Module) else _code(self.field)
        return field, self.divergence

    @property
    def replaced(self) -> bool:
        """Whether the field holds other tensors than those of the moment."""
        return self.bound.replaced()

    def __call__(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, noise: Tensor | None = None
    ) -> Derivative:
        """dx (B, *event) and the divergence (B, 1), or None."""
        if self.divergence is None:
            return self.bound(t, x, context), None
        dx, div = self.divergence(self.bound, t, x, context, noise)
        return dx, div.unsqueeze(-1)

    def with_own_times(
        self, t: Tensor, x: Tensor, context: Tensor | None = None, noise: Tensor | None = None
    ) -> Derivative:
        """The same at one time a sample, t (B,)."""
        field = _EachInTime(self.bound)
        if self.divergence is None:
            return field(t, x, context), None
        dx, div = self.divergence(field, t, x, context, noise)
        return dx, div.unsqueeze(-1)


class _BoundField:
    """A field as f(t, x, context), whichever of the two signatures it has."""

    def __init__(self, field: Field) -> None:
        self.field = field
        if hasattr(field, "with_divergence"):
            self.with_divergence = field.with_divergence
        self.tensors: dict[str, Tensor] = {}
        self.homes: list[tuple[Mapping[str, Tensor | None], str, Tensor]] = []
        if isinstance(field, nn.Module):
            named = [*field.named_parameters(), *field.named_buffers()]
            self.tensors = {name: normal(tensor) for name, tensor in named}
            self.homes = [
                (module._parameters, name, normal(parameter))
                for module in field.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        arguments = (t, x) if context is None else (t, x, context)
        replaced = not torch.compiler.is_compiling() and self.replaced()
        if replaced and isinstance(self.field, nn.Module):
            result: Tensor = torch.func.functional_call(self.field, self.tensors, arguments)
            return result
        return self.field(*arguments)

    def replaced(self) -> bool:
        """Whether the module holds other parameters than those of the moment."""
        return any(home.get(name) is not p for home, name, p in self.homes)


class _EachInTime:
    """A field of one time a sample: each sample as a batch of one, vectorised over samples."""

    def __init__(self, field: _BoundField) -> None:
        self.field = field
        if hasattr(field, "with_divergence"):
            self.with_divergence = self._with_divergence

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return _mapped(lambda *arguments: self.field(*arguments)[0], t, x, context)

    def _with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        def single(*arguments: Any) -> tuple[Tensor, Tensor]:
            dx, div = self.field.with_divergence(*arguments)
            return dx[0], div[0]

        return _mapped(single, t, x, context)


def _mapped(f: Callable[..., Any], t: Tensor, x: Tensor, context: Tensor | None) -> Any:
    """f(t, x, context) of each sample as a batch of one."""

    def single(t: Tensor, x: Tensor, context: Tensor | None) -> Any:
        return f(t, x[None], None if context is None else context[None])

    try:
        return torch.func.vmap(single, (0, 0, None if context is None else 0))(t, x, context)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            "batch='independent' evaluates the field by torch.func.vmap, at one time a sample, "
            f"which it does not allow ({str(error).splitlines()[0]}); write it with out-of-place "
            "operations and without .item(), or use batch='shared'"
        ) from error


def normal(tensor: Tensor) -> Tensor:
    """A tensor that autograd may use: a copy, where it was made in inference mode."""
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor


def _code(field: Field) -> Any:
    return getattr(getattr(field, "__func__", field), "__code__", field)
