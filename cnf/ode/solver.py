"""The choices of a solve, as one immutable value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cnf.checks import check_bool, check_choice, check_count, check_number
from cnf.ode.methods import Tableau, tableau

__all__ = ["Solver", "check_tolerances"]


def check_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that are negative, not finite, or both zero."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_number(name, value)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be finite and not negative, such as 1e-5")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol=0 and atol=0 ask for an exact solve; set one of them, such as 1e-5")


@dataclass(frozen=True)
class Solver:
    """How to solve an ODE: the method, its accuracy, its limits, and how gradients are taken.

    A frozen value: `dataclasses.replace(solver, rtol=1e-8, atol=1e-8)` tightens an evaluation.

    Args:
        method: "euler", "midpoint", "heun", "rk4" (fixed `steps`), or "bosh3", "dopri5",
            "tsit5", "dopri8" (adaptive).
        rtol: relative tolerance of the local error (adaptive methods).
        atol: absolute tolerance of the local error (adaptive methods).
        steps: number of equal steps (fixed methods).
        max_steps: limit on tried steps, accepted and rejected (adaptive methods).
        gradient: "backprop" keeps the graph: the exact gradient of the computed solution, second
            derivatives included; "checkpoint" gives the same gradient but recomputes each accepted
            step in the backward pass: memory of one step plus one state a step; "adjoint" solves
            the continuous adjoint equation backwards (Chen et al., arXiv 1806.07366), its
            parameter part left out of the error norm (Kidger et al., arXiv 2009.09457): constant
            memory, a gradient that is only as good as the tolerances.
        error_control: "log_det" holds the state and the log-determinant to the tolerances;
            "state" only the state: fewer evaluations, a log-determinant without a promise.
        first_step: size of the first step in units of time; None chooses it (adaptive methods).
        batch: "shared" steps for the whole batch, as small as its hardest sample needs; or
            "independent" steps for each sample: its result depends on no other sample.
        on_failure: "raise" a `SolverError`; or "nan" for the samples that fail, and for the others
            what they get without those.
        compile: compile each step with `torch.compile`, forward and backward: slow the first time
            (up to a minute), faster ever after; no second derivatives. What cannot be compiled
            runs eagerly, after a warning. `torch.compile(flow)` leaves solves out of its graph, and
            gives the same numbers as without it: this compiles their steps, inside it or outside.
        check_field: refuse a field that is not a function of (t, x): dropout or batch norm in
            training, random numbers drawn in it, other values where "checkpoint" or "adjoint"
            evaluate it again in backward. Without the check such a field makes their gradients
            wrong.

    Raises:
        ValueError: a choice that is not known, or a number out of its range.

    Example:
        >>> import dataclasses
        >>> solver = Solver("dopri5", rtol=1e-5, atol=1e-5)
        >>> dataclasses.replace(solver, rtol=1e-8).rtol
        1e-08
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 20
    max_steps: int = 1000
    gradient: Literal["backprop", "checkpoint", "adjoint"] = "backprop"
    error_control: Literal["log_det", "state"] = "log_det"
    first_step: float | None = None
    batch: Literal["shared", "independent"] = "shared"
    on_failure: Literal["raise", "nan"] = "raise"
    compile: bool = False
    check_field: bool = True

    def __post_init__(self) -> None:
        tableau(self.method)
        check_tolerances(self.rtol, self.atol)
        check_count("steps", self.steps)
        check_count("max_steps", self.max_steps)
        check_choice("gradient", self.gradient, ("backprop", "checkpoint", "adjoint"))
        check_choice("error_control", self.error_control, ("log_det", "state"))
        check_choice("batch", self.batch, ("shared", "independent"))
        check_choice("on_failure", self.on_failure, ("raise", "nan"))
        check_bool("compile", self.compile)
        check_bool("check_field", self.check_field)
        if self.first_step is not None:
            check_number("first_step", self.first_step)
            if not 0 < self.first_step < math.inf:
                raise ValueError(f"first_step={self.first_step} must be positive (or None)")

    @property
    def tableau(self) -> Tableau:
        """The Butcher tableau of the method."""
        return tableau(self.method)

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps by the tolerances."""
        return self.tableau.adaptive
