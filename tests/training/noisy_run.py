"""A small training run whose objective draws noise from the global generator; also a script, to be
killed and resumed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf.training import FitResult, fit


class Noisy(nn.Module):
    """A regression with noise in the loss, as Hutchinson's estimator has, dropout, and a tied
    weight.
    """

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.second = nn.Linear(8, 2)
        self.tied = nn.Linear(2, 8)
        self.tied.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:  # (B, 2) -> ()
        """Mean squared error of a noisy map to the sine of x."""
        time.sleep(self.pause)
        self.calls += 1
        hidden = nn.functional.dropout(torch.tanh(self.first(x) + self.tied(x)), 0.1)
        return (self.second(hidden) + 0.1 * torch.randn_like(x) - x.sin()).square().mean()


def rows(count: int = 50) -> Tensor:
    """The same data in every process."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(7))


def noisy_run(
    out: Path | None, *, steps: int, seed: int, pause: float = 0.0, **options: Any
) -> FitResult:
    """The run; `seed` is that of the process and decides the initial weights."""
    torch.manual_seed(seed)
    objective = Noisy(pause)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    choices: dict[str, Any] = {
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=500),
        "validate": lambda ema: ema(rows().to(ema.first.weight.device)),
        "validate_every": 30,
        "clip_grad_norm": 0.5,
        "log_every": 1,
        "seed": seed,
        "progress": False,
        "config": {"model": "noisy", "steps": steps},
    }
    return fit(objective, rows(), steps=steps, batch_size=16, out=out, **{**choices, **options})


if __name__ == "__main__":
    out, steps, seed, pause, resume = sys.argv[1:]
    result = noisy_run(
        Path(out), steps=int(steps), seed=int(seed), pause=float(pause), resume=resume == "resume"
    )
    sys.exit(result.exit_code)
