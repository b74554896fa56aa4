"""`odeint`: solve an ODE over a state and quadratures, with the gradient that the solver names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnf.checks import compiling
from cnf.errors import SolverError
from cnf.functional import batched
from cnf.ode.adjoint import AdjointSolve
from cnf.ode.compiled import CompiledStepper
from cnf.ode.control import Tolerance
from cnf.ode.diagnosis import check_modules, check_precision, refuse_randomness
from cnf.ode.gradient import first_derivative, first_order
from cnf.ode.independent import block_rows, integrate_independently
from cnf.ode.inputs import check_state, clock_of
from cnf.ode.recompute import Recomputing
from cnf.ode.rhs import Function, RightHandSide
from cnf.ode.solve import Integral, integrate, tolerance_of
from cnf.ode.solver import Solver
from cnf.ode.stats import Recorders, SolveStats, active_recorders
from cnf.ode.step import Clock
from cnf.ode.stepper import EagerStepper, Stepper
from cnf.ode.torchdiffeq import TorchDiffEq
from cnf.ode.transformed import transformable

__all__ = ["Solution", "as_solver", "odeint", "solve"]

_RETRIES = 5  # solves of what is left after failures, before each sample is solved by itself


@dataclass(frozen=True)
class Solution:
    """The end of a solve.

    Attributes:
        x: the state at t1 (*batch, *event).
        quadratures: the integrals (*batch, n), or None if the function gave no integrands.
        stats: what the solve did.
    """

    x: Tensor
    quadratures: Tensor | None
    stats: SolveStats


def odeint(
    f: Function,
    x: Tensor,
    t0: float | Tensor,
    t1: float | Tensor,
    solver: Solver | TorchDiffEq | None = None,
    *,
    args: Sequence[Tensor | None] = (),
    batch_dims: int = 1,
    controlled: int | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> Solution:
    """Solve dx/dt = f(t, x) from t0 to t1, and integrate quadratures along the path.

        x(t1) = x(t0) + int f(t, x) dt,    q = int g(t, x) dt

    Args:
        f: function or module (t, x, *args) -> dx, or (dx, dq) with the integrands dq (*batch, n)
            of quantities that do not feed back into the state.
        x: state at t0 (*batch, *event), float32 or float64.
        t0: start time, a number or a tensor ().
        t1: end time; may lie before t0.
        solver: the choices; None for `Solver()`.
        args: tensors that belong to the samples (*batch, ...), or None; f gets them after x.
        batch_dims: leading dimensions of x that index samples.
        controlled: how many quadratures, from the first, are in the error norm; None for all.
        parameters: tensors that f depends on, which "checkpoint" and "adjoint" need to know;
            None for the parameters of f where it is a module.

    Raises:
        SolverError: if the solve cannot end; it tells the cause.
        TypeError: x is not a float32 or float64 tensor, or f returns something else.
        ValueError: x or a time is not finite, the span is below the resolution of the dtype, or f
            is not a function of (t, x) alone.

    Example:
        >>> solution = odeint(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        >>> round(solution.x.item(), 4), solution.stats.status
        (0.3679, 'converged')
    """
    if compiling():
        from cnf.ode import uncompiled

        return uncompiled.run(
            odeint,
            f,
            x,
            t0,
            t1,
            solver,
            args=args,
            batch_dims=batch_dims,
            controlled=controlled,
            parameters=parameters,
        )
    solver = as_solver(solver)
    check_state(x, batch_dims)
    if parameters is None:
        parameters = f.parameters() if isinstance(f, nn.Module) else ()
    # As with x: what f writes must not reach the caller's tensors, where autograd allows it at all.
    own = [v if v is None or v.requires_grad else v.clone() for v in args]
    return solve(
        f,
        x,
        clock_of(t0, t1, x),
        solver,
        args=own,
        batch_dims=batch_dims,
        controlled=controlled,
        parameters=parameters,
    )


def solve(
    f: Function,
    x: Tensor,
    clock: Clock,
    solver: Solver | TorchDiffEq,
    *,
    args: Sequence[Tensor | None],
    shared: Sequence[Tensor] = (),
    batch_dims: int,
    controlled: int | None,
    parameters: Iterable[Tensor],
) -> Solution:
    """`odeint` of a state and a clock that are known to be right.

    f gets the tensors `shared` after the args: they belong to no sample, and may be computed from
    the parameters.
    """
    parameters = list(parameters)
    mapped = torch._C._are_functorch_transforms_active() and any(
        v is not None and batched(v) for v in (x, *args, *shared, *parameters)
    )
    solver = transformable(solver, mapped=mapped)
    stats = SolveStats("forward", solver.method, clock.start, clock.end)
    recorders = active_recorders()
    for recorder in recorders:
        recorder.append(stats)
    rhs = RightHandSide(f, batch_dims, stats, args=args, shared=shared)
    x = x.clone()  # a field that writes into its argument must not reach the caller's tensor
    check_precision(solver, x)
    if solver.check_field:
        check_modules(f)
        rhs.watch = refuse_randomness
    known = list({id(p): p for p in parameters if p.requires_grad}.values())
    if isinstance(solver, TorchDiffEq):
        known += rhs.trainable
        end = solver.integrate(rhs, x, clock, batch_dims, controlled, known, recorders)
        return Solution(end.x, end.q, stats)
    if batch_dims != 1 and (solver.batch, solver.on_failure) != ("shared", "raise"):
        raise ValueError(
            f"batch={solver.batch!r} with on_failure={solver.on_failure!r} needs x of shape "
            f"(batch, *event), batch_dims=1; got batch_dims={batch_dims}; flatten the batch"
        )
    problem = _Problem(rhs, clock, solver, controlled, known, recorders)
    alone = solver.on_failure == "nan" and not mapped
    end = problem.survivors(x) if alone else problem.run(x)
    return Solution(end.x, end.q, stats)


@dataclass(frozen=True)
class _Problem:
    """What is to be solved, for any of its samples.

    Attributes:
        f: right-hand side.
        clock: the span.
        solver: the choices.
        controlled: number of quadratures in the error norm, None for all.
        parameters: tensors that require grad, other than the arguments that belong to samples.
        recorders: whom a backward solve tells its statistics.
    """

    f: RightHandSide
    clock: Clock
    solver: Solver
    controlled: int | None
    parameters: list[Tensor]
    recorders: Recorders

    def rows(self, index: Tensor) -> _Problem:
        """The same for some of the samples."""
        return dataclasses.replace(self, f=self.f.rows(index))

    def choosing(self, **choices: Any) -> _Problem:
        """The same with other choices of the solver."""
        return dataclasses.replace(self, solver=dataclasses.replace(self.solver, **choices))

    def run(self, x: Tensor) -> Integral:
        """The solve from x."""
        if self.solver.batch == "shared" or len(x) == 0:
            return self._differentiated(x)
        rows = block_rows(len(x), x.device)
        end = self.rows(rows)._differentiated(x[rows], samples=len(x))
        return _first(end, len(x))

    def survivors(self, x: Tensor) -> Integral:
        """The solve from x, NaN for the samples that fail, the others as if without them.

        Those that are NaN have failed already, in a solve before this one.
        """
        alive = x.isfinite().unsqueeze(-1).flatten(1).all(-1).nonzero().squeeze(-1)
        problem = self.choosing(on_failure="raise")
        for _ in range(_RETRIES if self.solver.batch == "shared" else 0):
            try:
                return self._spread(problem.rows(alive).run(x[alive]), alive, len(x))
            except SolverError as error:
                alive = _without(alive, error.samples)
        with torch.no_grad():  # which samples fail by themselves?
            end = self.rows(alive).choosing(batch="independent").run(x[alive])
        good = ~end.x.isnan().flatten(1).any(-1)
        alive = alive[good]
        if torch.is_grad_enabled():
            end = problem.rows(alive).choosing(batch="independent").run(x[alive])
        else:
            end = Integral(end.x[good], None if end.q is None else end.q[good])
        return self._spread(end, alive, len(x))

    def _spread(self, end: Integral, alive: Tensor, n: int) -> Integral:
        """The ends of the samples alive among n, NaN for the others."""
        failed = n - len(alive)
        if failed == 0:
            return end
        self.f.stats.status, self.f.stats.failed = "partly_failed", failed

        def among(value: Tensor) -> Tensor:
            return value.new_full((n, *value.shape[1:]), torch.nan).index_copy(0, alive, value)

        return Integral(among(end.x), None if end.q is None else among(end.q))

    def _differentiated(self, x: Tensor, samples: int | None = None) -> Integral:
        """The solve of all rows, with the gradient that the solver names."""
        gradient = self.solver.gradient if torch.is_grad_enabled() else "backprop"
        if self.clock.start == self.clock.end:
            gradient = "backprop"  # a single step of size zero
        # Backward evaluates f again: with leaves, so that it stops there and does not go on to the
        # parameters from which an input was computed.
        f = self.f if gradient == "backprop" else self.f.detached()
        stepper, tolerance = self._stepper(f, x)
        variables = [*self.parameters, *f.trainable]
        first = None if gradient == "backprop" else first_derivative(f, self.clock, x, variables)
        clock = self.clock if gradient == "backprop" else self.clock.values
        if gradient == "checkpoint":
            check = self.solver.check_field
            stepper = Recomputing(stepper, self.f, self.parameters, self.recorders, check=check)
            clock = self.clock

        def run(x: Tensor) -> Integral:
            if tolerance is None or samples is None:
                return integrate(stepper, x, clock, self.solver, tolerance, first)
            # The derivative at one time for all may differ in the last bit: taken anew.
            return integrate_independently(stepper, x, clock, self.solver, tolerance, samples)

        if gradient == "adjoint":
            given = [*self.parameters, *self.f.trainable]
            solve = AdjointSolve(
                stepper, variables, self.clock, self.solver, run, self.recorders, first
            )
            return solve(x, given)
        end = run(x)
        if gradient == "checkpoint":
            return Integral(end.x.clone(), end.q)  # backward needs its own, whatever is done to it
        if gradient == "backprop" and self.solver.compile and end.x.requires_grad:
            return Integral(*first_order("compile=True", end.x, end.q))
        return end

    def _stepper(self, f: RightHandSide, x: Tensor) -> tuple[Stepper, Tolerance | None]:
        """How steps are computed, and the error norm; a span of zero is one fixed step."""
        solver, method = self.solver, self.solver.tableau.coefficients
        tolerance = tolerance_of(solver, x, f.batch_dims, self.controlled)
        if self.clock.start == self.clock.end:
            tolerance = None
        if not solver.compile:
            return EagerStepper(f, method, tolerance), tolerance
        tensors = [x, *self.parameters, *f.inputs, self.clock.t0, self.clock.t1]
        trainable = any(v is not None and v.requires_grad for v in tensors)
        stepper = CompiledStepper(f, method, solver.method, tolerance, x, trainable=trainable)
        return stepper, tolerance


def _first(end: Integral, n: int) -> Integral:
    return Integral(end.x[:n], None if end.q is None else end.q[:n])


def _without(alive: Tensor, failed: Sequence[int]) -> Tensor:
    """The samples alive, without those of some positions."""
    keep = torch.ones_like(alive, dtype=torch.bool)
    keep[list(failed)] = False
    return alive[keep]


def as_solver(solver: Solver | TorchDiffEq | None) -> Solver | TorchDiffEq:
    """The solver, or the default one for None.

    Raises:
        TypeError: anything else.
    """
    if solver is None:
        return Solver()
    if not isinstance(solver, (Solver, TorchDiffEq)):
        hint = f"; use cnf.Solver({solver!r})" if isinstance(solver, str) else ""
        raise TypeError(
            f"solver must be a cnf.Solver or cnf.TorchDiffEq, got {type(solver).__name__}{hint}"
        )
    return solver
