"""The kinetic energy of the path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cnf.regularizers.base import Point, Regularizer, squared_norm

__all__ = ["KineticEnergy"]


@dataclass(frozen=True)
class KineticEnergy(Regularizer):
    """The kinetic energy of the path, as RNODE has it: the cost of the transport.

        int |f(t, x)|^2 dt

    Least where samples move in straight lines at constant speed. It costs nothing.

    Args:
        weight: its factor in the loss, 0 or more.

    Raises:
        TypeError: a weight that is no number.
        ValueError: a weight that is negative or not finite.

    Reference: RNODE, Finlay et al., arXiv 2002.02798.

    Example:
        >>> import cnf, torch
        >>> penalty = [KineticEnergy(0.01)]
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: 0 * x + 2, "exact"))
        >>> _, energy = flow.log_prob_and_integrals(torch.zeros(1, 2), regularizers=penalty)
        >>> round(energy.item(), 4)
        8.0
    """

    weight: float

    name = "kinetic_energy"

    def integrand(self, point: Point) -> Tensor:
        """|f|^2 (B,)."""
        return squared_norm(point.dx)
