"""The divergence of a vector field, div f = tr df/dx, exact or by Hutchinson's estimator.

The trace is what turns a solve into a density (the instantaneous change of variables, Chen et
al., arXiv 1806.07366). Noise is an argument: drawn once a solve by `sample_noise`, then the same
at every evaluation, so that the estimated system is an ODE with a solution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cnf.checks import check_choice, check_count
from cnf.graph import unknown_leaves

__all__ = ["Divergence", "Exact", "Hutchinson", "as_divergence"]

BoundField = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""f(t, x, context) -> dx with t (), x (B, *event), context (B, C) or None, dx (B, *event)."""

_CHUNK_ELEMENTS = 2**24  # numbers in one batch of products: 64 MiB in float32
_CHUNK_ON_CPU = 4  # products in one batch: more leave the cache, and took twice as long
_UNROLLED = 8  # products that a compiled evaluation takes one by one


class Divergence(ABC):
    """How div f is computed, as a frozen value.

    To add one, inherit, and write

    1. `sample_noise(x, generator)` returns what is random, once a solve, or None.
    2. `__call__(field, t, x, context, noise)` returns f and its divergence, a function of its
       arguments alone, differentiable in all of them where grad mode is on.
    """

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The noise of one solve (B, ...), or None where nothing is random.

        Args:
            x: state (B, *event), for shape, dtype and device.
            generator: source of randomness; None for torch's global one.
        """
        return None

    @abstractmethod
    def __call__(
        self, field: BoundField, t: Tensor, x: Tensor, context: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) and its divergence.

        Args:
            field: the vector field; samples must not depend on one another.
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            noise: from `sample_noise`, its first dimension that of the samples.

        Returns:
            dx (B, *event) and the divergence (B,).
        """


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact divergence, sum_i df_i/dx_i.

    In closed form where the field offers `with_divergence(t, x, context) -> (dx, div)`, else by D
    vector-Jacobian products e_i^T J, batched in chunks; any event shape.

    Args:
        chunk_size: products in one batch; None takes few on a CPU, and elsewhere as many as memory
            allows. 1 takes them one by one, for fields whose backward pass cannot be vectorised.

    Raises:
        ValueError: chunk_size is not a positive integer.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> dx, div = Exact()(lambda t, x, c: x**2, torch.tensor(0.0), x, None, None)
        >>> div
        tensor([6.])
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and its exact divergence (B,)."""
        closed_form = getattr(field, "with_divergence", None)
        if closed_form is not None:
            dx, div = closed_form(t, x, context)
            return dx, div

        def trace(products: Products) -> Tensor:
            batch, dims = x.shape[0], math.prod(x.shape[1:])
            chunk = self.chunk_size or dims
            if not (self.chunk_size or torch.compiler.is_compiling()):  # there B is not a number
                chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * dims))
                chunk = chunk if x.is_cuda else min(chunk, _CHUNK_ON_CPU)
            div = x.new_zeros(batch)
            for start in range(0, dims, chunk):
                i = range(start, min(start + chunk, dims))
                basis = torch.eye(dims, dtype=x.dtype, device=x.device)[start : i.stop]
                e = basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)  # (K, B, *event)
                if torch.compiler.is_compiling():
                    # Written out: torch 2.13 mistakes the strides of an expanded tensor that a
                    # graph for every batch size saves for its backward pass.
                    e = e.contiguous()
                for k, row in zip(i, products(e), strict=True):
                    div = div + row.reshape(batch, dims)[:, k]
            return div

        return _linearised(field, t, x, context, trace)


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimate of the divergence: the mean over k probes e of e^T J e, E[e e^T] = I.

    Unbiased. With S = (J + J^T) / 2, the variance of one probe is 2 ||S||_F^2 for Gaussian noise
    and 2 (||S||_F^2 - sum_i S_ii^2) for Rademacher noise, so Rademacher is the default; k probes
    divide it by k.

    Args:
        noise: "rademacher" (+1 or -1) or "gaussian".
        probes: k.

    Raises:
        ValueError: an unknown noise, or probes not a positive integer.

    Reference: FFJORD, Grathwohl et al., arXiv 1810.01367.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> estimate = Hutchinson()
        >>> e = estimate.sample_noise(x)  # a diagonal Jacobian: exact with Rademacher noise
        >>> estimate(lambda t, x, c: x**2, torch.tensor(0.0), x, None, e)[1]
        tensor([6.])
    """

    noise: Literal["rademacher", "gaussian"] = "rademacher"
    probes: int = 1

    def __post_init__(self) -> None:
        check_choice("noise", self.noise, ("rademacher", "gaussian"))
        check_count("probes", self.probes)

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes (B, k, *event)."""
        device = x.device if generator is None else generator.device
        shape = (x.shape[0], self.probes, *x.shape[1:])
        if self.noise == "gaussian":
            e = torch.randn(shape, dtype=x.dtype, device=device, generator=generator)
        else:
            e = torch.randint(0, 2, shape, dtype=x.dtype, device=device, generator=generator)
            e = 2 * e - 1
        return e.to(x.device)

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and the estimate of its divergence (B,)."""
        shape = (x.shape[0], self.probes, *x.shape[1:])
        if noise is None or noise.shape != shape:
            seen = None if noise is None else tuple(noise.shape)
            raise ValueError(
                f"noise must have the shape (B, probes, *event) = {tuple(shape)}, "
                f"got {seen}; draw it with sample_noise(x)"
            )
        probes = noise.movedim(1, 0)  # (k, B, *event)

        def trace(products: Products) -> Tensor:
            estimates = [_dot(row, e) for row, e in zip(products(probes), probes, strict=True)]
            return estimates[0] if len(estimates) == 1 else torch.stack(estimates).mean(0)

        return _linearised(field, t, x, context, trace)


def as_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence that a string names ("exact", "hutchinson"), or the object itself.

    Raises:
        ValueError: another string.
        TypeError: neither a string nor a `Divergence`.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            "divergence must be 'exact', 'hutchinson' or a Divergence such as cnf.Exact(), "
            f"got {type(divergence).__name__}"
        )
    names: dict[str, Divergence] = {"exact": Exact(), "hutchinson": Hutchinson()}
    check_choice("divergence", divergence, names)
    return names[divergence]


Products = Callable[[Tensor], "Sequence[Tensor] | Tensor"]
"""The products v^T df/dx for each of the vectors v (K, B, *event): K of (B, *event)."""


def _linearised(
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
        linearised: tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]
        linearised = torch.func.vjp(lambda x: field(t, x, context), x)  # type: ignore[assignment]
        dx, pullback = linearised

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
        if not isinstance(dx, Tensor) or dx.shape != x.shape:
            return dx, x.new_zeros(x.shape[0])  # the right-hand side will refuse dx
        if own_leaf and differentiable:
            differentiable = bool(unknown_leaves([dx], [x]))
        if not dx.requires_grad:  # f is constant
            return dx, x.new_zeros(x.shape[0])
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample of a and b: (B, *event) -> (B,)."""
    product = a * b
    return product if product.ndim == 1 else product.flatten(1).sum(1)
