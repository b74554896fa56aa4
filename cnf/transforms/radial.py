"""`Radial`: the radial flow, which moves samples towards or away from a point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.transforms.amortized import Amortized
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.roots import above_minus_one

__all__ = ["Radial"]


class Radial(DiscreteTransform):
    """A radial flow: samples move towards or away from a point z0.

        x = z + beta (z - z0) / (alpha + r),    r = |z - z0|
        log |det dx/dz| = (D - 1) log(1 + beta h) + log(1 + alpha beta h^2),    h = 1 / (alpha + r)
        alpha > 0 and beta / alpha >= -0.999, both by softplus

    As beta > -alpha it is invertible whatever its parameters, in closed form: r solves a quadratic
    equation. It starts as the identity, with context near it. The log-determinant has a cone at
    z0, where its gradient is given as 0.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        context: number of context features, 0 for none. With context z0, alpha and beta are
            functions of it, so that every sample has its own.

    Shapes:
        z, x (*batch, *event); context (*batch, C); log_det (*batch,).

    Raises:
        ValueError: a size that is not positive.

    Reference:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, arXiv 1505.05770.

    Example:
        >>> radial = Radial(2)
        >>> z = torch.randn(5, 2)
        >>> x, log_det = radial.forward_and_log_det(z)
        >>> torch.allclose(radial.inverse(x), z, atol=1e-5)
        True
    """

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__(features, context)
        initial = {
            "centre": torch.randn(self.dims),
            "radius": torch.zeros(()),  # alpha, before its softplus
            "pull": torch.zeros(()),  # beta / alpha, before its softplus
        }
        self.free = Amortized(initial, context)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x = z0 + (z - z0) (1 + beta h)."""
        centre, alpha, p = self._constrained(context)
        away = z.reshape(z.shape[0], self.dims) - centre
        stretch, log_det = self._stretch(_norm(away), alpha, p)
        return (centre + away * stretch.unsqueeze(-1)).reshape(z.shape), log_det

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z = z0 + (x - z0) / (1 + beta h), where r (1 + beta h) = |x - z0|."""
        centre, alpha, p = self._constrained(context)
        away = x.reshape(x.shape[0], self.dims) - centre
        r = _radius(_norm(away), alpha, p)
        stretch, log_det = self._stretch(r, alpha, p)
        return (centre + away / stretch.unsqueeze(-1)).reshape(x.shape), -log_det

    def _stretch(self, r: Tensor, alpha: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """1 + beta h (B,) and the log-determinant (B,) at r (B,)."""
        near, far = alpha / (alpha + r), r / (alpha + r)  # near + far = 1; all terms are positive
        across = far + p * near
        along = far * (1 + near) + p * near.square()  # 1 + alpha beta h^2
        return across, (self.dims - 1) * torch.log(across) + torch.log(along)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """z0 (D,), alpha () and p = 1 + beta / alpha (), with (B, ...) before it with context."""
        centre, radius, pull = self.free(context)
        return centre, above_minus_one(radius)[1], above_minus_one(pull)[1]


def _norm(v: Tensor) -> Tensor:
    """|v| over the last dimension; its gradient at 0 is 0."""
    square = v.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, square)))


def _radius(y: Tensor, alpha: Tensor, p: Tensor) -> Tensor:
    """The r >= 0 with r (r + alpha p) = y (alpha + r): of the two forms the one that adds."""
    c = y - alpha * p
    size = torch.where(c >= 0, c, -c)
    half = (size + torch.sqrt(c.square() + 4 * alpha * y)) / 2
    half = torch.where((c < 0) | (half > 0), half, 1.0)
    return torch.where(c >= 0, half, alpha * y / half)
