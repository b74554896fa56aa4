"""The Frobenius norm of the Jacobian along the path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cnf.regularizers.base import Point, Regularizer

__all__ = ["JacobianFrobenius"]


@dataclass(frozen=True)
class JacobianFrobenius(Regularizer):
    """The squared Frobenius norm of the field's Jacobian along the path, as RNODE has it.

        int ||df/dx||_F^2 dt = int E |e^T df/dx|^2 dt,    E[e e^T] = I

    It comes from the products that the divergence takes, with no other: by the probes of
    `Hutchinson`, unbiased, or from the rows of `Exact`, exactly. Where the divergence is a closed
    form, or another's, it takes one product, with a probe that is the same in the whole solve.

    Args:
        weight: its factor in the loss, 0 or more.

    Raises:
        TypeError: a weight that is no number.
        ValueError: a weight that is negative or not finite.

    Reference: RNODE, Finlay et al., arXiv 2002.02798.

    Example:
        >>> import cnf, torch
        >>> penalty = [JacobianFrobenius(0.01)]
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: 2 * x, "exact"))
        >>> _, norm = flow.log_prob_and_integrals(torch.zeros(1, 2), regularizers=penalty)
        >>> round(norm.item(), 4)
        8.0
    """

    weight: float

    name = "jacobian_frobenius"
    uses_jacobian = True

    def integrand(self, point: Point) -> Tensor:
        """||df/dx||_F^2 (B,), exact or estimated."""
        if point.jacobian_square is None:
            raise ValueError(
                "point.jacobian_square is missing; set uses_jacobian on the Regularizer that is "
                "integrated"
            )
        return point.jacobian_square
