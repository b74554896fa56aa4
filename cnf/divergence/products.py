"""A field linearised at a point: products of vectors with its Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.checks import exporting, tracing
from cnf.graph import unknown_leaves

__all__ = ["BoundField", "Products", "linearised", "with_product"]

BoundField = Any
"""f(t, x, context) -> dx with t (), x (B, *event), context (B, C) or None, dx (B, *event), and the
closed forms that `VectorField` describes, where the field has them."""

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
    """f and a function of its Jacobian, with a graph only where a gradient can be asked."""
    call = field.__call__ if hasattr(field, "forms_checked") else field  # see cnf.ode.rhs.evaluate
    return _linearised(lambda x: (call(t, x, context), ()), x, lambda products, _: trace(products))


def with_product(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """f and what else comes with it (B, k), and beside them |e^T df/dx|^2 (B,), by one product.

    Args:
        evaluate: x (B, *event) -> dx (B, *event) and (B, k).
        x: state (B, *event).
        e: vectors (B, *event).
    """

    def use(products: Products, others: tuple[Tensor, ...]) -> Tensor:
        (row,) = products(e.unsqueeze(0))
        square = row.square().unsqueeze(-1).flatten(1).sum(1, keepdim=True)
        return torch.cat((others[0], square), 1)

    def both(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        dx, other = evaluate(x)
        return dx, (other,)

    dx, found = _linearised(both, x, use)
    return dx, found[:, :-1], found[:, -1]


def _linearised(
    evaluate: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    x: Tensor,
    use: Callable[[Products, tuple[Tensor, ...]], Tensor],
) -> tuple[Tensor, Tensor]:
    """f, and what is made of products with its Jacobian and of what else `evaluate` gives."""
    if exporting():
        return _in_plain_operations(lambda x: _by_autograd(evaluate, x, use), x)
    if tracing():  # there torch.func differentiates, and autograd.grad cannot
        dx, pullback, others = torch.func.vjp(evaluate, x, has_aux=True)  # type: ignore[misc]

        def products(vectors: Tensor) -> Sequence[Tensor] | Tensor:
            if len(vectors) > _UNROLLED:
                rows: Tensor = torch.func.vmap(pullback)(vectors)[0]
                return rows
            return [pullback(v)[0] for v in vectors.unbind()]

        return dx, use(products, others)
    return _by_autograd(evaluate, x, use)


def _by_autograd(
    evaluate: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    x: Tensor,
    use: Callable[[Products, tuple[Tensor, ...]], Tensor],
) -> tuple[Tensor, Tensor]:
    """The same by `torch.autograd.grad`.

    x enters as it is where it carries a gradient; else as a leaf of its own, so that f can be
    differentiated under `no_grad` too and the caller's tensor is left alone.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        own_leaf = not (differentiable and x.requires_grad)
        x = x.detach().requires_grad_() if own_leaf else x
        dx, others = evaluate(x)
        if not isinstance(dx, Tensor) or dx.shape != x.shape or not dx.requires_grad:
            # f is constant, or the right-hand side will refuse what it gave
            return dx, use(torch.zeros_like, others)
        if own_leaf and differentiable:
            differentiable = bool(unknown_leaves([dx, *others], [x]))
        found = use(lambda vectors: _products(dx, x, vectors, differentiable), others)
    return (dx, found) if differentiable else (dx.detach(), found.detach())


def _in_plain_operations(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
) -> tuple[Tensor, Tensor]:
    """function(x) under torch.export, which follows no derivative but the operations behind it."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    with disable_proxy_modes_tracing(), torch.no_grad():
        operations = make_fx(function)(x)
    result: tuple[Tensor, Tensor] = operations(x)
    return result


def _products(
    dx: Tensor, x: Tensor, vectors: Tensor, create_graph: bool
) -> Sequence[Tensor] | Tensor:
    """The vector-Jacobian products v^T df/dx for each v: (K, B, *event) -> K of (B, *event)."""
    # Anomaly detection looks for NaN in every gradient, which a batched one does not allow.
    one_by_one = exporting() or torch.is_anomaly_enabled()
    if len(vectors) > 1 and not one_by_one and x.numel() > 0:
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
