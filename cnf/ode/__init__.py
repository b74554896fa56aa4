"""The ODE engine: explicit Runge-Kutta methods over a state and quadratures.

`odeint` solves; a frozen `Solver` holds every choice; `record_solves` collects what solves did.
"""

from __future__ import annotations

from cnf.ode.methods import METHODS, Tableau
from cnf.ode.odeint import Solution, odeint
from cnf.ode.solver import Solver
from cnf.ode.stats import SolveStats, record_solves
from cnf.ode.torchdiffeq import TorchDiffEq

__all__ = [
    "METHODS",
    "Solution",
    "SolveStats",
    "Solver",
    "Tableau",
    "TorchDiffEq",
    "odeint",
    "record_solves",
]
