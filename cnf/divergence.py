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
from typing import Any, Literal

import torch
from torch import Tensor

from cnf.checks import check_choice, check_count
from cnf.fields.base import Constants
from cnf.fields.closed_form import offers
from cnf.graph import unknown_leaves
from cnf.warn import warn

__all__ = ["Divergence", "Estimator", "Exact", "HutchPlusPlus", "Hutchinson", "as_divergence"]

BoundField = Any
"""f(t, x, context) -> dx with t (), x (B, *event), context (B, C) or None, dx (B, *event), and the
closed forms that `VectorField` describes, where the field has them."""

Products = Callable[[Tensor], "Sequence[Tensor] | Tensor"]
"""The products v^T df/dx for each of the vectors v (K, B, *event): K of (B, *event)."""

_CHUNK_ELEMENTS = 2**24  # numbers in one batch of products: 64 MiB in float32
_CHUNK_ON_CPU = 4  # products in one batch: more leave the cache, and took twice as long
_UNROLLED = 8  # products that a compiled evaluation takes one by one
_MANY_PRODUCTS = 256  # above it, `Exact` says what it will cost


class Divergence(ABC):
    """How div f is computed, as a frozen value.

    To add one, inherit, and write

    1. `sample_noise(x, generator)` returns what is random, once a solve, or None.
    2. `constants(field, x, noise)` returns tensors that do not change in a solve: computed once,
       they reach every evaluation, and get their gradient.
    3. `__call__(field, t, x, context, noise, constants)` returns f and its divergence, a function
       of its arguments alone, differentiable in all of them where grad mode is on.
    """

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The noise of one solve (B, ...), or None where nothing is random.

        Args:
            x: state (B, *event), for shape, dtype and device.
            generator: source of randomness; None for torch's global one.
        """
        return None

    def constants(self, field: BoundField, x: Tensor, noise: Tensor | None) -> Constants:
        """What does not change in a solve: tensors, (B, ...) where there is noise.

        Args:
            field: the vector field.
            x: state (B, *event) at the start, for shape, dtype and device.
            noise: from `sample_noise`.
        """
        return ()

    @abstractmethod
    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) and its divergence.

        Args:
            field: the vector field; samples must not depend on one another.
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            noise: from `sample_noise`, its first dimension that of the samples.
            constants: from `constants(field, x, noise)`; None computes them anew.

        Returns:
            dx (B, *event) and the divergence (B,).
        """


class Estimator(Divergence):
    """A divergence estimated from probes: the mean of k unbiased estimates.

    To add one, inherit, and write `sample_noise` and `estimates`.

    Attributes:
        probes: k.
    """

    probes: int

    def check_standard_error(self) -> None:
        """Refuse to tell a standard error from too few probes, or from dependent ones.

        Raises:
            ValueError: fewer than two probes.
        """
        if self.probes < 2:
            raise ValueError(
                f"a standard error takes at least two probes, got probes={self.probes}; "
                f"use {type(self).__name__}(probes=16)"
            )

    @abstractmethod
    def estimates(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event), and the estimate of each probe (B, k)."""

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and the estimate of its divergence (B,)."""
        dx, each = self.estimates(field, t, x, context, noise, constants)
        return dx, each.squeeze(1) if each.shape[1] == 1 else each.mean(1)


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
        if self.closed_form and offers(field, "closed_form"):
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
        if not (self.closed_form and offers(field, "closed_form")):
            return _linearised(field, t, x, context, lambda products: self._trace(products, x))
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

    def _trace(self, products: Products, x: Tensor) -> Tensor:
        """The sum of e_i^T J e_i over all directions (B,)."""
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


