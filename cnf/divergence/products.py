"""A field linearised at a point: products of vectors with its Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.divergence.base import BoundField
from cnf.graph import unknown_leaves

__all__ = ["Products", "linearised"]

Products = Callable[[Tensor], "Sequence[Tensor] | Tensor"]
"""The products v^T df/dx for each of the vectors v (K, B, *event): K of (B, *event)."""

_UNROLLED = 8  # products that a compiled evaluation takes one by one


def linearised(
    field: BoundField,
    t: Tensor,
    x: Tensor,
    context: Tensor | None,
    trace: Callable[[Products], Tensor],
) -> tuple[Tensor, Tensor]:
    """f and a function of its Jacobian, with a graph only where a gradient can be asked.

    x enters as it is where it carries a gradient; else as a leaf of its own, so that f can be
    differentiated under `no_grad` too and the caller's tensor is left alone.
    """
    if torch.compiler.is_compiling():  # there torch.func differentiates, and autograd.grad cannot
        pair: tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]
        pair = torch.func.vjp(lambda x: field(t, x, context), x)  # type: ignore[assignment]
        dx, pullback = pair

        def products(vectors: Tensor) -> Sequence[Tensor] | Tensor:
            if len(vectors) > _UNROLLED:
                rows: Tensor = torch.func.vmap(pullback)(vectors)[0]
                return rows
            return [pullback(v)[0] for v in vectors.unbind()]

        return dx, trace(products)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        own_leaf = not (differentiable and x.requires_grad)
        x = x.detach().requires_grad_() if own_leaf else x
        dx = field(t, x, context)
        if not isinstance(dx, Tensor) or dx.shape != x.shape or not dx.requires_grad:
            # f is constant, or the right-hand side will refuse what it gave
            return dx, trace(torch.zeros_like)
        if own_leaf and differentiable:
            differentiable = bool(unknown_leaves([dx], [x]))
        div = trace(lambda vectors: _products(dx, x, vectors, differentiable))
    return (dx, div) if differentiable else (dx.detach(), div.detach())


def _products(
    dx: Tensor, x: Tensor, vectors: Tensor, create_graph: bool
) -> Sequence[Tensor] | Tensor:
    """The vector-Jacobian products v^T df/dx for each v: (K, B, *event) -> K of (B, *event)."""
    if len(vectors) > 1 and x.numel() > 0:
        try:
            return _grad(dx, x, vectors, create_graph, batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # a backward pass that vmap cannot vectorise: one by one below
    return [_grad(dx, x, v, create_graph, batched=False) for v in vectors]


def _grad(dx: Tensor, x: Tensor, v: Tensor, create_graph: bool, *, batched: bool) -> Tensor:
    (row,) = torch.autograd.grad(
        dx,
        x,
        v,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    if row is None:  # f does not depend on x
        return torch.zeros_like(v)
    return row
