"""Regularisers of a CNF's path: quantities integrated along it, which training makes small.

Each is a frozen value with a name, a weight and an integrand. `MaximumLikelihood` takes them; the
integrals are quadratures of the solve, outside its error norm, so that neither its steps nor the
log-density change.
"""

from __future__ import annotations

from cnf.regularizers.base import Point, Regularizer
from cnf.regularizers.hjb import HJBResidual
from cnf.regularizers.jacobian import JacobianFrobenius
from cnf.regularizers.kinetic import KineticEnergy
from cnf.regularizers.taylor import TaylorDerivative

__all__ = [
    "HJBResidual",
    "JacobianFrobenius",
    "KineticEnergy",
    "Point",
    "Regularizer",
    "TaylorDerivative",
]