@dataclass(frozen=True)
class Hutchinson(Estimator):
    """Hutchinson's estimate of the divergence: the mean over k probes e of e^T J e, E[e e^T] = I.

    Unbiased. With S = (J + J^T) / 2, the variance of one probe is 2 ||S||_F^2 for Gaussian noise
    and 2 (||S||_F^2 - sum_i S_ii^2) for Rademacher noise, so Rademacher is the default; k
    independent probes divide it by k. Orthogonal probes are sqrt(D) times k orthonormal vectors,
    uniform on the sphere: each alone is as good as 2 D / (D + 2) (||S||_F^2 - tr^2 / D), together
    they are better than independent ones, and with k = D exact.

    Args:
        noise: "rademacher" (+1 or -1), "gaussian", or "orthogonal".
        probes: k; orthogonal ones beyond D come in blocks of D.

    Raises:
        TypeError: noise that is a number.
        ValueError: an unknown noise, or probes not a positive integer.

    Reference: FFJORD, Grathwohl et al., arXiv 1810.01367; orthogonal probes, Yu et al.,
    arXiv 1610.09072.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> estimate = Hutchinson()
        >>> e = estimate.sample_noise(x)  # a diagonal Jacobian: exact with Rademacher noise
        >>> estimate(lambda t, x, c: x**2, torch.tensor(0.0), x, None, e)[1]
        tensor([6.])
    """

    noise: Literal["rademacher", "gaussian", "orthogonal"] = "rademacher"
    probes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.noise, int):
            raise TypeError(
                f"noise={self.noise!r} must be a name, the number of probes is another argument; "
                f"use Hutchinson(probes={self.noise!r})"
            )
        check_choice("noise", self.noise, ("rademacher", "gaussian", "orthogonal"))
        check_count("probes", self.probes)

    def check_standard_error(self) -> None:
        """Refuse to tell a standard error from too few probes, or from orthogonal ones.

        Raises:
            ValueError: fewer than two probes, or orthogonal ones.
        """
        super().check_standard_error()
        if self.noise == "orthogonal":
            raise ValueError(
                "orthogonal probes are not independent, so their spread is not that of their mean; "
                "use noise='rademacher' for a standard error"
            )

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes (B, k, *event)."""
        return _draw(self.noise, x, self.probes, generator)

    def constants(self, field: BoundField, x: Tensor, noise: Tensor | None) -> Constants:
        """What the field's closed form of the estimate needs, or nothing."""
        if offers(field, "closed_quadratic_form"):
            return field.quadratic_form_constants(_checked(noise, x, self.probes))
        return ()

    def estimates(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and e^T J e for each probe (B, k)."""
        probes = _checked(noise, x, self.probes)
        if offers(field, "closed_quadratic_form"):
            constants = self.constants(field, x, noise) if constants is None else constants
            dx, form = field.with_quadratic_form(t, x, context, constants)
            return dx, form
        probes = probes.movedim(1, 0)  # (k, B, *event)

        def forms(products: Products) -> Tensor:
            rows = zip(products(probes), probes, strict=True)
            return torch.stack([_dot(row, e) for row, e in rows], 1)

        return _linearised(field, t, x, context, forms)


@dataclass(frozen=True)
class HutchPlusPlus(Estimator):
    """Hutch++: the trace over r directions in which J is large, and Hutchinson's for what is left.

        tr J = tr(Q^T J Q) + mean_k g^T (I - Q Q^T) J (I - Q Q^T) g,    Q = orth(J^T S)

    Unbiased, with the variance of the rest alone: far less noise than Hutchinson's where few
    directions dominate the Jacobian. It takes 2 r + k products.

    Args:
        rank: r, columns of the sketch S, at most D.
        probes: k.

    Raises:
        ValueError: rank or probes not a positive integer; in use, a rank above D.

    Reference: Meyer, Musco, Musco & Woodruff, arXiv 2010.09649.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> estimate = HutchPlusPlus(rank=1, probes=1)
        >>> noise = estimate.sample_noise(x)
        >>> dx, div = estimate(lambda t, x, c: x.sin(), torch.tensor(0.0), x, None, noise)
        >>> div.shape
        torch.Size([1])
    """

    rank: int = 4
    probes: int = 4

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("probes", self.probes)

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The sketch and the probes (B, r + k, *event)."""
        dims = math.prod(x.shape[1:])
        if self.rank > dims:
            raise ValueError(f"rank={self.rank} must be at most D={dims}; use cnf.Exact() there")
        sketch = _draw("gaussian", x, self.rank, generator)
        return torch.cat((sketch, _draw("rademacher", x, self.probes, generator)), 1)

    def estimates(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and the estimate of each probe (B, k)."""
        dims = math.prod(x.shape[1:])
        noise = _checked(noise, x, self.rank + self.probes)
        flat = noise.reshape(*noise.shape[:2], dims)  # (B, r + k, D)
        sketch, probes = flat.split((self.rank, self.probes), 1)

        def forms(products: Products) -> Tensor:
            def rows(vectors: Tensor) -> Tensor:  # v^T J: (B, K, D) -> (B, K, D)
                batch = vectors.movedim(1, 0).reshape(-1, *x.shape)
                return torch.stack([row.reshape(-1, dims) for row in products(batch)], 1)

            seen = rows(sketch)
            # A part of the sketch itself: any Q will do, but the derivative of QR needs full rank.
            size = seen.norm(dim=(1, 2), keepdim=True) / sketch.norm(dim=(1, 2), keepdim=True)
            info = torch.finfo(x.dtype)
            seen = seen + (info.eps**0.5 * size.detach() + info.tiny**0.5) * sketch
            q = torch.linalg.qr(seen.mT).Q.mT  # (B, r, D), orthonormal rows
            rest = probes - probes @ q.mT @ q
            both = torch.cat((q, rest), 1)
            form = (rows(both) * both).sum(-1)  # (B, r + k)
            return form[:, : self.rank].sum(1, keepdim=True) + form[:, self.rank :]

        return _linearised(field, t, x, context, forms)


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


def _draw(noise: str, x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Probes (B, k, *event) with E[e e^T] = I."""
    device = x.device if generator is None else generator.device
    shape = (x.shape[0], probes, *x.shape[1:])
    if noise == "rademacher":
        e = torch.randint(0, 2, shape, dtype=x.dtype, device=device, generator=generator)
        return (2 * e - 1).to(x.device)
    e = torch.randn(shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
    flat = e.reshape(*shape[:2], math.prod(x.shape[1:]))
    return e if noise == "gaussian" else _orthogonal(flat).reshape(shape)


def _orthogonal(e: Tensor) -> Tensor:
    """Gaussian rows (B, k, D) made orthogonal, of the length sqrt(D), uniform in direction."""
    dims = e.shape[-1]
    blocks = []
    for block in e.split(dims, 1) if dims else ():
        blocks.append(torch.linalg.qr(block.mT).Q.mT)  # uniform but for signs, which do not count
    return math.sqrt(dims) * torch.cat(blocks, 1) if blocks else e


def _checked(noise: Tensor | None, x: Tensor, probes: int) -> Tensor:
    shape = (x.shape[0], probes, *x.shape[1:])
    if noise is None or noise.shape != shape:
        seen = None if noise is None else tuple(noise.shape)
        raise ValueError(
            f"noise must have the shape (B, probes, *event) = {tuple(shape)}, "
            f"got {seen}; draw it with sample_noise(x)"
        )
    return noise


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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample of a and b: (B, *event) -> (B,)."""
    product = a * b
    return product if product.ndim == 1 else product.flatten(1).sum(1)
