"""The values of a flow, z and log p, against a reference: the same flow, solved tightly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cnf.audit.report import AuditRow, Finding, first_sentence, judge
from cnf.audit.subject import Subject
from cnf.ode import Solver, TorchDiffEq

__all__ = ["Reference", "coupling", "find_reference", "log_det", "round_trip", "trace_noise"]


@dataclass(frozen=True)
class Reference:
    """What numbers are compared with: the same flow, rows and noise."""

    subject: Subject
    z: Tensor  # (B, *event)
    log_p: Tensor  # (B,)
    eps: float  # of the precision in which it was computed

    @cached_property
    def gradient(self) -> list[Tensor]:
        """The gradient of mean log p in `Subject.variables`."""
        return self.subject.gradient()


@torch.no_grad()
def find_reference(
    own: Subject, wanted: Solver | TorchDiffEq | None
) -> tuple[Reference | None, Finding]:
    """The reference in float64, else in the precision of x, else none."""
    notes = []
    for dtype in dict.fromkeys((torch.float64, own.x.dtype)):
        name = str(dtype).removeprefix("torch.")
        try:
            rounds = dtype is torch.float64 and _rounds(_twin(own, dtype, _tight(1e-6)))
            precise = dtype is torch.float64 and not rounds
            solver = wanted or _tight(1e-10 if precise else 1e-6)
            subject = _twin(own, dtype, solver)
            eps = torch.finfo(torch.float64 if precise else torch.float32).eps
            ref = Reference(subject, *subject.solve(), eps)
        except Exception as error:  # a field may raise anything
            notes.append(f"{name} fails: {first_sentence(error)}")
            continue
        if rounds:
            notes.append("a field rounds to float32 within")
        text = f"{name}, {solver.method} at {max(subject.tolerances()):.0e}"
        verdict = f"ok ({'; '.join(notes)})" if notes else "ok"
        return ref, (AuditRow("reference", text, verdict), {"reference": text})
    return None, (AuditRow("reference", "not measured", "; ".join(notes), ok=False), {})


def _tight(tolerance: float) -> Solver:
    # The audit says itself what is wrong with a field.
    return Solver("dopri8", tolerance, tolerance, max_steps=10_000, check_field=False)


def _twin(own: Subject, dtype: torch.dtype, solver: Solver | TorchDiffEq) -> Subject:
    context = None if own.context is None else own.context.to(dtype)
    subject = replace(own, x=own.x.to(dtype, copy=True), context=context, solver=solver)
    subject.flow.to(dtype)
    subject.share_noise(own)
    return subject


def _rounds(subject: Subject) -> bool:
    """Whether a field rounds to float32 within, though all it gets is float64."""
    subject.solve()
    paths = [replay.points for replay in subject.replays if replay.points]
    ends = [(points[0].value(), points[-1].value()) for points in paths]
    return any(torch.equal(b, b.float().double()) and not torch.equal(a, b) for a, b in ends)


def _limit(own: Subject, ref: Reference, like: Tensor) -> float:
    """What the error of numbers of this size may be."""
    rtol, atol = own.tolerances()
    size = _size(like)
    eps = max(ref.eps, torch.finfo(own.x.dtype).eps)
    return max(min(100 * (atol + rtol * size), 0.01 * size), 30 * eps * size)


def _size(values: Tensor) -> float:
    return max(1.0, values.abs().max().item())


@torch.no_grad()
def log_det(own: Subject, ref: Reference) -> Finding:
    """|log p - log p_ref| and |z - z_ref|."""
    z, log_p = own.solve()
    errors = (log_p.to(ref.log_p) - ref.log_p).abs()
    error, rms = errors.max().item(), errors.square().mean().sqrt().item()
    z_error = (z.to(ref.z) - ref.z).abs().max().item()
    text = f"max {error:.1e}, rms {rms:.1e} nats; z {z_error:.1e}"
    row = judge("log-det", text, error, _limit(own, ref, ref.log_p), own.remedy())
    if row.ok:
        row = judge("log-det", text, z_error, _limit(own, ref, ref.z), f"z is off, {own.remedy()}")
    return row, {"log_det_error": error, "log_det_rms": rms, "z_error": z_error}


@torch.no_grad()
def round_trip(own: Subject, ref: Reference) -> Finding:
    """|forward(inverse(x)) - x|."""
    z = own.flow.transform.inverse(own.x, own.context)
    error = (own.flow.transform.forward(z, own.context) - own.x).abs().max().item()
    relative = error / (own.x.square().mean().sqrt().item() or 1.0)
    text, limit = f"max {error:.1e} of x", _limit(own, ref, own.x)
    row = judge("round trip", text, error, limit, own.remedy())
    return row, {"round_trip": error, "round_trip_relative": relative}


@torch.no_grad()
def coupling(own: Subject, ref: Reference) -> Finding:
    """|log p of a row alone - log p of it in the batch|, both of the reference."""
    rows = len(own.x)
    if rows == 1:
        return AuditRow("coupling", "not measured", "ok (it takes two rows)"), {}
    chosen = sorted({0, rows // 2, rows - 1})
    alone = torch.cat([ref.subject.solve(row=row)[1] for row in chosen])
    error = (alone - ref.log_p[chosen]).abs().max().item()
    limit = max(1e4 * max(ref.subject.tolerances()), 1e3 * ref.eps) * _size(ref.log_p)
    remedy = "samples feel one another: look for batch norm, or reductions over the batch"
    text = f"a row alone: {error:.1e} nats"
    return judge("coupling", text, error, limit, remedy), {"coupling": error}


@torch.no_grad()
def trace_noise(own: Subject, ref: Reference) -> Finding:
    """The standard deviation of log p by the estimator's noise, from fresh draws of it."""
    if all(noise is None for replay in own.replays for noise in replay.draws):
        return AuditRow("trace noise", "none"), {"trace_noise": 0.0, "standard_error": 0.0}
    estimates = torch.stack([replace(own).solve()[1] for _ in range(8)])
    spread = estimates.var(0).mean().sqrt().item()
    error = spread / math.sqrt(len(own.x))
    text = f"{spread:.1e} nats a sample, {error:.1e} on the mean"
    remedy = "evaluate with divergence='exact', or more probes or rows"
    row = judge("trace noise", text, error, 0.1, remedy)
    return row, {"trace_noise": spread, "standard_error": error}
