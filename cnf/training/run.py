"""The state of a training run: all that decides how it goes on, to be saved and restored."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from cnf.errors import CheckpointError
from cnf.training.batches import Batches
from cnf.training.checkpoint import weights_of
from cnf.training.trend import NFETrend

__all__ = ["FREE", "Progress", "Run"]

FREE = frozenset(
    "steps max_time patience validate_every log_every out resume progress device".split()  # noqa: SIM905
)
"""Entries of `config` that do not change the course of a run: kept, but not compared."""

_ADDED = frozenset({"trend", "objective"})  # what older checkpoints lack


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimiser steps taken.
        elapsed: Seconds spent on steps and validations, in all calls together.
        nfe_forward: Function evaluations of all forward solves so far.
        nfe_backward: The same for backward solves.
        best_step: Step of the lowest validation loss, or None.
        best_loss: That loss.
        validated_step: Step of the last validation.
        stale: Validations since the best one.
    """

    step: int = 0
    elapsed: float = 0.0
    nfe_forward: int = 0
    nfe_backward: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validated_step: int = 0
    stale: int = 0

    def after(self, nfe_forward: int, nfe_backward: int, seconds: float) -> Progress:
        """One optimiser step later."""
        return replace(
            self,
            step=self.step + 1,
            elapsed=self.elapsed + seconds,
            nfe_forward=self.nfe_forward + nfe_forward,
            nfe_backward=self.nfe_backward + nfe_backward,
        )


@dataclass
class Run:
    """What a training step changes, and what must be the same when the run is resumed.

    `settings` are those of the loop, `config` the values that the caller wants to keep with the
    run.
    """

    objective: nn.Module
    ema: AveragedModel
    optimizer: Optimizer
    scheduler: LRScheduler | None
    batches: Batches
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    trend: NFETrend = field(default_factory=NFETrend)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.objective.parameters()).device

    def course(self) -> dict[str, Any]:
        """What decides where the run goes, beside its state."""
        return {
            **self.batches.describe(),
            **self.settings,
            "objective": _named(self.objective),
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            **{
                f"config[{name!r}]": value
                for name, value in self.config.items()
                if name not in FREE
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, with PyTorch's global random states, for `save_checkpoint`."""
        return {
            "model": self.objective.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_count": int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "batches": self.batches.state_dict(),
            "random": _random_state(),
            "progress": asdict(self.progress),
            "trend": self.trend.state_dict(),
            "course": self.course(),
            "config": dict(self.config),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue from `state`, which came from `path`: all is checked, then all is loaded."""
        if missing := [key for key in self.state_dict() if key not in state and key not in _ADDED]:
            raise CheckpointError(
                f"checkpoint {path} does not hold a training run: it lacks {', '.join(missing)}."
            )
        _check_course(state["course"], self.course(), path)
        model = weights_of(state["model"], self.objective, path)
        ema = weights_of(state["ema"], self.ema.module, path)
        _check_groups(state["optimizer"], self.optimizer, path)
        self.objective.load_state_dict(model)
        self.ema.module.load_state_dict(ema)
        self.ema.n_averaged.fill_(state["ema_count"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        self.progress = Progress(**state["progress"])
        if "trend" in state:
            self.trend.load_state_dict(state["trend"])
        else:  # its first steps are those that come now
            self.trend.step = self.progress.step
        _set_random_state(state["random"])


def _named(objective: nn.Module) -> str:
    """The objective and its own settings, in words that another process has, too."""
    return re.sub(" at 0x[0-9a-f]+", "", f"{type(objective).__name__}({objective.extra_repr()})")


def _check_course(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    lines = [
        f"{name}: {old.get(name, 'absent')!r} in the checkpoint, {new.get(name, 'absent')!r} now"
        for name in {**old, **new}
        if name in old or name not in _ADDED
        if name not in old or name not in new or old[name] != new[name]
    ]
    if lines:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run. Resume with the settings of that run, "
            "or start anew in another folder. Differences:\n  " + "\n  ".join(lines)
        )


def _check_groups(state: Mapping[str, Any], optimizer: Optimizer, path: Path) -> None:
    old = [len(group["params"]) for group in state["param_groups"]]
    new = [len(group["params"]) for group in optimizer.param_groups]
    if old != new:
        raise CheckpointError(
            f"checkpoint {path} does not fit the optimizer: "
            f"groups of {old} parameters in the checkpoint, of {new} now."
        )


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
