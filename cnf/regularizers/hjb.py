"""The residual of the Hamilton-Jacobi-Bellman equation, of fields with a potential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cnf.fields.closed_form import written_for
from cnf.fields.potential import PotentialField
from cnf.regularizers.base import Point, Regularizer, squared_norm

__all__ = ["HJBResidual"]


@dataclass(frozen=True)
class HJBResidual(Regularizer):
    """How far a potential is from that of an optimal transport, as OT-Flow has it.

        int |dPhi/dt - |grad_x Phi|^2 / 2| dt,    f = -grad_x Phi

    the Hamilton-Jacobi-Bellman equation, for `PotentialField` alone. (OT-Flow's time runs from
    data to base, which changes the sign of dPhi/dt.) It costs one more evaluation of the field.

    Args:
        weight: its factor in the loss, 0 or more.

    Raises:
        TypeError: a weight that is no number; in use, a field other than `PotentialField`.
        ValueError: a weight that is negative or not finite.

    Reference: OT-Flow, Onken et al., arXiv 2006.00104.

    Example:
        >>> import cnf, torch
        >>> flow = cnf.FFJORD(2, field=cnf.PotentialField)
        >>> penalties = [cnf.KineticEnergy(0.01), HJBResidual(0.01)]
        >>> cnf.MaximumLikelihood(flow, regularizers=penalties)(torch.randn(16, 2)).shape
        torch.Size([])
    """

    weight: float

    name = "hjb_residual"

    def integrand(self, point: Point) -> Tensor:
        """|dPhi/dt - |grad_x Phi|^2 / 2| (B,)."""
        gradient, slope = point.field.potential_gradient(point.t, point.x, point.context)
        residual: Tensor = slope - squared_norm(gradient) / 2
        return residual.abs()

    def check_field(self, field: Any) -> None:
        """Refuse a field without a potential."""
        if not isinstance(field, PotentialField):
            raise TypeError(
                f"HJBResidual needs the potential of a cnf.PotentialField, got a field of type "
                f"{type(field).__name__}; use cnf.FFJORD(..., field=cnf.PotentialField), or "
                "cnf.KineticEnergy, which any field allows"
            )
        if not written_for(field, ["potential_gradient"], ["forward", "derivative", "__call__"]):
            raise TypeError(
                f"HJBResidual needs the potential of the field, but {type(field).__name__} "
                "computes values of its own, and the potential is that of its parent; write its "
                "potential_gradient"
            )
