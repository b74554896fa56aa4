"""The derivatives of a flow: of its fields and its reference by differences, then of each mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from timeit import repeat

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cnf.audit.measure import Reference
from cnf.audit.report import AuditRow, Finding, GradientAudit, first_sentence, judge
from cnf.audit.subject import Point, Subject
from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.fields.closed_form import offers
from cnf.memory import peak_memory
from cnf.ode import record_solves

__all__ = ["divergence", "gradient_check", "gradient_mode"]

_EXACT_DIMS = 64  # up to here every direction is differenced
_HIDDEN = "is hidden from autograd: look for detach, no_grad, .data or numpy"


@torch.no_grad()
def divergence(own: Subject, ref: Reference) -> Finding:
    """|div - its central differences| at the start, the middle and the end of the path."""
    errors, sizes, h = [], [1.0], ref.eps ** (1 / 3)
    other_field = 0.0  # |dx of the closed form - dx|
    closed = any(offers(part.field, "closed_form") for part in own.cnfs)
    for replay in ref.subject.replays:
        points = replay.points
        for i in sorted({0, len(points) // 2, len(points) - 1}) if points else ():
            for estimate, noise in _divergences(replay.inner, points[i]):
                dx, div = estimate(*points[i]._replace(noise=noise))
                gap = (dx - points[i].value()).abs().max() / dx.abs().max().clamp(min=1)
                other_field = max(other_field, gap.item())
                truth = _differences(points[i], noise, h)
                errors.append((div - truth).abs().max())
                sizes.append(truth.abs().max().item())
    error = torch.stack(errors).max().item()  # NaN where one is
    remedy = f"{'with_divergence is wrong, or ' if closed else ''}a derivative in x {_HIDDEN}"
    text, limit = f"{error:.1e} from differences", h * max(sizes)
    row = judge("divergence", text, error, limit, remedy)
    if not other_field < h:
        wrong = f"with_divergence gives another dx than the field, off by {other_field:.1e}"
        row = AuditRow("divergence", text, wrong, ok=False)
    return row, {"divergence_error": error}


def _divergences(inner: Divergence, point: Point) -> Iterator[tuple[Divergence, Tensor | None]]:
    """What to compare with differences: along its noise, or for None along all directions."""
    estimates = isinstance(inner, Hutchinson)
    cheap = point.x[0].numel() <= _EXACT_DIMS or offers(point.field, "closed_form")
    if cheap or not isinstance(inner, (Exact, Hutchinson)):
        yield inner if point.noise is None else Exact(), None
    elif not estimates:
        probes = Hutchinson(probes=4)
        yield probes, probes.sample_noise(point.x)
    if estimates:
        yield inner, point.noise


def _differences(point: Point, noise: Tensor | None, h: float) -> Tensor:
    """The divergence (B,) by central differences of steps h times the size of a sample.

    mean_v v^T (f(x + h v) - f(x - h v)) / 2 h over the noise, or the sum over all unit vectors.
    """
    x, rows = point.x, len(point.x)
    flat = x.reshape(rows, -1)
    typical = flat.square().mean().sqrt()
    step = h * flat.abs().amax(1).clamp(min=typical if typical > 0 else 1.0)  # (B,)
    basis = x.new_ones(flat.shape[1]).diag().reshape(-1, 1, *x.shape[1:])  # (D, 1, *event)
    directions = basis if noise is None else noise.movedim(1, 0)  # (k, B, *event)
    total = torch.zeros_like(step)
    for v in directions:
        hv = step.reshape(-1, *[1] * (x.ndim - 1)) * v
        change = point._replace(x=x + hv).value() - point._replace(x=x - hv).value()
        total += (change * v).reshape(rows, -1).sum(1) / (2 * step)
    return total if noise is None else total / len(directions)


def gradient_check(own: Subject, ref: Reference) -> Finding:
    """The reference's gradient along a random direction, against a central difference."""
    subject, h = ref.subject, ref.eps**0.25
    variables, ends = subject.variables(), []
    directions = [torch.randn_like(v) for v in variables]
    slope = sum((g * d).sum().item() for g, d in zip(ref.gradient, directions, strict=True))
    with torch.no_grad():
        for step in (h, -2 * h, h):  # and back
            for v, d in zip(variables, directions, strict=True):
                v.add_(d, alpha=step)
            ends.append(subject.solve()[1].mean().item())
    difference = (ends[0] - ends[1]) / (2 * h)
    error = abs(slope - difference) / (max(_norm(ref.gradient), abs(difference)) or 1.0)
    text, remedy = f"{error:.1e} from differences", f"a parameter {_HIDDEN}"
    row = judge("gradient check", text, error, 10 * h, remedy)
    return row, {"gradient_check": error}


def gradient_mode(own: Subject, ref: Reference, mode: str) -> Finding:
    """The error and the cost of one gradient mode; the number is its `GradientAudit`."""
    audit = _gradient_audit(own, ref.gradient, mode)
    if audit.failure:
        needed = any(part.solver.gradient == mode for part in own.cnfs)
        verdict = audit.failure if needed else f"ok (not available: {audit.failure})"
        return AuditRow(mode, "not available", verdict, not needed), {mode: audit}
    error = (
        torch.tensor([audit.error, audit.x_error], device="cpu").max().item()
    )  # NaN where one is
    text = f"{error:.1e}, {1e3 * audit.seconds:.0f} ms, {audit.memory / 2**20:.2f} MiB, "
    text += f"NFE {audit.nfe:.0f} + {audit.backward_nfe:.0f}"
    limit = max(1e-3, min(0.01, 100 * max(own.tolerances())))
    remedy = f"{'use backprop or checkpoint, or ' if mode == 'adjoint' else ''}{own.remedy()}"
    return judge(mode, text, error, limit, remedy), {mode: audit}


def _gradient_audit(own: Subject, truth: Sequence[Tensor], mode: str) -> GradientAudit:
    twin = replace(own)
    twin.share_noise(own)
    try:
        for part in twin.cnfs:
            part.solver = replace(part.solver, gradient=mode)  # type: ignore[arg-type]
        with record_solves() as solves:
            gradient, memory = peak_memory(twin.gradient, own.x.device)
        # To read a number is to wait for the device.
        seconds = median(repeat(lambda: twin.gradient()[0].sum().item(), number=1, repeat=3))
    except Exception as error:  # reported, for the other modes may do
        return GradientAudit(failure=first_sentence(error))
    forward, backward = (
        sum(s.nfe for s in solves if s.kind == kind) for kind in ("forward", "backward")
    )
    off = [g.to(ref) - ref for g, ref in zip(gradient, truth, strict=True)]
    x_error, p_error = (
        _norm(off[part]) / (_norm(truth[part]) or 1.0) for part in (slice(1), slice(1, None))
    )
    return GradientAudit(p_error, x_error, seconds, memory, forward, backward)


def _norm(tensors: Sequence[Tensor]) -> float:
    return get_total_norm(tensors).item()  # 0 for none
