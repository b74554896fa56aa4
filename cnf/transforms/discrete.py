"""`DiscreteTransform`: what the layers of discrete flows share, their checks and batch shapes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.fields.base import event_shape_of
from cnf.transforms.base import Choices, Transform, check_choices
from cnf.transforms.context import check_context, expand_context
from cnf.transforms.inputs import check_context_like, check_event, check_like
from cnf.user_modules import copies, drew, has_suspects, is_foreign, random_states, refuse_unfit

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DiscreteTransform", "check_context_size"]

_REMEDY = (
    "the flow is then not one map with one density: leave it out, put it into eval() (fit puts the "
    "whole flow into train()), take nn.LayerNorm for a batch norm, or set check_modules = False on "
    "this {layer} to train with it"
)

Formula = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(B, *event), (B, C) or None -> (B, *event), (B,)."""


class DiscreteTransform(Transform):
    """A transform of samples of a fixed shape, given by a formula for each direction.

    To add a kind, inherit, and

    1. call `super().__init__(features, context)`;
    2. write `to_data(z, context)`: z (B, *base), context (B, C) or None -> x (B, *event) and
       log |det dx/dz| (B,);
    3. write `to_base(x, context)`: x (B, *event) -> z (B, *base) and log |det dz/dx| (B,).

    Any batch dimensions, the broadcast of context, and the checks of both are done here; under
    autocast the formulas still compute in the dtype of x.

    Attributes:
        check_modules: whether a call refuses parts that are random or mix the samples of a batch,
            such as dropout or batch norm in `train()`; set it to False on a layer to train it so
            on purpose.

    Args:
        features: dimensions of a data sample, D, or its shape, such as (C, H, W).
        context: number of context features, 0 for none.
        base_shape: shape of a base sample, where it is another.

    Raises:
        TypeError: in a call, x or context of a wrong dtype, an unknown choice, or a formula that
            does not return two tensors.
        ValueError: a size that is not positive; in a call, x or context of a wrong shape or device,
            context missing or not expected, a formula that returns other shapes, or parts that
            `check_modules` refuses.

    Example:
        >>> import torch
        >>> class Double(DiscreteTransform):
        ...     def to_data(self, z, context):
        ...         return 2 * z, z.new_full((z.shape[0],), math.log(2) * z[0].numel())
        ...     def to_base(self, x, context):
        ...         return x / 2, x.new_full((x.shape[0],), -math.log(2) * x[0].numel())
        >>> Double(3).forward_and_log_det(torch.ones(1, 3))
        (tensor([[2., 2., 2.]]), tensor([2.0794]))
    """

    event_shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    check_modules: bool = True
    checked: bool | None = None  # the training mode in which all parts were found to be fit
    foreign: bool = False  # whether somebody else wrote the formulas, who may write into arguments

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        base_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_context_size(context)
        self.event_shape = event_shape_of(features)
        self.base_shape = self.event_shape if base_shape is None else tuple(base_shape)
        self.context = context
        self.foreign = is_foreign(self)

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether it was built with context."""
        return self.context > 0

    @property
    def dims(self) -> int:
        """The number of dimensions of one sample."""
        return math.prod(self.event_shape)

    @abstractmethod
    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, *event) and log |det dx/dz| (B,) for z (B, *base), context (B, C)."""

    @abstractmethod
    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, *base) and log |det dz/dx| (B,) for x (B, *event), context (B, C)."""

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x = f(z) (*batch, *event) and log |det df/dz| (*batch,)."""
        check_choices(choices)
        return self._on_batch(self.to_data, z, context, self.base_shape)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) (*batch, *event) and log |det df^-1/dx| (*batch,)."""
        check_choices(choices)
        return self._on_batch(self.to_base, x, context, self.event_shape)

    def _on_batch(
        self, formula: Formula, x: Tensor, context: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """A formula of one batch dimension, on x of any."""
        check_event(x, shape, self)
        check_like(x, self)
        batch = x.shape[: x.ndim - len(shape)]
        context = self._expanded(context, batch, x)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # which would cost whole nats
            with torch.autocast(device, enabled=False):
                return self._on_batch(formula, x, context, shape)
        n = math.prod(batch)
        if len(batch) != 1:
            context = None if context is None else context.reshape(n, self.context)
            x = x.reshape(n, *shape)
        if self.foreign:
            x, context = copies((x, context))  # it may write into them
        if self.check_modules and (torch.compiler.is_compiling() or self.checked != self.training):
            result = self._checked(formula, x, context)
        else:
            result = formula(x, context)
        other = self.base_shape if shape is self.event_shape else self.event_shape
        if not _has_shapes(result, (n, *other)):
            raise self._wrong_result(formula, result, (n, *other))
        value, log_det = result
        if len(batch) == 1:
            return value, log_det
        return value.reshape(*batch, *other), log_det.reshape(batch)

    def _checked(
        self, formula: Formula, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What a formula returns; refused where this layer is seen to be no map of single samples.

        To look at every part takes longer than a small layer should, so it is done at the first
        call, and whenever train() or eval() was called since, unless there is reason to doubt. What
        was found earlier is no part of a graph, which is made once.
        """
        name = type(self).__name__
        remedy = _REMEDY.format(layer=name)
        doubtful = has_suspects(self)
        if doubtful:
            refuse_unfit(self, name, remedy)
        if torch.compiler.is_compiling():
            return formula(x, context)
        before = random_states(x)
        result = formula(x, context)
        if drew(before, x):
            raise ValueError(f"this {name} drew random numbers; {remedy}")
        self.checked = None if doubtful else self.training
        return result

    def _wrong_result(self, formula: Formula, result: object, shape: tuple[int, ...]) -> Exception:
        """What a formula should have returned."""
        name = f"{type(self).__name__}.{getattr(formula, '__name__', 'formula')}"
        expected = f"expected a value of shape {shape} and a log-determinant of shape {shape[:1]}"
        if not (isinstance(result, tuple) and all(isinstance(part, Tensor) for part in result)):
            return TypeError(f"{name} returned a {type(result).__name__}, {expected}")
        shapes = " and ".join(str(tuple(part.shape)) for part in result)
        return ValueError(f"{name} returned {shapes}, {expected}; sum over the sample's dimensions")

    def _expanded(self, context: Tensor | None, batch: Sequence[int], x: Tensor) -> Tensor | None:
        """Context, checked, broadcast against the batch (*batch, C)."""
        if context is None:
            if self.context:
                raise ValueError(
                    f"context is missing: this {type(self).__name__} was built with "
                    f"context={self.context}; pass context of shape (..., {self.context})"
                )
            return None
        check_context(context)
        if not self.context:
            raise ValueError(
                f"context of shape {tuple(context.shape)} was given, but this "
                f"{type(self).__name__} takes none; leave it out, or build it with "
                f"context={context.shape[-1]} if its kind can"
            )
        if context.shape[-1] != self.context:
            hint = "; use context[:, None]" if self.context == 1 and context.ndim == 1 else ""
            raise ValueError(
                f"context has {context.shape[-1]} features, expected context={self.context}{hint}"
            )
        check_context_like(context, x)
        return expand_context(context, batch)


def _has_shapes(result: object, value: tuple[int, ...]) -> bool:
    """Whether a formula returned a value of this shape (B, ...) and a log-determinant (B,)."""
    return (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], Tensor)
        and isinstance(result[1], Tensor)
        and result[0].shape == value
        and result[1].shape == value[:1]
    )


def check_context_size(context: int) -> None:
    """Refuse what is not a number of context features."""
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        raise ValueError(f"context={context!r} must be a number of features, 0 for none")
