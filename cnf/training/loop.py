"""The training loop: draw a batch, take a step, and now and then validate, write down and save."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cnf.training.average import moving_average
from cnf.training.batches import Batch, make_batches
from cnf.training.folder import RunFolder
from cnf.training.log import Log, ProgressBar
from cnf.training.result import FitResult, Reason
from cnf.training.rows import far_below
from cnf.training.run import Progress, Run
from cnf.training.signals import Caught, stop_on_signals
from cnf.training.step import take_step

__all__ = ["fit"]

Validate = Callable[[nn.Module], float | Tensor]


def fit(
    objective: nn.Module,
    train: Batch | Callable[[int, torch.Generator], Batch] | None,
    *,
    steps: int,
    batch_size: int | None = None,
    anneal: Mapping[str, Callable[[int], float]] | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    clip_grad_norm: float | None = None,
    ema_decay: float = 0.999,
    validate: Validate | None = None,
    validate_every: int = 500,
    patience: int | None = None,
    max_time: float | None = None,
    out: str | Path | None = None,
    resume: bool | str | Path = False,
    config: Mapping[str, Any] | None = None,
    log_every: int = 10,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FitResult:
    """Minimise `objective(batch)` over batches of `train`.

    A run with `out` writes there `last.safetensors` (every `validate_every` steps and at the end),
    `best.safetensors` (at the lowest validation loss) and `log.jsonl`. A run that was interrupted
    and resumed, in another process and with whatever seed there, has bit for bit the weights of one
    that was not. The global random state is used and never reseeded: call `torch.manual_seed`
    before. Validation leaves it as it was.

    SIGINT or SIGTERM ends the run after its step with `last` saved; a second one raises
    `KeyboardInterrupt` at once. A signal that is ignored when the run starts stays ignored.

    A `RuntimeWarning` says, once in a run, when the function evaluations of a step have grown
    fivefold: see `NFETrend`. Another is given where the first batch has no density, such as points
    on a line, or another location or scale than the base of the flow.

    Args:
        objective: Module whose forward maps a batch to a scalar loss.
        train: Rows of data, (N, *event); several such tensors in a tuple, as samples and their
            conditions, for `objective(x, context)`; a function that draws new ones,
            `(batch_size, generator) -> (batch_size, *event)`, or a tuple; or None for an objective
            that draws its own samples, `objective()`, such as `cnf.ReverseKL`.
        steps: Optimiser steps, those before a resume included.
        batch_size: Rows of a batch; at most N are used. None where there is no data.
        anneal: Keyword arguments of the objective that follow the step, from 0: `{"beta":
            cnf.training.linear(0.0, 1.0, 1000)}` warms up the KL of `ELBO`. Validation has the
            objective's own.
        augment: Changes every batch of samples, `(batch, generator) -> batch`, as does
            `cnf.data.random_horizontal_flip`. All its randomness must come from the generator,
            which is that of the batches, on the CPU.
        optimizer: Adam with learning rate 1e-3 by default. One that evaluates the loss several
            times a step, such as LBFGS, is refused.
        scheduler: Stepped after every step.
        clip_grad_norm: Largest norm of the gradient.
        ema_decay: Decay of the moving average of the weights, see `moving_average`.
        validate: Maps the averaged objective to a loss, lower is better, or to the losses of rows
            (N,), whose mean it is: then the log also has the median and the worst where rows are
            far above the rest, see `far_below`. Gradients are recorded unless it says
            `torch.no_grad()`.
        validate_every: Steps between validations, and between saves.
        patience: Stop after so many validations without a new best one.
        max_time: Stop after so many seconds of this call.
        out: Folder of the run. One that holds a run already is refused, unless it is resumed.
        resume: Continue from `last.safetensors` of `out`, or from the checkpoint of that name. The
            rates of the optimiser are those of the checkpoint; another objective, another shape of
            the data or other settings are refused, other rows of that shape are not seen.
        config: Plain values to keep with the run. When it is resumed they must be the same, but for
            those that do not change its course (`steps`, `out`, ...: `cnf.training.run.FREE`).
        log_every: Steps between lines of the log.
        seed: Of the order of the data, or of the generator given to `train`. A resumed run keeps
            that of its first call.
        device: Where to move the objective and the batches; by default where the objective is.
        progress: Show a progress bar.

    Raises:
        TrainingError: The loss, its gradient or the weights are not finite. The last good
            checkpoint stays.
        CheckpointError: A checkpoint or the log cannot be written or read, or belongs to another
            run.
        SolverError: A solve failed; from Python 3.11 on a note names the last good checkpoint.

    Example:
        >>> class Distance(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.center = nn.Parameter(torch.zeros(2))
        ...     def forward(self, x):
        ...         return (x - self.center).square().mean()
        >>> result = fit(Distance(), torch.ones(10, 2), steps=20, batch_size=5, progress=False)
        >>> result.stopped, result.step
        ('steps', 20)
    """
    _check_counts(steps=steps, validate_every=validate_every, log_every=log_every)
    _check_choices(validate, patience=patience, clip_grad_norm=clip_grad_norm, scheduler=scheduler)
    _check_anneal(anneal)
    _check_call(objective, train, anneal or {})
    batches = make_batches(train, batch_size=batch_size, seed=seed, augment=augment)
    parameters = _parameters(objective, optimizer)
    objective.to(device or parameters[0].device).train()
    optimizer = optimizer or torch.optim.Adam(objective.parameters(), lr=1e-3)
    ema = moving_average(objective, ema_decay)
    settings: dict[str, Any] = {"clip_grad_norm": clip_grad_norm, "ema_decay": ema_decay}
    if anneal:
        settings["anneal"] = ", ".join(sorted(anneal))
    run = Run(objective, ema, optimizer, scheduler, batches, settings, config or {})
    folder = RunFolder(out)
    folder.begin(run, resume)
    end = _End(steps, patience, max_time, time.monotonic())
    with (
        stop_on_signals() as caught,
        Log(folder.log, step=run.progress.step, rescue=lambda: folder.rescue(run)) as log,
        ProgressBar(show=progress, steps=steps, step=run.progress.step) as bar,
        folder.mentioned_in_errors(),
    ):
        while (stopped := end.reached(run.progress, caught)) is None:
            report = take_step(run, clip_grad_norm=clip_grad_norm, anneal=anneal)
            bar.advance(report)
            if run.progress.step % log_every == 0:
                log.write({**report.values(), "elapsed": run.progress.elapsed})
            if run.progress.step % validate_every == 0:
                better = validate is not None and _validate(run, validate, log, bar)
                folder.save(run, best=better)
        if folder.saved_step != run.progress.step:
            last_look = stopped in ("steps", "max_time") and validate is not None
            folder.save(run, best=last_look and _validate(run, validate, log, bar))
    return FitResult.of(run, folder, stopped=stopped, signal=caught.number)


@dataclass(frozen=True)
class _End:
    """When a run ends: after so many steps, stale validations, or seconds since `began`."""

    steps: int
    patience: int | None
    max_time: float | None
    began: float

    def reached(self, progress: Progress, caught: Caught) -> Reason | None:
        if caught.number is not None:
            return "interrupted"
        if progress.step >= self.steps:
            return "steps"
        if self.patience is not None and progress.stale >= self.patience:
            return "patience"
        if self.max_time is not None and time.monotonic() - self.began >= self.max_time:
            return "max_time"
        return None


def _validate(run: Run, validate: Validate | None, log: Log, bar: ProgressBar) -> bool:
    """Write down the loss of the averaged weights; true if it is the lowest so far.

    The global random state is afterwards what it was before.
    """
    if validate is None or run.progress.validated_step == run.progress.step:
        return False
    began = time.monotonic()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        loss, rows = _validation(validate(run.ema.module))
    old, step = run.progress, run.progress.step
    old = replace(old, validated_step=step, elapsed=old.elapsed + time.monotonic() - began)
    better = math.isfinite(loss) and (old.best_loss is None or loss < old.best_loss)
    log.write({"step": step, "val_loss": loss, "best": better, "elapsed": old.elapsed, **rows})
    if better:
        run.progress = replace(old, best_step=step, best_loss=loss, stale=0)
    else:
        run.progress = replace(old, stale=old.stale + 1)
    bar.validated(loss)
    return better


def _validation(found: float | Tensor) -> tuple[float, dict[str, Any]]:
    """The loss, and what the log says of rows whose loss is far above that of the rest."""
    if not isinstance(found, Tensor):
        return float(found), {}
    if found.ndim > 1 or not found.numel():
        raise ValueError(
            f"validate must return a loss, or those of rows (N,), got shape {tuple(found.shape)}"
        )
    far = far_below(-found) if found.ndim else None
    loss = float(found.detach().mean())
    if far is None:
        return loss, {}
    return loss, {
        "val_median": -far.median,
        "val_worst": -far.worst,
        "val_far": len(far.rows),
        "val_far_rows": list(far.rows[:10]),
    }


def _parameters(objective: nn.Module, optimizer: Optimizer | None) -> list[nn.Parameter]:
    """The parameters of the objective, after a check that they are what the optimiser moves."""
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an optimiser, such as torch.optim.Adam(objective.parameters()), got "
            f"{optimizer!r}"
        )
    if optimizer is not None and _needs_closure(optimizer):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, which evaluates the loss several times a "
            "step, by a closure; fit evaluates it once, with new data and noise each time: use an "
            "optimizer such as torch.optim.Adam, or call optimizer.step(closure) in a loop of your "
            "own, on all data and with divergence='exact'"
        )
    parameters = list(objective.parameters())
    if not parameters:
        raise ValueError(
            "objective has no parameters; a field that is a plain function hides its own: "
            "make it an nn.Module"
        )
    moved = (
        {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    )
    if optimizer and not any(id(p) in moved for p in parameters):
        raise ValueError("optimizer holds no parameter of objective: build it from this objective")
    return parameters


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")


def _check_choices(
    validate: Validate | None,
    *,
    patience: int | None,
    clip_grad_norm: float | None,
    scheduler: LRScheduler | None,
) -> None:
    if patience is not None:
        _check_counts(patience=patience)
        if validate is None:
            raise ValueError(f"patience={patience} counts validations: it needs validate=")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm must be positive, got {clip_grad_norm}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("scheduler is stepped after every step, which ReduceLROnPlateau cannot be")


def _check_call(objective: nn.Module, train: object, anneal: Mapping[str, object]) -> None:
    """Refuse an objective that cannot be called with what there is."""
    parameters = inspect.signature(objective.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if unknown := [name for name in anneal if name not in named and not free]:
        raise TypeError(
            f"anneal[{unknown[0]!r}] is no argument of {type(objective).__name__}, which takes "
            f"{', '.join(named)}"
        )
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if train is None and required:
        raise ValueError(
            f"train=None is for an objective that draws its own samples, and "
            f"{type(objective).__name__} is a function of data: pass a tensor, a tuple of them, or "
            "a function (batch_size, generator) -> Tensor"
        )


def _check_anneal(anneal: Mapping[str, Callable[[int], float]] | None) -> None:
    for name, schedule in (anneal or {}).items():
        if not callable(schedule):
            raise TypeError(
                f"anneal[{name!r}] must be a function of the step, got {schedule!r}; a value that "
                "does not change belongs to the objective"
            )
