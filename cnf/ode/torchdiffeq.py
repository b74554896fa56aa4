"""torchdiffeq as a backend: its other methods, such as implicit Adams or Heun with error control.

Its own time stepping is kept; the error norm per sample, the check for NaN, the limit of
evaluations and the typed errors are added around the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cnf.checks import check_bool, check_choice, check_count
from cnf.errors import SolverError
from cnf.ode.attention import differentiable_attention
from cnf.ode.control import Tolerance
from cnf.ode.failure import Failure, largest
from cnf.ode.gradient import first_derivative
from cnf.ode.rhs import RightHandSide
from cnf.ode.solve import Integral, integrate
from cnf.ode.solver import Solver, check_tolerances
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock
from cnf.ode.stepper import EagerStepper

__all__ = ["TorchDiffEq"]

_ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


@dataclass(frozen=True)
class TorchDiffEq:
    """Solve with torchdiffeq, in the place of a `Solver`.

    Args:
        method: a method of torchdiffeq: "dopri8", "dopri5", "bosh3", "fehlberg2",
            "adaptive_heun" (adaptive), "euler", "midpoint", "heun2", "heun3", "rk4",
            "explicit_adams", "implicit_adams" (fixed `steps`).
        rtol: relative tolerance.
        atol: absolute tolerance.
        steps: number of equal steps (fixed methods).
        max_nfe: limit on evaluations of the field in one solve.
        gradient: "backprop" through torchdiffeq's own steps, or "adjoint": its continuous adjoint
            with the seminorm (parameter adjoints out of the error norm; arXiv 2009.09457).
        options: further options of torchdiffeq's solver, as it documents them.
        check_field: refuse a field that is not a function of (t, x), as `Solver` does.

    Raises:
        ValueError: a choice that is not known, or a number out of its range.

    Example:
        >>> import cnf, torch
        >>> flow = cnf.FFJORD(2, solver=TorchDiffEq("adaptive_heun", rtol=1e-4, atol=1e-4))
        >>> flow.log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 20
    max_nfe: int = 5_000
    gradient: Literal["backprop", "adjoint"] = "backprop"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    check_field: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, _ADAPTIVE + _FIXED)
        check_tolerances(self.rtol, self.atol)
        check_count("steps", self.steps)
        check_count("max_nfe", self.max_nfe)
        check_choice("gradient", self.gradient, ("backprop", "adjoint"))
        check_bool("check_field", self.check_field)

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps by the tolerances."""
        return self.method in _ADAPTIVE

    def integrate(
        self,
        f: RightHandSide,
        x: Tensor,
        clock: Clock,
        batch_dims: int,
        controlled: int | None,
        parameters: Sequence[Tensor],
        recorders: Recorders,
    ) -> Integral:
        """The solve; `odeint` calls it."""
        import torchdiffeq  # here, because it imports scipy

        guard = _Guard(f, self, x, batch_dims, recorders)
        if clock.start == clock.end:
            euler = Solver("euler", steps=1)
            stepper = EagerStepper(f, euler.tableau.coefficients, None)
            end = integrate(stepper, x, clock, euler, None)
            guard.finish()
            return end
        adjoint = self.gradient == "adjoint" and torch.is_grad_enabled()
        if adjoint:  # with the check that nothing is undeclared
            _, dq = first_derivative(f, clock, x, parameters)
        else:
            with torch.no_grad():
                _, dq = f(clock.times([clock.start], x)[0], x)
        state = (x,) if dq is None else (x, torch.zeros_like(dq))
        t = torch.tensor([clock.start, clock.end], dtype=torch.float64, device=x.device)
        if clock.t0 is not None and clock.t1 is not None:
            t = torch.stack((clock.t0, clock.t1))
        arguments = {
            "rtol": self.rtol,
            "atol": self.atol,
            "method": self.method,
            "options": self._options(clock, x, batch_dims, controlled),
        }
        try:
            if adjoint:
                ends = torchdiffeq.odeint_adjoint(
                    guard,
                    state,
                    t,
                    **arguments,
                    adjoint_params=tuple(parameters),
                    adjoint_options=self._adjoint_options(clock, x),
                )
            else:
                ends = torchdiffeq.odeint(guard, state, t, **arguments)
        except AssertionError as error:  # how torchdiffeq reports a step that is too small
            raise guard.failure("step_underflow") from error
        guard.finish()
        return Integral(ends[0][-1], None if dq is None else ends[1][-1])

    def _options(
        self, clock: Clock, x: Tensor, batch_dims: int, controlled: int | None
    ) -> dict[str, Any]:
        if self.method in _FIXED:
            return {"step_size": abs(clock.end - clock.start) / self.steps, **self.options}
        norm = _norm(batch_dims, controlled)
        return {"norm": norm, "step_t": _landing(clock.end, x), **self.options}

    def _adjoint_options(self, clock: Clock, x: Tensor) -> dict[str, Any]:
        if self.method in _FIXED:
            return {"step_size": abs(clock.end - clock.start) / self.steps, "norm": "seminorm"}
        return {"norm": "seminorm", "step_t": _landing(clock.start, x)}


def _landing(t: float, x: Tensor) -> Tensor:
    """The time on which the last step must land, as torchdiffeq wants it: (1,) in float64."""
    return torch.tensor([t], dtype=torch.float64, device=x.device)


def _norm(batch_dims: int, controlled: int | None) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of `Tolerance`, of a state that is already in units of the tolerance."""
    unit = Tolerance(0.0, 1.0, batch_dims, controlled)

    def norm(state: tuple[Tensor, ...]) -> Tensor:
        x, *rest = state
        if x.numel() == 0:
            return x.new_zeros(())
        size = unit.per_sample(x, x).max()
        for q in rest:
            q = q[..., :controlled]
            if q.numel():
                size = torch.maximum(size, q.abs().max())
        return size

    return norm


