"""A vector field and its divergence as the right-hand side of a solve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnf.divergence import BoundField, Divergence
from cnf.fields.base import Field
from cnf.fields.closed_form import offers
from cnf.functional import called_with, named_tensors
from cnf.noise import draw
from cnf.ode.rhs import Derivative
from cnf.regularizers.base import Point, Regularizer, of_each

__all__ = ["Dynamics"]


class Dynamics:
    """(t, x, context, noise, probe, *constants) -> f(t, x, context) and div f, for one solve.

    It keeps the parameters of the moment: a backward pass that evaluates the field again must use
    them even if `torch.func.functional_call` has taken them out of the module since.

    Args:
        field: f(t, x) or f(t, x, context).
        divergence: how div f is computed; None for values only.
        each: whether the estimate of each probe stands behind the divergence.
        regularizers: whose integrands stand behind these, one by one.
    """

    def __init__(
        self,
        field: Field,
        divergence: Divergence | None,
        *,
        each: bool = False,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        self.field = field
        self.divergence = divergence
        self.each = each
        self.regularizers = tuple(regularizers)
        self.uses_jacobian = any(r.uses_jacobian for r in self.regularizers)
        self.bound = _BoundField(field)
        self.layout: Any = None  # of the constants, None where each evaluation computes its own

    @property
    def identity(self) -> tuple[Any, Hashable]:
        """The field, and what else its compiled steps depend on."""
        field = self.field if isinstance(self.field, nn.Module) else _code(self.field)
        return field, (self.divergence, self.each, self.regularizers)

    @property
    def replaced(self) -> bool:
        """Whether the field holds other tensors than those of the moment."""
        return self.bound.replaced()

    def sample_probe(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The probe (B, *event) of the Jacobian's norm, where it takes one of its own."""
        needed = self.divergence is not None and self.uses_jacobian
        if not (needed and self.divergence.norm_needs_probe(self.bound)):  # type: ignore[union-attr]
            return None
        return 2 * draw(torch.randint, 0, 2, x.shape, like=x, generator=generator) - 1

    def constants(self, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        """What does not change in this solve, to be handed to every evaluation."""
        if self.divergence is None:
            return []
        found: list[Tensor] = []
        constants = self.divergence.constants(self.bound, x, noise)
        if isinstance(constants, Tensor):
            raise TypeError("divergence_constants must return a tuple, got a tensor; use (tensor,)")
        self.layout = _flattened(constants, found)
        return found

    def __call__(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        probe: Tensor | None = None,
        *constants: Tensor,
    ) -> Derivative:
        """dx (B, *event) and None, or the divergence (B, 1) and what is asked for behind it."""
        return self._evaluate(self.bound, t, x, context, noise, probe, constants)

    def with_own_times(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        probe: Tensor | None = None,
        *constants: Tensor,
    ) -> Derivative:
        """The same at one time a sample, t (B,)."""
        field = _EachInTime(self.bound, constants_too=noise is not None)
        return self._evaluate(field, t, x, context, noise, probe, constants)

    def _evaluate(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        noise: Tensor | None,
        probe: Tensor | None,
        constants: tuple[Tensor, ...],
    ) -> Derivative:
        if self.divergence is None:
            return field.__call__(t, x, context), None  # see cnf.ode.rhs.evaluate
        given = None if self.layout is None else _arranged(self.layout, iter(constants))
        square = None
        if self.uses_jacobian:
            dx, each, square = self.divergence.with_norm(field, t, x, context, noise, given, probe)
        else:
            dx, each = self.divergence.estimates(field, t, x, context, noise, given)
        mean = each if each.shape[1] == 1 else each.mean(1, keepdim=True)
        columns = [mean, each] if self.each else [mean]
        if self.regularizers:
            point = Point(field, t, x, context, dx, square)
            columns += [of_each(r, point).unsqueeze(-1) for r in self.regularizers]
        return dx, mean if len(columns) == 1 else torch.cat(columns, 1)


def _flattened(constants: Any, found: list[Tensor]) -> Any:
    """The layout of a tree of tuples, whose tensors go to a list."""
    if isinstance(constants, Tensor):
        found.append(constants)
        return None
    if not isinstance(constants, (tuple, list)):
        raise TypeError(
            "divergence_constants must return a tuple of tensors, or of such tuples, got "
            f"{type(constants).__name__} in it"
        )
    return tuple(_flattened(part, found) for part in constants)


def _arranged(layout: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree of a layout."""
    if layout is None:
        return next(tensors)
    return tuple(_arranged(part, tensors) for part in layout)


_METHODS = (
    "divergence_constants",
    "with_divergence",
    "quadratic_form_constants",
    "with_quadratic_form",
    "potential_gradient",
)


class _BoundField:
    """A field as f(t, x, context), whichever of the two signatures it has."""

    forms_checked = True  # whether its closed forms are its own: once a solve

    def __init__(self, field: Field) -> None:
        self.field = field
        self.closed_form = offers(field, "closed_form")
        self.closed_quadratic_form = offers(field, "closed_quadratic_form")
        for name in _METHODS:
            if hasattr(field, name):
                setattr(self, name, partial(self._call, name))
        self.tensors: dict[str, Tensor] = {}
        self.homes: list[tuple[Mapping[str, Tensor | None], str, Tensor]] = []
        if isinstance(field, nn.Module):
            self.tensors = {name: normal(tensor) for name, tensor in named_tensors(field).items()}
            self.homes = [
                (module._parameters, name, normal(parameter))
                for module in field.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        arguments = (t, x) if context is None else (t, x, context)
        result: Tensor = self._call("__call__", *arguments)
        return result

    def _call(self, method: str, *arguments: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if compiling:  # each call by itself: one evaluation may make several
            arguments = tuple(v.clone() if isinstance(v, Tensor) else v for v in arguments)
        replaced = not compiling and self.replaced()
        if replaced and isinstance(self.field, nn.Module):
            tensors = {f"field.{name}": tensor for name, tensor in self.tensors.items()}
            return called_with(_Caller(self.field), tensors, (method, *arguments))
        if method == "__call__":
            return self.field(*arguments)
        return getattr(self.field, method)(*arguments)

    def replaced(self) -> bool:
        """Whether the module holds other parameters than those of the moment."""
        return any(home.get(name) is not p for home, name, p in self.homes)


class _Caller(nn.Module):
    """Any method of a module as the forward of another, which `functional_call` asks for."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.field, method)(*arguments)


class _EachInTime:
    """A field of one time a sample: each sample as a batch of one, vectorised over samples."""

    forms_checked = True

    def __init__(self, field: _BoundField, *, constants_too: bool) -> None:
        self.field = field
        self.constants_too = constants_too  # whether they belong to samples
        self.closed_form = field.closed_form
        self.closed_quadratic_form = field.closed_quadratic_form
        for name in _METHODS:
            if hasattr(field, name):
                setattr(self, name, getattr(field, name))
        for name in ("with_divergence", "with_quadratic_form", "potential_gradient"):
            if hasattr(field, name):
                setattr(self, name, partial(self._with_form, name))

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return _mapped(lambda *arguments: self.field(*arguments)[0], t, x, context)

    def _with_form(
        self, method: str, t: Tensor, x: Tensor, context: Tensor | None, *constants: Any
    ) -> tuple[Tensor, Tensor]:
        own: list[Tensor] = []
        of_samples = self.constants_too and bool(constants)
        layout = _flattened(constants, own) if of_samples else None

        def single(t: Tensor, x: Tensor, context: Tensor | None, *own: Tensor) -> Any:
            given = constants
            if of_samples:
                given = _arranged(layout, iter([c[None] for c in own]))
            dx, form = getattr(self.field, method)(t, x, context, *given)
            return dx[0], form[0]

        return _mapped(single, t, x, context, *own)


def _mapped(
    f: Callable[..., Any], t: Tensor, x: Tensor, context: Tensor | None, *own: Tensor
) -> Any:
    """f(t, x, context, *own) of each sample, x and context as batches of one."""

    def single(t: Tensor, x: Tensor, context: Tensor | None, *own: Tensor) -> Any:
        return f(t, x[None], None if context is None else context[None], *own)

    dims = (0, 0, None if context is None else 0, *(0 for _ in own))
    try:
        return torch.func.vmap(single, dims)(t, x, context, *own)
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
