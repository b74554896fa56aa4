"""`CNF`: the flow of an ordinary differential equation as a transform."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnf.checks import compiling, exporting
from cnf.divergence import Divergence, Estimator, as_divergence
from cnf.errors import SolverError
from cnf.fields.base import Field, context_use
from cnf.fields.closed_form import offers
from cnf.ode import Solver, SolveStats, TorchDiffEq, record_solves
from cnf.ode.attention import differentiable_attention
from cnf.ode.diagnosis import exportable
from cnf.ode.inputs import check_finite, clock_of
from cnf.ode.odeint import as_solver, solve
from cnf.transforms.base import Choices, Transform, check_choices
from cnf.transforms.context import check_context, expand_context
from cnf.transforms.dynamics import Dynamics, normal
from cnf.transforms.inputs import check_context_like, check_dtype, check_like
from cnf.transforms.steer import steered
from cnf.transforms.times import Time, as_number, check_end_times, path_times

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cnf.regularizers import Regularizer

__all__ = ["CNF"]


class CNF(Transform):
    """The map of a vector field's flow over a span of time, with its log-determinant.

        dx/dt = f(t, x, context),    d log_det/dt = div f

    `forward` integrates from times[0] (base) to times[1] (data), `inverse` back; both return the
    log-determinant of the map they applied.

    Args:
        field: a module or function f(t, x) or f(t, x, context) -> dx, with t (), x (B, *event),
            context (B, C). A sample's dx must depend on no other sample, and be a differentiable,
            deterministic function of its arguments. A plain function's parameters are not seen by
            the module: use a module.
        divergence: "exact", "hutchinson", or a `Divergence`; None for the exact one where the field
            has a closed form, which costs no more than an estimate, and Hutchinson's elsewhere.
        solver: the choices of the solve; None for `Solver()`.
        event_dims: number of trailing dimensions of a sample; None takes it from the field's
            `event_shape`, or 1 where it has none. (C, H, W) has 3, scalars 0.
        times: (base, data) times, numbers or tensors (): an `nn.Parameter` is learned.

    Shapes:
        z, x (*batch, *event); context (*batch, C) or broadcastable to it; log_det (*batch,).

    Raises:
        SolverError: a solve that cannot end, with its cause.
        TypeError: x of another dtype than float32, float64 or than the parameters' own.
        ValueError: x not finite, of a wrong shape or device; context missing or not expected.

    Reference: Chen et al., arXiv 1806.07366; Grathwohl et al., arXiv 1810.01367.

    Example:
        >>> f = CNF(lambda t, x: -x, divergence="exact")
        >>> x, log_det = f.forward_and_log_det(torch.ones(1, 2))
        >>> [round(v, 4) for v in (*x[0].tolist(), log_det.item())]
        [0.3679, 0.3679, -2.0]
    """

    event_dims: int

    def __init__(
        self,
        field: Field,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        *,
        event_dims: int | None = None,
        times: tuple[Time, Time] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.context_use = context_use(field)
        self.field = field
        if divergence is None:
            divergence = "exact" if offers(field, "closed_form") else "hutchinson"
        self.divergence = as_divergence(divergence)
        self.solver = as_solver(solver)
        shape = getattr(field, "event_shape", None)
        if event_dims is None:
            event_dims = 1 if shape is None else len(shape)
        elif isinstance(event_dims, bool) or not isinstance(event_dims, int) or event_dims < 0:
            raise ValueError(f"event_dims={event_dims!r} must be a number of dimensions, 0 or more")
        self.event_dims = event_dims
        self.event_shape = self.base_shape = None if shape is None else tuple(shape)
        self.base_time, self.data_time = check_end_times(times)

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether the field is a function of context, and was built with some where it says so."""
        return self.context_use != "none" and getattr(self.field, "context", 1) != 0

    @property
    def times(self) -> tuple[Time, Time]:
        """The (base, data) times."""
        return self.base_time, self.data_time

    def extra_repr(self) -> str:
        """The choices, for `print`."""
        times = tuple(as_number(t) for t in self.times)
        return f"divergence={self.divergence}, solver={self.solver}, times={times}"

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x at the data time and log |det dx/dz|."""
        return self._solve(z, context, self.times, choices, log_det=True)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z at the base time and log |det dz/dx|."""
        return self._solve(x, context, self.times[::-1], choices, log_det=True)

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x at the data time; the divergence is not computed."""
        return self._solve(z, context, self.times, choices, log_det=False)[0]

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z at the base time; the divergence is not computed."""
        return self._solve(x, context, self.times[::-1], choices, log_det=False)[0]

    def trajectory(
        self,
        z: Tensor,
        times: Iterable[float] | Tensor,
        context: Tensor | None = None,
        **choices: Unpack[Choices],
    ) -> Tensor:
        """The states of the path from z at given times, each as accurate as the end of a solve.

        x(t_i) = z + int_{t_base}^{t_i} f(t, x) dt

        The solver lands on every time, so many of them cost steps.

        Args:
            z: states at the base time (*batch, *event).
            times: strictly monotone, from the base time towards the data time (T,); no gradient
                is taken in them.
            context: (*batch, C), or broadcastable to it.
            choices: solver=, for this call.

        Returns:
            x (T, *batch, *event), differentiable in z, context and parameters.

        Raises:
            SolverError: a solve that cannot end.
            ValueError: times that are not finite, beyond the span, or not in order.

        Example:
            >>> path = CNF(lambda t, x: -x).trajectory(torch.ones(1, 1), [0, 0.5, 1])
            >>> [round(x, 3) for x in path.flatten().tolist()]
            [1.0, 0.607, 0.368]
        """
        start, end = (as_number(t) for t in self.times)
        ts = path_times(times, start, end)
        solver, x, t = as_solver(choices.get("solver", self.solver)), z, self.base_time
        states: list[Tensor] = []
        for t_next in ts:
            if t_next != as_number(t) or not states:
                fraction = (t_next - as_number(t)) / ((end - start) or 1.0)
                choices["solver"] = _part_of(solver, fraction)
                with record_solves() as solves:
                    x, _ = self._solve(x, context, (t, t_next), choices, log_det=False)
                solver = _continued(solver, solves[0])
            states.append(x)
            t = t_next
        return torch.stack(states) if states else z.new_empty((0, *z.shape))

    def _solve(
        self,
        x: Tensor,
        context: Tensor | None,
        times: tuple[Time, Time],
        choices: Choices,
        *,
        log_det: bool,
    ) -> tuple[Tensor, Tensor]:
        if compiling():  # the steps are no part of a graph: see Solver(compile=True)
            from cnf.ode import uncompiled

            return uncompiled.run(self._solve, x, context, times, choices, log_det=log_det)
        check_choices(choices)
        if choices.get("steer"):
            times = steered(times, choices["steer"], choices.get("generator"))
            choices = {**choices, "steer": 0.0}
        if torch.is_inference_mode_enabled():
            # A divergence needs autograd, which inference mode forbids.
            with torch.inference_mode(False), torch.no_grad():
                return self._solve(x, context, times, choices, log_det=log_det)
        x, context = normal(x), None if context is None else normal(context)
        self._check_state(x, finite=not self.gives_up(choices))
        batch_dims = x.ndim - self.event_dims
        batch, event = x.shape[:batch_dims], x.shape[batch_dims:]
        context = self._batch_context(context, batch, x)
        flat = x.reshape(math.prod(batch), *event)  # (*batch, *event) -> (B, *event)
        end, found = self._integrate(flat, context, times, choices, log_det=log_det)
        n = len(_regularizers(choices)) if log_det else 0
        if n:
            integrals = found[:, -n:].reshape(*batch, n)
            backwards = as_number(times[1]) < as_number(times[0])
            choices["integrals"].append(-integrals if backwards else integrals)  # over |dt|
        by_probe = found[:, 1 : found.shape[1] - n]
        if "variances" in choices and by_probe.shape[1]:
            choices["variances"].append((by_probe.var(1) / by_probe.shape[1]).reshape(batch))
        return end.reshape(x.shape), found[:, 0].reshape(batch)

    def _integrate(
        self,
        x: Tensor,
        context: Tensor | None,
        times: tuple[Time, Time],
        choices: Choices,
        *,
        log_det: bool,
    ) -> tuple[Tensor, Tensor]:
        """x (B, *event) carried through times, and its log-determinant, zero if not asked.

        (B, 1); or (B, 1 + k + n), behind it those of each probe, where variances are asked for, and
        the integrals of the regularisers.
        """
        divergence = as_divergence(choices.get("divergence", self.divergence))
        solver = as_solver(choices.get("solver", self.solver))
        if exporting():
            solver = exportable(solver, times)
        generator = choices.get("generator")
        noise = divergence.sample_noise(x, generator) if log_det else None
        each = log_det and "variances" in choices and _in_probes(divergence, noise)
        regularizers = _regularizers(choices) if log_det else ()
        dynamics = Dynamics(
            self.field, divergence if log_det else None, each=each, regularizers=regularizers
        )
        probe = dynamics.sample_probe(x, generator)
        # Through torchdiffeq's adjoint the gradient of constants would be counted twice.
        constants = [] if isinstance(solver, TorchDiffEq) else dynamics.constants(x, noise)
        of_samples, shared = ([], constants) if noise is None else (constants, [])
        differentiates = log_det or torch.is_grad_enabled()
        try:
            with differentiable_attention() if differentiates else nullcontext():
                solution = solve(
                    dynamics,
                    x,
                    clock_of(*times, x),
                    solver,
                    args=(context, noise, probe, *of_samples),
                    shared=shared,
                    batch_dims=1,
                    controlled=1,
                    parameters=self.field.parameters() if isinstance(self.field, nn.Module) else (),
                )
        except SolverError as error:
            raise self._explained(error) from error.__cause__
        found = solution.quadratures
        return solution.x, x.new_zeros(x.shape[0], 1) if found is None else found

    def gives_up(self, choices: Choices) -> bool:
        """Whether failing samples become NaN: a solve before this one may have left some."""
        solver = as_solver(choices.get("solver", self.solver))
        return isinstance(solver, Solver) and solver.on_failure == "nan"

    def _batch_context(self, context: Tensor | None, batch: torch.Size, x: Tensor) -> Tensor | None:
        """Context broadcast against the batch and flattened: (..., C) -> (B, C)."""
        if context is None:
            if self.context_use == "required":
                raise ValueError(
                    "context is missing: the field is a function of (t, x, context); "
                    "pass context of shape (*batch, C)"
                )
            return None
        check_context(context)
        if self.context_use == "none":
            raise ValueError(
                f"context of shape {tuple(context.shape)} was given, but the field is a function "
                "of (t, x) alone; leave context out or use a field f(t, x, context)"
            )
        check_context_like(context, x)
        check_finite(context, context.ndim - 1, "context")
        rows = expand_context(context, batch).reshape(math.prod(batch), context.shape[-1])
        return rows.clone()  # the caller may reuse its memory before backward, or the field write

    def _check_state(self, x: Tensor, *, finite: bool = True) -> None:
        check_dtype(x, self.field if isinstance(self.field, nn.Module) else self)
        if x.ndim < self.event_dims:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (*batch, *event) with {self.event_dims} "
                "event dimensions"
            )
        if 0 in x.shape[x.ndim - self.event_dims :]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, whose samples have no numbers; features must be 1 "
                "or more"
            )
        if isinstance(self.field, nn.Module):
            check_like(x, self.field)
        if finite:
            check_finite(x, x.ndim - self.event_dims)

    def _explained(self, error: SolverError) -> SolverError:
        """The error, with the name of the first parameter that is not finite."""
        for name, parameter in self.named_parameters():
            if error.status == "non_finite_field" and not parameter.isfinite().all():
                return error.explained(f"The parameter {name} is not finite.")
        return error


