"""Estimates of the divergence from probes: Hutchinson's and Hutch++."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cnf.checks import check_choice, check_count
from cnf.divergence.base import BoundField, Estimator
from cnf.divergence.products import Products, linearised
from cnf.fields.base import Constants
from cnf.fields.closed_form import offers
from cnf.noise import draw

__all__ = ["HutchPlusPlus", "Hutchinson"]


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

        return linearised(field, t, x, context, forms)

    def norm_needs_probe(self, field: BoundField) -> bool:
        """Never: it has probes."""
        return False

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
        """f, e^T J e for each probe (B, k), and the mean of |e^T J|^2 (B,), by the same products.

        Where the estimate has a closed form, there are none: then by one, with the first probe.
        """
        probes = _checked(noise, x, self.probes).movedim(1, 0)  # (k, B, *event)
        if offers(field, "closed_quadratic_form"):
            return super().with_norm(field, t, x, context, noise, constants, probes[0])

        def both(products: Products) -> Tensor:
            rows = list(products(probes))
            forms = [_dot(row, e) for row, e in zip(rows, probes, strict=True)]
            square = torch.stack([_dot(row, row) for row in rows], 1).mean(1)
            return torch.stack([*forms, square], 1)

        dx, found = linearised(field, t, x, context, both)
        return dx, found[:, :-1], found[:, -1]


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
                batch = vectors.movedim(1, 0).reshape(vectors.shape[1], *x.shape)
                return torch.stack([row.reshape(x.shape[0], dims) for row in products(batch)], 1)

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

        return linearised(field, t, x, context, forms)


def _draw(noise: str, x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Probes (B, k, *event) with E[e e^T] = I."""
    shape = (x.shape[0], probes, *x.shape[1:])
    if noise == "rademacher":
        return 2 * draw(torch.randint, 0, 2, shape, like=x, generator=generator) - 1
    e = draw(torch.randn, shape, like=x, generator=generator)
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample of a and b: (B, *event) -> (B,)."""
    product = a * b
    return product if product.ndim == 1 else product.flatten(1).sum(1)
