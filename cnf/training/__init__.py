"""Training: the loop that the examples share, and the files that it leaves behind.

`fit` takes an objective (an `nn.Module` whose `forward(batch)` is a scalar loss) and data, and
trains it with a progress bar, a log, an average of the weights, validation, checkpoints and early
stopping. All that decides the course of a run is in its checkpoint, so a run that was interrupted
ends where it would have ended anyway.
"""

from __future__ import annotations

from cnf.training.average import moving_average
from cnf.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from cnf.training.loop import fit
from cnf.training.muon import Muon
from cnf.training.result import FitResult
from cnf.training.rows import FarBelow, far_below
from cnf.training.schedules import linear
from cnf.training.trend import NFETrend

__all__ = [
    "FarBelow",
    "FitResult",
    "Muon",
    "NFETrend",
    "far_below",
    "fit",
    "linear",
    "load_checkpoint",
    "load_weights",
    "moving_average",
    "save_checkpoint",
]
