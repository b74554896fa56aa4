"""The exact divergence, in closed form or by products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import check_count
from cnf.divergence.base import BoundField, Divergence
from cnf.divergence.products import Products, linearised
from cnf.fields.base import Constants
from cnf.fields.closed_form import offers
from cnf.warn import warn

__all__ = ["Exact"]

_CHUNK_ELEMENTS = 2**24  # numbers in one batch of products: 64 MiB in float32
_CHUNK_ON_CPU = 4  # products in one batch: more leave the cache, and took twice as long
_MANY_PRODUCTS = 256  # above it, `Exact` says what it will cost


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact divergence, sum_i df_i/dx_i.

    In closed form where the field has one (see `VectorField`), else by D vector-Jacobian products
    e_i^T J, batched in chunks; any event shape. Many products cost much: a warning says how much.

    Args:
        chunk_size: products in one batch; None takes few on a CPU, and elsewhere as many as memory
            allows. 1 takes them one by one, for fields whose backward pass cannot be vectorised.
        closed_form: False takes products even where the field has a closed form.

    Raises:
        ValueError: chunk_size is not a positive integer.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> dx, div = Exact()(lambda t, x, c: x**2, torch.tensor(0.0), x)
        >>> div
        tensor([6.])
    """

    chunk_size: int | None = None
    closed_form: bool = True

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)

    def constants(self, field: BoundField, x: Tensor, noise: Tensor | None = None) -> Constants:
        """What the field's closed form needs, or nothing."""
        if self._closed(field):
            return field.divergence_constants() if hasattr(field, "divergence_constants") else ()
        dims = math.prod(x.shape[1:])
        if dims > _MANY_PRODUCTS:
            warn(
                f"the exact divergence takes {dims} products with the Jacobian at every "
                f"evaluation: the time of about {2 * dims} evaluations of the field, and where a "
                "gradient is asked three times that and the memory of as many. Use a field with a "
                "closed form (MLPField or ConvField of one or two hidden layers) or "
                "cnf.Hutchinson(probes=...) with return_stderr=True; torch.no_grad() to evaluate; "
                "gradient='checkpoint' to train"
            )
        return ()

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and its exact divergence (B,)."""
        if not self._closed(field):
            return linearised(field, t, x, context, lambda products: self._trace(products, x)[0])
        if not hasattr(field, "divergence_constants"):
            dx, div = field.with_divergence(t, x, context)
        else:
            constants = field.divergence_constants() if constants is None else constants
            dx, div = field.with_divergence(t, x, context, constants)
        if not isinstance(div, Tensor) or div.shape != x.shape[:1]:
            seen = tuple(div.shape) if isinstance(div, Tensor) else type(div).__name__
            raise ValueError(
                f"with_divergence must return dx and div of shape (B,) = {tuple(x.shape[:1])}, "
                f"got div of {seen}"
            )
        return dx, div

    def norm_needs_probe(self, field: BoundField) -> bool:
        """Where the divergence is a closed form, which has no products."""
        return self._closed(field)

    def with_norm(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f, its divergence (B, 1) and ||df/dx||_F^2 (B,), from the rows of the Jacobian."""
        if self._closed(field):
            return super().with_norm(field, t, x, context, noise, constants, probe)

        def both(products: Products) -> Tensor:
            return torch.stack(self._trace(products, x, squares=True), 1)

        dx, found = linearised(field, t, x, context, both)
        return dx, found[:, :1], found[:, 1]

    def _closed(self, field: BoundField) -> bool:
        """Whether the field's closed form is used."""
        return self.closed_form and offers(field, "closed_form")

    def _trace(
        self, products: Products, x: Tensor, *, squares: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sums over all directions of e_i^T J e_i and, where asked, of |e_i^T J|^2, (B,)."""
        batch, dims = x.shape[0], math.prod(x.shape[1:])
        chunk = self.chunk_size or dims
        if not (self.chunk_size or torch.compiler.is_compiling()):  # there B is not a number
            chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * dims))
            chunk = chunk if x.is_cuda else min(chunk, _CHUNK_ON_CPU)
        div = square = x.new_zeros(batch)
        for start in range(0, dims, chunk):
            i = range(start, min(start + chunk, dims))
            basis = torch.eye(dims, dtype=x.dtype, device=x.device)[start : i.stop]
            e = basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)  # (K, B, *event)
            if torch.compiler.is_compiling():
                # Written out: torch 2.13 mistakes the strides of an expanded tensor that a
                # graph for every batch size saves for its backward pass.
                e = e.contiguous()
            for k, row in zip(i, products(e), strict=True):
                row = row.reshape(batch, dims)
                div = div + row[:, k]
                if squares:
                    square = square + row.square().sum(1)
        return div, square
