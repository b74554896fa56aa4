"""`Sylvester`: the Sylvester flow, a planar flow in many directions at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.checks import check_bool, check_choice, check_count
from cnf.transforms.amortized import Amortized
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.roots import ACTIVATIONS, above_minus_one, root

__all__ = ["Sylvester"]

KINDS = ("orthogonal", "householder", "triangular")


class Sylvester(DiscreteTransform):
    """A Sylvester flow: a residual layer of M hidden units whose Jacobian is triangular inside.

        x = z + Q R h(a),    a = R~ Q^T z + b
        log |det dx/dz| = sum_i log(1 + r_ii r~_ii h'(a_i))

    with R and R~ (M, M) upper triangular, and Q (D, M) with orthonormal columns: by QR
    decomposition of a matrix of full rank ("orthogonal"), as a product of Householder reflections
    ("householder"), or no more than the order of the dimensions ("triangular").

    Diagonals: r_ii >= -0.999 by softplus and 0 < r~_ii < 1 by sigmoid, so r_ii r~_ii > -1 and the
    layer is invertible whatever its parameters. (The paper takes tanh of both, which this
    contains: the sign of r~_ii is one of a column of Q.) It starts as the identity, with context
    near it. `inverse` solves one scalar equation for each hidden unit, one after the other, to
    machine precision; its first and second derivatives are exact.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        rank: number of hidden units M <= D, where the kind is "orthogonal"; None for D.
        context: number of context features, 0 for none. With context every parameter is a linear
            function of it, so that every sample has its own.
        kind: how Q is parametrised, one of "orthogonal", "householder", "triangular".
        reflections: number of reflections, where the kind is "householder"; None for 8.
        reverse: whether Q reverses the dimensions, where the kind is "triangular"; alternate it in
            a stack.
        activation: h, one of "tanh", "softplus", "elu", "leaky_relu", "sigmoid", "arctan".

    Shapes:
        z, x (*batch, *event); context (*batch, C); log_det (*batch,).

    Raises:
        TypeError: `reverse` is no bool.
        ValueError: an unknown kind or activation, a size that is not positive or does not fit, an
            argument that concerns another kind.

    Reference:
        van den Berg et al., Sylvester Normalizing Flows for Variational Inference,
        arXiv 1803.05649.

    Example:
        >>> sylvester = Sylvester(3, rank=2)
        >>> z = torch.randn(5, 3)
        >>> x, log_det = sylvester.forward_and_log_det(z)
        >>> torch.allclose(sylvester.inverse(x), z, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int | Sequence[int],
        rank: int | None = None,
        context: int = 0,
        *,
        kind: str = "orthogonal",
        reflections: int | None = None,
        reverse: bool = False,
        activation: str = "tanh",
    ) -> None:
        super().__init__(features, context)
        check_choice("kind", kind, KINDS)
        check_choice("activation", activation, ACTIVATIONS)
        self.kind, self.activation, self.reverse = kind, activation, reverse
        self.rank = self.dims if rank is None else rank
        self._check(reflections)
        m = self.rank
        initial = {
            "triangles": (0.1 / math.sqrt(m) * torch.randn(m, m)).tril(-1),  # R above, R~^T below
            "diagonal": torch.zeros(m),  # of R~, before its sigmoid
            "b": torch.zeros(m),
        }
        if kind == "orthogonal":
            initial["q"] = torch.randn(self.dims, m)
        elif kind == "householder":
            initial["q"] = torch.randn(8 if reflections is None else reflections, self.dims)
        self.free = Amortized(initial, context)

    def _check(self, reflections: int | None) -> None:
        """Refuse what does not fit the kind."""
        check_count("rank", self.rank)
        check_bool("reverse", self.reverse)
        if self.rank > self.dims:
            raise ValueError(f"rank={self.rank} must be at most the {self.dims} dimensions")
        if self.rank < self.dims and self.kind != "orthogonal":
            raise ValueError(
                f"rank={self.rank} concerns kind='orthogonal', got kind={self.kind!r}, whose rank "
                f"is that of the {self.dims} dimensions; leave rank out"
            )
        if reflections is not None:
            check_count("reflections", reflections)
            if self.kind != "householder":
                raise ValueError(
                    f"reflections={reflections} concern kind='householder', got "
                    f"kind={self.kind!r}; leave them out"
                )
        if self.reverse and self.kind != "triangular":
            raise ValueError(
                f"reverse=True concerns kind='triangular', got kind={self.kind!r}; leave it out"
            )

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x = z + Q R h(a)."""
        q, out, within, b, p = self._constrained(context, z)
        flat = z.reshape(z.shape[0], self.dims)
        a = _apply(within, _apply(q.mT, flat)) + b  # (B, M)
        h, log_det = self._bend(a, p)
        return (flat + _apply(q, _apply(out, h))).reshape(z.shape), log_det

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z = x - Q R h(a), where a is found from the last hidden unit to the first.

        With v = Q^T z, row i of Q^T x = v + R h(R~ v + b) holds, beside what is known, v_i and
        a_i = c + r~_ii v_i, which gives a_i + r_ii r~_ii h(a_i) = c + r~_ii y_i.
        """
        q, out, within, b, p = self._constrained(context, x)
        flat = x.reshape(x.shape[0], self.dims)
        v = _apply(q.mT, flat)  # (B, M): y less what is known of R h; in the end v
        a = b.expand_as(v)  # (B, M): b and what is known of R~ v; in the end a
        for i in reversed(range(self.rank)):
            y = a[:, i] + within[..., i, i] * v[:, i]
            h = ACTIVATIONS[self.activation](root(ACTIVATIONS[self.activation], y, p[..., i]))[0]
            v = v - out[..., i] * h.unsqueeze(-1)
            a = a + within[..., i] * v[:, i].unsqueeze(-1)
        h, log_det = self._bend(a, p)
        return (flat - _apply(q, _apply(out, h))).reshape(x.shape), -log_det

    def _bend(self, a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """h(a) (B, M) and the log-determinant (B,)."""
        h, slope, rest = ACTIVATIONS[self.activation](a)
        return h, torch.log(rest + p * slope).sum(-1)

    def _constrained(
        self, context: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q (D, M), R and R~ (M, M), b (M,), p = 1 + r_ii r~_ii (M,); with (B, ...) before it."""
        triangles, diagonal, b, *free = self.free(context)
        own, p = above_minus_one(triangles.diagonal(dim1=-2, dim2=-1))
        out = triangles.triu(1) + torch.diag_embed(own)
        shrink, rest = torch.sigmoid(diagonal), torch.sigmoid(-diagonal)
        within = triangles.mT.triu(1) + torch.diag_embed(shrink)
        return self._basis(free, like), out, within, b, rest + shrink * p

    def _basis(self, free: Sequence[Tensor], like: Tensor) -> Tensor:
        """Q (D, M) or (B, D, M)."""
        if self.kind == "orthogonal":
            return torch.linalg.qr(free[0])[0]
        q = torch.eye(self.dims, dtype=like.dtype, device=like.device)
        if self.kind == "triangular":
            return q.flip(0) if self.reverse else q
        for v in free[0].unbind(-2):  # (D,) or (B, D)
            square = v.square().sum(-1, keepdim=True)
            square = torch.where(square > torch.finfo(v.dtype).tiny, square, 1.0)
            q = q - 2 * (q @ v.unsqueeze(-1)) * (v / square).unsqueeze(-2)
        return q

    def extra_repr(self) -> str:
        """What it was built with."""
        more = ", reverse=True" if self.reverse else ""
        return f"rank={self.rank}, kind={self.kind!r}{more}, activation={self.activation!r}"


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix (N, M), or one for each sample (B, N, M), times vectors (B, M): (B, N)."""
    if matrix.ndim == 2:
        return vectors @ matrix.mT
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
