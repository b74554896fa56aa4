"""What the gradients that keep no graph share; see `recompute` and `adjoint` for the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.graph import unknown_leaves
from cnf.ode.rhs import Derivative, RightHandSide
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock

__all__ = [
    "BackwardContext",
    "backward_stats",
    "first_derivative",
    "first_order",
    "refuse_double_backward",
    "vjp",
]


class BackwardContext(Protocol):
    """What autograd hands to forward and backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    task: Any

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for backward."""


def first_derivative(
    f: RightHandSide, clock: Clock, x: Tensor, parameters: Sequence[Tensor]
) -> Derivative:
    """f at the start, detached, after a check that it depends on nothing undeclared.

    Raises:
        ValueError: if the field uses a tensor that requires grad and is not among the parameters:
            its gradient would silently be lost; or if one of the parameters is computed from
            another: the gradient on that way would be counted twice.
    """
    computed = [p for p in parameters if p.grad_fn is not None]
    for leaf in unknown_leaves(computed, []):
        if any(leaf is p for p in parameters):
            raise ValueError(
                f"the context is computed from a parameter of shape {tuple(leaf.shape)} that the "
                "vector field uses too, which gradient='checkpoint' and 'adjoint' cannot tell "
                "apart; use gradient='backprop'"
            )
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        dx, dq = f(Clock(clock.start, clock.end).times([clock.start], x)[0], leaf)
        outputs = [dx] if dq is None else [dx, dq]
        for captured in unknown_leaves(outputs, [leaf, *parameters]):
            raise ValueError(
                f"the vector field depends on a tensor of shape {tuple(captured.shape)} that "
                "requires grad and is not declared, so gradient='checkpoint' and 'adjoint' would "
                "lose its gradient; make it a parameter of the field's module, pass it as context "
                "(or in parameters= of odeint), or use gradient='backprop'"
            )
    return dx.detach(), None if dq is None else dq.detach()


def refuse_double_backward(choice: str) -> None:
    """Raise in a backward pass that is itself to be differentiated, naming the choice."""
    if torch.is_grad_enabled():  # autograd enables it in backward exactly for create_graph=True
        raise RuntimeError(
            f"Solver({choice}) has no second derivatives; they need gradient='backprop' and "
            "compile=False"
        )


class _FirstOrder(torch.autograd.Function):
    """The identity, whose gradient has no gradient."""

    @staticmethod
    def forward(ctx: BackwardContext, choice: str, x: Tensor, q: Tensor | None) -> Any:
        ctx.task = choice
        return x.view_as(x), None if q is None else q.view_as(q)

    @staticmethod
    def backward(ctx: BackwardContext, gx: Tensor, gq: Tensor | None) -> Any:
        refuse_double_backward(ctx.task)
        return None, gx, gq


def first_order(choice: str, x: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The end of a solve, as one that cannot be differentiated twice."""
    end: tuple[Tensor, Tensor | None] = _FirstOrder.apply(choice, x, q)
    return end


def backward_stats(stats: SolveStats, recorders: Recorders) -> SolveStats:
    """The record of a backward solve, shown to the recorders of its forward solve."""
    own = SolveStats("backward", stats.method, stats.t1, stats.t0)
    for recorder in recorders:
        recorder.append(own)
    return own


def vjp(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor]:
    """Vector-Jacobian products, zero for inputs that the outputs do not depend on."""
    pairs = [
        (y, v)
        for y, v in zip(outputs, cotangents, strict=True)
        if y is not None and v is not None and y.requires_grad
    ]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    ys, vs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, inputs, vs, allow_unused=True, materialize_grads=True))
