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

from cnf.ode.control import Tolerance
from cnf.ode.failure import Failure
from cnf.ode.rhs import RightHandSide
from cnf.ode.solve import Integral
from cnf.ode.solver import Solver, check_choice, check_count, check_tolerances
from cnf.ode.stats import Recorders, SolveStats
from cnf.ode.step import Clock

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
    max_nfe: int = 10_000
    gradient: Literal["backprop", "adjoint"] = "backprop"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("method", self.method, _ADAPTIVE + _FIXED)
        check_tolerances(self.rtol, self.atol)
        check_count("steps", self.steps)
        check_count("max_nfe", self.max_nfe)
        check_choice("gradient", self.gradient, ("backprop", "adjoint"))

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

        guard = _Guard(f, self, batch_dims, recorders)
        with torch.no_grad():
            _, dq = f(clock.times([clock.start], x)[0], x)
        state = (x,) if dq is None else (x, torch.zeros_like(dq))
        if clock.start == clock.end:
            guard.finish()
            return Integral(x, None if dq is None else torch.zeros_like(dq))
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
            if self.gradient == "adjoint" and torch.is_grad_enabled():
                ends = torchdiffeq.odeint_adjoint(
                    guard,
                    state,
                    t,
                    **arguments,
                    adjoint_params=tuple(parameters),
                    adjoint_options=self._adjoint_options(clock),
                )
            else:
                ends = torchdiffeq.odeint(guard, state, t, **arguments)
        except AssertionError as error:  # how torchdiffeq reports a step that is too small
            raise guard.failure(clock, x).error(
                "step_underflow", guard.t, 0.0, guard.x, guard.slopes
            ) from error
        guard.finish()
        return Integral(ends[0][-1], None if dq is None else ends[1][-1])

    def _options(
        self, clock: Clock, x: Tensor, batch_dims: int, controlled: int | None
    ) -> dict[str, Any]:
        if self.method in _FIXED:
            return {"step_size": abs(clock.end - clock.start) / self.steps, **self.options}
        norm = _norm(batch_dims, controlled)
        landing = torch.tensor([clock.end], dtype=torch.float64, device=x.device)
        return {"norm": norm, "step_t": landing, **self.options}

    def _adjoint_options(self, clock: Clock) -> dict[str, Any]:
        if self.method in _FIXED:
            return {"step_size": abs(clock.end - clock.start) / self.steps, "norm": "seminorm"}
        return {"norm": "seminorm"}


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
        self, f: RightHandSide, solver: TorchDiffEq, batch_dims: int, recorders: Recorders
    ) -> None:
        self.f = f
        self.solver = solver
        self.batch_dims = batch_dims
        self.recorders = recorders
        self.forward_stats = f.stats
        self.done = False
        self.t = 0.0
        self.x = torch.zeros(0)
        self.slopes: list[Tensor] = []

    def finish(self) -> None:
        """Forward is over: what is evaluated from here on belongs to the backward solve."""
        self.forward_stats.status = "converged"
        self.done = True
        self.x, self.slopes = torch.zeros(0), []

    def failure(self, clock: Clock, x: Tensor) -> Failure:
        start = x.detach().abs().max().item() if x.numel() else 0.0
        return Failure(Solver(), self.f.stats, start, self.batch_dims)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.done and self.f.stats is self.forward_stats:
            self._start_backward()
        x = state[0]
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
        clock = Clock(self.f.stats.t0, self.f.stats.t1)
        if not all(bool(k.isfinite().all()) for k in slopes):
            raise self.failure(clock, x).error("non_finite_field", self.t, 0.0, self.x, slopes)
        if self.f.stats.nfe >= self.solver.max_nfe:
            raise self.failure(clock, x).error("too_many_steps", self.t, 0.0, self.x, slopes)