def _regularizers(choices: Choices) -> tuple[Regularizer, ...]:
    """What is to be integrated, where somebody takes the integrals."""
    return choices.get("regularizers", ()) if "integrals" in choices else ()


def _in_probes(divergence: Divergence, noise: Tensor | None) -> bool:
    """Whether there is a standard error to be had, and not none because all is exact.

    Raises:
        ValueError: it is estimated, but the estimates tell no standard error.
    """
    if noise is None:
        return False
    if not isinstance(divergence, Estimator):
        raise ValueError(
            f"return_stderr=True needs a divergence that is exact or an Estimator, got "
            f"{type(divergence).__name__}; use cnf.Hutchinson(probes=16)"
        )
    divergence.check_standard_error()
    return True


def _part_of(solver: Solver | TorchDiffEq, fraction: float) -> Solver | TorchDiffEq:
    """The solver for a fraction of the span: as many fixed steps as belong to it."""
    steps = max(1, math.ceil(solver.steps * fraction - 1e-9))
    return dataclasses.replace(solver, steps=steps)


def _continued(solver: Solver | TorchDiffEq, stats: SolveStats) -> Solver | TorchDiffEq:
    """The solver for what follows: it begins with the step at which the solve before ended."""
    if isinstance(solver, TorchDiffEq) or not stats.next_step:
        return solver
    return dataclasses.replace(solver, first_step=stats.next_step)
