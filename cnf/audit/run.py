"""`check`: the measurements in their order, from a flow to its `Audit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cnf.audit import derivatives, measure
from cnf.audit.report import Audit, AuditRow, Finding, first_sentence
from cnf.audit.subject import Subject
from cnf.checks import check_choice
from cnf.divergence import Divergence
from cnf.errors import SolverError
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq, record_solves
from cnf.ode.odeint import as_solver
from cnf.singular import singularities
from cnf.transforms import CNF
from cnf.truncation import dequantized

__all__ = ["check"]

_GRADIENTS = ("backprop", "checkpoint", "adjoint")

Measurement = Callable[[Subject, measure.Reference], Finding]

_VALUES: dict[str, Measurement] = {
    "divergence": derivatives.divergence,
    "log-det": measure.log_det,
    "round trip": measure.round_trip,
    "coupling": measure.coupling,
    "trace noise": measure.trace_noise,
}


def check(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    divergence: str | Divergence | None = None,
    solver: Solver | TorchDiffEq | None = None,
    generator: torch.Generator | None = None,
    gradients: Sequence[str] = _GRADIENTS,
    reference: Solver | TorchDiffEq | None = None,
    verbose: bool = True,
) -> Audit:
    """Measure what log_prob, samples and gradients of a flow are worth on a batch of data.

        error = value(flow as it is) - value(reference: float64, dopri8 at rtol = atol = 1e-10)

    It audits solves: the formulas of discrete layers are taken as they are. Value and reference see
    the same noise; what the noise itself does has a row of its own. Where a field does not compute
    in float64, the reference is less tight (1e-6), if need be in x's dtype, and its row says so.
    Work is done on copies: the flow, its gradients and torch's random state stay as they are. It
    costs some hundred solves: use a batch of 16 to 256. Of a flow of integers it audits the flow of
    real numbers within, on one draw of the noise.

    A row is not ok where its error exceeds a limit, with L = max(1, the largest |log p|, |z| or
    |x|), eps that of the precision, and fixed steps held to rtol = atol = 1e-5:

    - data, where it is there: they have no density, such as points on a line;
    - determinism: 0 between two evaluations of a field (else the rest is not measured);
    - divergence: eps^(1/3) max(1, |div|), in all directions up to 64 dimensions, then in some;
    - log-det (with z), round trip: 100 (atol + rtol L), but at most 0.01 L, at least 30 eps L;
    - coupling: 10^4 tolerances of the reference, times L;
    - trace noise: 0.1 nats, of the standard error of the mean log-likelihood;
    - gradient check: 10 eps^(1/4), of the reference against central differences;
    - a gradient: 100 max(rtol, atol), but at most 0.01, at least 0.001, relative; a mode that
      cannot be used counts only where it is the flow's own.

    Args:
        flow: the flow, trained or not.
        x: data (*batch, *event), at least one row.
        context: conditions (*batch, C), or broadcastable to it.
        divergence: "exact", "hutchinson" or a `Divergence` to audit; None for the flow's own.
        solver: the solver to audit; None for the flow's own.
        generator: source of the estimator's noise; None for torch's global one (put back after).
        gradients: the gradient modes to audit.
        reference: the reference's solver; None for the above.
        verbose: print the report.

    Returns:
        An `Audit`: the numbers, `rows` with verdicts, and `ok`.

    Raises:
        SolverError: the flow's own solve cannot end (unless its field is found to be random).
        RuntimeError: torch cannot copy the flow.
        TypeError: flow is no `Flow`, or x is of a wrong dtype.
        ValueError: no rows in x, a flow without a `CNF`, an unknown gradient mode; and what
            `log_prob` raises for x, context, and modules that `Solver.check_field` refuses.

    Example:
        >>> import cnf
        >>> flow = cnf.FFJORD(2, hidden=(8,), divergence="exact")
        >>> audit = cnf.check(flow, torch.randn(16, 2), gradients=["backprop"], verbose=False)
        >>> audit.ok, audit.log_det_error < 1e-3, audit.gradients["backprop"].error < 1e-3
        (True, True, True)
    """
    _check_arguments(flow, x)
    for mode in gradients:
        check_choice("gradients", mode, _GRADIENTS)
    wanted = None if reference is None else as_solver(reference)
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        inner, y = dequantized(flow, x, context, generator)
        _check_continuous(inner)
        source = torch.default_generator if generator is None else generator
        own = Subject(inner, y, context, divergence, solver, source)
        audit = _audit(own, gradients, wanted)
        data = _data(x.reshape(-1, *flow.event_shape), flow.transform.levels)
        audit = replace(audit, rows=(*data, *audit.rows))
    if verbose:
        print(audit)  # noqa: T201
    return audit


def _check_arguments(flow: Flow, x: Tensor) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be a cnf.Flow, got {type(flow).__name__}; unwrap it, as in model.module"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, nothing to audit; pass one row or more")


def _check_continuous(flow: Flow) -> None:
    if not any(isinstance(module, CNF) for module in flow.modules()):
        raise ValueError(
            "the flow has no CNF (that of a dequantization does not count), so no solve to audit; "
            "the formulas of discrete layers are not checked here: compare their log-determinants "
            "with torch.func.jacrev"
        )


def _data(x: Tensor, levels: int | tuple[int | None, ...] | None) -> list[AuditRow]:
    """Why the data have no density: rows of the audit that there are only for such data."""
    reasons = [reason.partition(": ") for reason in singularities(x, levels)]
    return [
        AuditRow("data", what, f"the likelihood is unbounded: {remedy}", ok=False)
        for what, _, remedy in reasons
    ]


def _audit(own: Subject, modes: Sequence[str], wanted: Solver | TorchDiffEq | None) -> Audit:
    findings = _first_solve(own)
    if findings[0][0].ok:
        own.flatten()
        ref, finding = measure.find_reference(own, wanted)
        measurements = dict(_VALUES)
        if modes:
            measurements["gradient check"] = derivatives.gradient_check
        measurements |= {mode: partial(derivatives.gradient_mode, mode=mode) for mode in modes}
        findings += [finding, *(_tried(name, m, own, ref) for name, m in measurements.items())]
    numbers = {key: number for _, part in findings for key, number in part.items()}
    gradients = {mode: numbers.pop(mode) for mode in modes if mode in numbers}
    return Audit(tuple(row for row, _ in findings), gradients=gradients, **numbers)


@torch.no_grad()
def _first_solve(own: Subject) -> list[Finding]:
    """Let the flow judge x, draw the noise, count the work; and whether its fields repeat."""
    failure = None
    with record_solves() as solves:
        try:
            own.flow.log_prob(own.x, own.context, generator=own.generator)
        except (SolverError, ValueError) as error:  # either may be what a random field does
            failure = error
    asked = [replay.points[0] for replay in own.replays if replay.points]
    repeats = all(torch.equal(point.value(), point.value()) for point in asked)
    if not repeats:
        remedy = "a field is random: call flow.eval(), or take noise and dropout out of it"
        row = AuditRow("determinism", "two evaluations differ", remedy, ok=False)
        return [(row, {"deterministic": False})]
    if failure is not None:
        raise failure
    work = {key: sum(getattr(s, key) for s in solves) for key in ("nfe", "accepted", "rejected")}
    text = "NFE {nfe}, {accepted} steps, {rejected} refused".format(**work)
    row = AuditRow("determinism", "fields repeat bit for bit")
    return [(row, {"deterministic": True}), (AuditRow("solve", text), work)]


def _tried(
    name: str, measurement: Measurement, own: Subject, ref: measure.Reference | None
) -> Finding:
    if ref is None:
        return AuditRow(name, "not measured", "it takes a reference", ok=False), {}
    try:
        return measurement(own, ref)
    except Exception as error:  # a field may raise anything; the other rows still hold
        return AuditRow(name, "not measured", first_sentence(error), ok=False), {}
