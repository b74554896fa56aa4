"""The sum of vector fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cnf.fields.base import Constants, VectorField
from cnf.fields.closed_form import offers
from cnf.fields.time import takes_batched_time
from cnf.user_modules import copies, writes_unseen

__all__ = ["SumField"]


class SumField(VectorField):
    """The sum of vector fields, whose divergence is the sum of theirs.

        f(t, x, c) = f_1(t, x, c) + ... + f_n(t, x, c),    div f = div f_1 + ... + div f_n

    The divergence has a closed form if every field has one. A residual field is
    `SumField(LinearField(D), MLPField(D))`.

    Args:
        fields: of the same event shape; those built with context get it.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        TypeError: an argument that is not a `VectorField`.
        ValueError: no field, or fields of different event shapes or numbers of context features.

    Example:
        >>> import torch
        >>> from cnf.fields import LinearField, MLPField
        >>> field = SumField(LinearField(2), MLPField(2, (64, 64)))
        >>> field(torch.tensor(0.5), torch.randn(10, 2)).shape, field.closed_form
        (torch.Size([10, 2]), True)
    """

    def __init__(self, *fields: VectorField) -> None:
        if not fields:
            raise ValueError("SumField needs at least one field")
        for i, field in enumerate(fields):
            if not isinstance(field, VectorField):
                raise TypeError(f"fields[{i}] must be a VectorField, got {type(field).__name__}")
        shapes = {field.event_shape for field in fields}
        contexts = {field.context for field in fields} - {0}
        if len(shapes) > 1 or len(contexts) > 1:
            raise ValueError(
                "the fields of a sum must agree, got event shapes "
                f"{[field.event_shape for field in fields]} and context features "
                f"{[field.context for field in fields]}"
            )
        super().__init__(fields[0].event_shape, max(contexts, default=0))
        self.fields = nn.ModuleList(fields)

    @property
    def batched_time(self) -> bool:  # type: ignore[override]
        """Whether every field takes a time of each sample."""
        return all(takes_batched_time(field) for field in self._each())

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether every field has a closed form of its divergence."""
        return all(offers(field, "closed_form") for field in self._each())

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """dx/dt (B, *event)."""
        self._check(x, context)
        first, *others = (f(t, *self._given(f, x, context)) for f in self._each())
        return sum(others, start=first)

    def divergence_constants(self) -> Constants:
        """Those of every field."""
        return tuple(field.divergence_constants() for field in self._each())

    def with_divergence(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, *event) and its divergence (B,)."""
        self._check(x, context)
        if constants is None:
            self.check_closed_form()
            constants = self.divergence_constants()
        pairs = [
            field.with_divergence(t, *self._given(field, x, context), own)
            for field, own in zip(self._each(), constants, strict=True)
        ]
        (dx, div), *others = pairs
        return sum((dx_i for dx_i, _ in others), dx), sum((div_i for _, div_i in others), div)

    def _given(self, field: VectorField, x: Tensor, context: Tensor | None) -> tuple[Any, Any]:
        """x and context of one field: what it writes there must not reach the next one."""
        x_and_context = (x, context if field.context else None)
        x, context = copies(x_and_context) if writes_unseen(x) else x_and_context
        return x, context

    def _each(self) -> Iterator[VectorField]:
        return iter(self.fields)  # type: ignore[arg-type]
