"""Attention with the derivatives that a solve takes of its field."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable_attention"]


def differentiable_attention() -> AbstractContextManager[None]:
    """A context in which `scaled_dot_product_attention` has derivatives of every order.

    A divergence differentiates the field, and training differentiates that once more: the fused
    kernels of PyTorch have a first derivative alone, and no forward-mode one.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 4, requires_grad=True)
        >>> with differentiable_attention():
        ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        >>> dx.sum().backward()
    """
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