class _Guard:
    """The field as torchdiffeq calls it: finite, counted, and bounded in evaluations."""

    def __init__(
        self,
        f: RightHandSide,
        solver: TorchDiffEq,
        x: Tensor,
        batch_dims: int,
        recorders: Recorders,
    ) -> None:
        self.f = f
        self.solver = solver
        self.start = largest(x)
        self.batch_dims = batch_dims
        self.recorders = recorders
        self.forward_stats = f.stats
        self.done = False
        self.t = 0.0
        self.x = x.new_zeros(0)
        self.slopes: list[Tensor] = []

    def finish(self) -> None:
        """Forward is over: what is evaluated from here on belongs to the backward solve."""
        self.forward_stats.status = "converged"
        self.done = True
        self.x, self.slopes = self.x.new_zeros(0), []

    def failure(self, status: str) -> SolverError:
        """The error to raise, from what was evaluated last."""
        limit = self.solver.max_nfe
        failure = Failure("max_nfe", limit, self.f.stats, self.start, self.batch_dims)
        return failure.error(status, self.t, 0.0, self.x, self.slopes)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.done and self.f.stats is self.forward_stats:
            self._start_backward()
        x = state[0]
        low, high = sorted((self.forward_stats.t0, self.forward_stats.t1))
        t = t.clamp(low, high)  # torchdiffeq's search for a first step looks beyond the span
        with differentiable_attention():  # also in backward, which runs outside of the solve
            dx, dq = self.f(t.to(x), x)
        slopes = [dx] if dq is None else [dx, dq]
        self._check(t, x, [k.detach() for k in slopes])
        return tuple(slopes)

    def _start_backward(self) -> None:
        old = self.forward_stats
        stats = SolveStats("backward", old.method, old.t1, old.t0, status="converged")
        for recorder in self.recorders:
            recorder.append(stats)
        self.f = self.f.counting(stats)

    def _check(self, t: Tensor, x: Tensor, slopes: list[Tensor]) -> None:
        self.t, self.x, self.slopes = float(t.detach()), x.detach(), slopes
        if not all(bool(k.isfinite().all()) for k in slopes):
            raise self.failure("non_finite_field")
        if self.f.stats.nfe >= self.solver.max_nfe:
            raise self.failure("too_many_steps")
