"""A higher derivative of the path in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnf.regularizers.base import Point, Regularizer, squared_norm

__all__ = ["TaylorDerivative", "total_derivative"]

Function = Callable[[Tensor, Tensor], Tensor]
"""g(t, x) (B, *event) of time t () or (B,) and state x (B, *event)."""


@dataclass(frozen=True)
class TaylorDerivative(Regularizer):
    """The size of a derivative of the path in time, which sets the steps of an adaptive solver.

        int |d^K x / dt^K|^2 dt,    d/dt = partial/partial t + f . grad_x

    For K = 2 it is the acceleration; a method of order m is spared by K = m + 1. Each order nests
    one more product with a Jacobian, at two to three times the cost of the order below.

    Args:
        order: K, 2 or more; for 1 there is `KineticEnergy`.
        weight: its factor in the loss, 0 or more.

    Raises:
        TypeError: a weight that is no number.
        ValueError: an order below 2; a weight that is negative or not finite.

    Reference: Kelly et al., arXiv 2007.04504.

    Example:
        >>> import cnf, torch
        >>> penalty = [TaylorDerivative(2, 0.01)]
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: 0 * x + t, "exact"))
        >>> _, size = flow.log_prob_and_integrals(torch.zeros(1, 2), regularizers=penalty)
        >>> round(size.item(), 4)
        2.0
    """

    order: int
    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 2:
            raise ValueError(
                f"order={self.order!r} must be an integer of 2 or more; for the first derivative "
                "use KineticEnergy"
            )

    @property
    def name(self) -> str:
        """The name of its term, with the order."""
        return f"taylor_derivative_{self.order}"

    def integrand(self, point: Point) -> Tensor:
        """|d^K x / dt^K|^2 (B,)."""

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            dx: Tensor = point.field(t, x, point.context)
            return dx

        derivative: Function = velocity
        for _ in range(self.order - 2):
            derivative = _derivative(derivative, velocity)
        return squared_norm(total_derivative(derivative, point.t, point.x, point.dx))


def _derivative(g: Function, velocity: Function) -> Function:
    return lambda t, x: total_derivative(g, t, x, velocity(t, x))


def total_derivative(g: Function, t: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """dg/dt + (dg/dx) dx (B, *event), differentiable where grad mode is on.

    By two backward passes, v -> v^T J and the derivative of that in v: they go through any
    operation that has a second derivative, while forward mode misses many.

    Args:
        g: differentiable twice.
        t: time () or (B,).
        x: state (B, *event).
        dx: the velocity (B, *event).

    Example:
        >>> t, x = torch.tensor(3.0), torch.tensor([[2.0]])
        >>> total_derivative(lambda t, x: t * x**2, t, x, torch.ones(1, 1)).detach()
        tensor([[16.]])
    """
    if torch.compiler.is_compiling():  # there torch.func differentiates, and autograd.grad cannot
        _, pullback = torch.func.vjp(g, t, x)  # type: ignore[misc]
        _, forward = torch.func.vjp(pullback, torch.zeros_like(x))  # type: ignore[misc]
        tangent: Tensor = forward((torch.ones_like(t), dx))[0]
        return tangent
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if differentiable and x.requires_grad else x.detach().requires_grad_()
        t = t if differentiable and t.requires_grad else _Variable.apply(t, x)
        value = g(t, x)
        if not value.requires_grad:  # constant
            return torch.zeros_like(x)
        v = _Variable.apply(torch.zeros_like(x), x)
        rows = torch.autograd.grad(value, (t, x), v, create_graph=True, allow_unused=True)
        pairs = [
            (row, speed)
            for row, speed in zip(rows, (torch.ones_like(t), dx), strict=True)
            if row is not None and row.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(x)
        outputs, speeds = zip(*pairs, strict=True)
        (derivative,) = torch.autograd.grad(outputs, v, speeds, create_graph=differentiable)
    return derivative


class _Variable(torch.autograd.Function):
    """A tensor that can be differentiated in, without a leaf of its own in the graph.

    `gradient="checkpoint"` and "adjoint" would take such a leaf for a parameter nobody declared.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
