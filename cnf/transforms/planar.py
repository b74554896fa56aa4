"""`Planar`: the planar flow, which moves samples along one direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.transforms.amortized import Amortized
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.roots import ACTIVATIONS, above_minus_one, root

__all__ = ["Planar"]


class Planar(DiscreteTransform):
    """A planar flow: samples move along one direction, by how far they are across a plane.

        x = z + u^ h(a),    a = w.z + b,    log |det dx/dz| = log(1 + k h'(a)),    k = w.u^
        u^ = u + (m(w.u) - w.u) w / |w|^2,    so that k = m(w.u)
        m(s) = softplus(s + log(e - 1)) - 1, raised so little that m >= -0.999

    As k > -1 and 0 <= h' <= 1 it is invertible whatever its parameters. It starts as the identity,
    with context near it. `inverse` has no closed form: it solves a + k h(a) = w.x + b by a fixed
    number of iterations to machine precision, and costs some thirty times `forward`; its first and
    second derivatives are exact. Near w = 0 the map depends on the direction of w, so the gradient
    with respect to w grows like 1 / |w| there; at w = 0 it is finite.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        context: number of context features, 0 for none. With context u, w and b are a linear
            function of it, so that every sample has its own.
        activation: h, one of "tanh", "softplus", "elu", "leaky_relu", "sigmoid", "arctan".

    Shapes:
        z, x (*batch, *event); context (*batch, C); log_det (*batch,).

    Raises:
        ValueError: an unknown activation, a size that is not positive.

    Reference:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, arXiv 1505.05770.

    Example:
        >>> planar = Planar(2, context=3)
        >>> z, context = torch.randn(5, 2), torch.randn(5, 3)
        >>> x, log_det = planar.forward_and_log_det(z, context)
        >>> torch.allclose(planar.inverse(x, context), z, atol=1e-5)
        True
    """

    def __init__(
        self, features: int | Sequence[int], context: int = 0, activation: str = "tanh"
    ) -> None:
        super().__init__(features, context)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        across = torch.randn(self.dims) / math.sqrt(self.dims)
        initial = {"u": torch.zeros(self.dims), "w": across, "b": torch.zeros(())}
        self.free = Amortized(initial, context)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x = z + u^ h(a) and log(1 + k h'(a))."""
        u, w, b, p = self._constrained(context)
        flat = z.reshape(z.shape[0], self.dims)
        h, log_det = self._bend((w * flat).sum(-1) + b, p)
        return (flat + u * h).reshape(z.shape), log_det

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z = x - u^ h(a) and -log(1 + k h'(a)), where a + k h(a) = w.x + b."""
        u, w, b, p = self._constrained(context)
        flat = x.reshape(x.shape[0], self.dims)
        a = root(ACTIVATIONS[self.activation], (w * flat).sum(-1) + b, p)
        h, log_det = self._bend(a, p)
        return (flat - u * h).reshape(x.shape), -log_det

    def _bend(self, a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """h(a) (B, 1) and log(1 + k h'(a)) (B,)."""
        h, slope, rest = ACTIVATIONS[self.activation](a)
        return h.unsqueeze(-1), torch.log(rest + p * slope)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u^ (D,), w (D,), b () and p = 1 + w.u^ (), each with (B, ...) before it with context."""
        u, w, b = self.free(context)
        square = (w * w).sum(-1, keepdim=True)
        square = torch.where(square > torch.finfo(w.dtype).tiny, square, 1.0)
        along = (w * u).sum(-1, keepdim=True)
        k, p = above_minus_one(along)
        u = u - along * w / square
        u = u - (w * u).sum(-1, keepdim=True) * w / square  # once more: the first leaves rounding
        return u + k * w / square, w, b, p.squeeze(-1)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"
