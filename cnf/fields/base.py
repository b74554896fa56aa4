"""What a vector field is, and how a user's function of (t, x) or (t, x, context) becomes one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["Constants", "Field", "VectorField", "check_sizes", "context_use", "event_shape_of"]

Field = Callable[..., Tensor]
"""f(t, x) or f(t, x, context) -> dx; t (), x (B, *event), context (B, C), dx (B, *event)."""


Constants = tuple[Any, ...]
"""Tensors that do not change in a solve: a tuple of them, or of such tuples."""


class VectorField(nn.Module):
    """A vector field dx/dt = f(t, x, context) that knows its shapes.

    To write one that checks its input, inherit, and

    1. call `super().__init__(features, context)`;
    2. write `derivative(t, x, context)`: t (), x (B, D) flattened, context (B, C) or
       None -> (B, D).

    Any module or function of (t, x) or (t, x, context) works without inheriting.

    A field whose exact divergence has a closed form can offer it, inheriting or not:

    1. `with_divergence(t, x, context, constants) -> (dx (B, *event), div (B,))`;
    2. `divergence_constants()` returns what of it depends on parameters alone, a tuple of tensors
       (or of such tuples): computed once a solve, it reaches `with_divergence` as `constants`, and
       gets its gradient. Without this method `with_divergence` takes three arguments;
    3. `closed_form`, an attribute: False for a field that has none as it was built.

    `Exact` then uses it, and `cnf.check` compares it with differences. A closed form of
    Hutchinson's estimate goes the same way: `with_quadratic_form(t, x, context, constants) ->
    (dx, e^T J e (B, k))`, `quadratic_form_constants(probes (B, k, *event))`, tensors (B, ...), and
    `closed_quadratic_form`. A subclass of `VectorField` writes `derivative_and_divergence` and
    `derivative_and_quadratic_form`, of flat x (B, D).

    Attributes:
        event_shape: shape of one sample.
        context: number of context features, 0 for none.
        batched_time: whether t may also be a time of each sample, (B,), as in flow matching. For
            another field, of yours too, such times go through `torch.func.vmap`, which takes
            longer; a class that redefines the values says it anew.
    """

    batched_time = False
    closed_form = False
    closed_quadratic_form = False

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__()
        shape = event_shape_of(features)
        if isinstance(context, bool) or not isinstance(context, int) or context < 0:
            raise ValueError(f"context={context!r} must be a number of features, 0 for none")
        self.event_shape = shape
        self.context = context

    @property
    def dims(self) -> int:
        """The number of dimensions of one sample."""
        return math.prod(self.event_shape)

    def divergence_constants(self) -> Constants:
        """What of the divergence depends on parameters alone."""
        return ()

    def with_divergence(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, *event) and its exact divergence (B,), where `closed_form` is true.

        Args:
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            constants: from `divergence_constants()`; None computes them.
        """
        self._check(x, context)
        if constants is None:
            self.check_closed_form()
            constants = self.divergence_constants()
        dx, div = self.derivative_and_divergence(t, self._flat(x), context, constants)
        return self._like(dx, x), div

    def check_closed_form(self) -> None:
        """Refuse to use a closed form that there is not.

        Raises:
            TypeError: this field has none.
        """
        if not self.closed_form:
            raise TypeError(
                f"this {type(self).__name__} has no closed form of its divergence: that takes at "
                "most two hidden layers, as they were built, with activations of known slopes; "
                "use cnf.Exact(), which then takes products with the Jacobian"
            )

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        raise TypeError(f"this {type(self).__name__} has no closed form of its divergence")

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """What of Hutchinson's estimate depends on probes (B, k, *event) and parameters alone."""
        raise TypeError(f"this {type(self).__name__} has no closed form of Hutchinson's estimate")

    def with_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, *event) and e^T J e (B, k), where `closed_quadratic_form` is true.

        Args:
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            constants: from `quadratic_form_constants(probes)`.
        """
        self._check(x, context)
        dx, form = self.derivative_and_quadratic_form(t, self._flat(x), context, constants)
        return self._like(dx, x), form

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        raise TypeError(f"this {type(self).__name__} has no closed form of Hutchinson's estimate")

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        raise TypeError(f"{type(self).__name__} must define derivative(t, x, context)")

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """dx/dt (B, *event) at time t () and state x (B, *event), given context (B, C)."""
        self._check(x, context)
        return self._like(self.derivative(t, self._flat(x), context), x)

    def _flat(self, x: Tensor) -> Tensor:
        """(B, *event) -> (B, D); a view of the same shape would cost its share in autograd."""
        return x if x.ndim == 2 else x.reshape(x.shape[0], self.dims)

    def _flat_probes(self, probes: Tensor) -> Tensor:
        """(B, k, *event) -> (B, k, D)."""
        return probes.reshape(*probes.shape[:2], self.dims)

    def _like(self, dx: Tensor, x: Tensor) -> Tensor:
        """(B, D) -> (B, *event)."""
        return dx if x.ndim == 2 else dx.reshape(x.shape)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        expected = ("B", *self.event_shape)
        if x.shape[1:] != self.event_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected ({', '.join(map(str, expected))})"
            )
        if context is None and self.context:
            raise ValueError(
                f"context is missing: this field was built with context={self.context}; "
                f"pass context of shape (..., {self.context})"
            )
        if context is not None and not self.context:
            raise ValueError(
                f"context of shape {tuple(context.shape)} was given, but this field takes none; "
                f"build it with context={context.shape[-1]}"
            )
        if context is not None and context.shape[-1] != self.context:
            raise ValueError(
                f"context has {context.shape[-1]} features, expected context={self.context}"
            )


def event_shape_of(features: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample: (D,) for an int D, or the given shape."""
    if isinstance(features, int):
        features = (features,)
    check_sizes("features", features, "an integer D or a shape such as (C, H, W)")
    return tuple(features)


def check_sizes(name: str, sizes: Sequence[int], expected: str = "such as (64, 64)") -> None:
    """Refuse what is not a sequence of positive integers."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{name}={sizes!r} must be a sequence of positive integers, {expected}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"{name}={tuple(sizes)!r} must be positive integers, {expected}")


def context_use(field: Field) -> Literal["none", "optional", "required"]:
    """Whether a field is a function of (t, x, context), and may be called without context.

    Raises:
        TypeError: if it is a function of neither (t, x) nor (t, x, context).

    Example:
        >>> context_use(lambda t, x: -x), context_use(lambda t, x, context: -x)
        ('none', 'required')
    """
    if not callable(field):
        raise TypeError(f"field must be a function or module, got {type(field).__name__}")
    function = field.forward if isinstance(field, nn.Module) else field
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin without a signature
        return "none"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 3 or (len(positional) < 2 and not variadic):
        names = ", ".join(p.name for p in parameters)
        raise TypeError(f"field must be a function of (t, x) or (t, x, context), got ({names})")
    if len(required) == 3:
        return "required"
    return "optional" if variadic or len(positional) >= 3 else "none"
