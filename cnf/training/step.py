"""One optimiser step, which either happens with finite numbers or does not happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from cnf.errors import TrainingError
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.terms import record_terms
from cnf.ode import record_solves
from cnf.training.look import look_at
from cnf.training.run import Run

__all__ = ["StepReport", "take_step"]


@dataclass(frozen=True)
class StepReport:
    """What a step has to say.

    Attributes:
        step: Its number, from 1.
        loss: Of the batch, before the step.
        grad_norm: Euclidean norm of the gradient, before it was clipped.
        lr: Learning rate of the first parameter group in this step.
        nfe_forward: Function evaluations of the forward solves of the step.
        nfe_backward: Function evaluations of its backward solves.
        terms: The parts of the loss, by the names that the objective gave them, and what was
            annealed.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    nfe_forward: int
    nfe_backward: int
    terms: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """All of it by name, the terms among the others, for the log."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "terms"}
        return {**self.terms, **own}


def take_step(
    run: Run,
    *,
    clip_grad_norm: float | None,
    anneal: Mapping[str, Callable[[int], float]] | None = None,
) -> StepReport:
    """Batch, gradient, optimiser, scheduler, average: in this order.

    Raises:
        TrainingError: The loss or its gradient is not finite. The weights are those before it.
    """
    began, step = time.monotonic(), run.progress.step + 1
    batch = run.batches.next()
    parts = batch if isinstance(batch, tuple) else (batch,)
    if step == 1:
        look_at(run.objective, parts)
    chosen = {name: value(step - 1) for name, value in (anneal or {}).items()}
    run.optimizer.zero_grad(set_to_none=True)
    with record_solves() as solves, record_terms() as terms:
        loss = run.objective(*(part.to(run.device) for part in parts), **chosen)
        value = _finite_value(loss, step, run.objective, parts)
        loss.backward()
    limit = math.inf if clip_grad_norm is None else clip_grad_norm
    norm = float(nn.utils.clip_grad_norm_(run.objective.parameters(), limit))
    if not math.isfinite(norm):
        raise TrainingError(_blame(run.objective, norm, step))
    lr = float(run.optimizer.param_groups[0]["lr"])
    run.optimizer.step()
    if run.scheduler:
        run.scheduler.step()
    run.ema.update_parameters(run.objective)
    nfe = {
        kind: sum(solve.nfe for solve in solves if solve.kind == kind)
        for kind in ("forward", "backward")
    }
    report = StepReport(step, value, norm, lr, nfe["forward"], nfe["backward"], {**chosen, **terms})
    run.progress = run.progress.after(
        report.nfe_forward, report.nfe_backward, time.monotonic() - began
    )
    run.trend.observe(solves)
    return report


def _finite_value(
    loss: object, step: int, objective: nn.Module, batch: tuple[Tensor, ...]
) -> float:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"objective(batch) must return a scalar Tensor, got {got}; "
            "wrap a flow in cnf.MaximumLikelihood(flow)"
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        advice = ""
        if value == math.inf and isinstance(objective, MaximumLikelihood):
            advice = objective.outside(*(part.to(loss.device) for part in batch))
        advice = advice or "Lower the learning rate, clip the gradient, or look at the data."
        raise TrainingError(f"the loss of step {step} is {value}. {advice}")
    return value


def _blame(objective: nn.Module, norm: float, step: int) -> str:
    grads = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    where = (
        f", beginning with that of {bad[0]} ({len(bad)} of {len(grads)} parameters)" if bad else ""
    )
    return (
        f"the norm of the gradient of step {step} is {norm}{where}. "
        "Lower the learning rate or clip the gradient."
    )
