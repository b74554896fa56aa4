"""A linear vector field, alone or as a branch of others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cnf.fields.base import Constants, VectorField
from cnf.fields.closed_form import is_linear

__all__ = ["LinearField"]


class LinearField(VectorField):
    """A linear vector field, whose divergence is the trace of its matrix.

        f(t, x, c) = A x + B c + b,    div f = tr A

    Added to another field (`SumField`) it is a residual branch.

    Args:
        features: dimensions of a sample, D, or its shape.
        context: number of context features, 0 for none.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, x or context of a wrong shape.

    Example:
        >>> import torch
        >>> field = LinearField(2)
        >>> _ = nn.init.eye_(field.linear.weight)
        >>> field.with_divergence(torch.tensor(0.0), torch.ones(1, 2))[1]
        tensor([2.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, features: int | Sequence[int], *, context: int = 0) -> None:
        super().__init__(features, context)
        self.linear = nn.Linear(self.dims, self.dims)
        self.of_context = nn.Linear(context, self.dims, bias=False) if context else None

    batched_time = True

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the layer is linear, as it was built."""
        return is_linear(self.linear)

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        dx: Tensor = self.linear(x)
        if context is None or self.of_context is None:
            return dx
        return dx + self.of_context(context)

    def divergence_constants(self) -> Constants:
        """(tr A,)."""
        return (self.linear.weight.trace(),)

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        return self.derivative(t, x, context), constants[0].expand(x.shape[0])
