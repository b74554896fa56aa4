"""How a training went: losses against time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_training"]


def plot_training(
    logs: Mapping[str, str | Path], *, ylabel: str = "loss", terms: Sequence[str] = ("loss",)
) -> Figure:
    """Loss of batches (thin) and of validation (thick) against seconds, of one run or several.

    Args:
        logs: the `log.jsonl` that `cnf.training.fit` wrote, for each title.
        ylabel: what the loss is.
        terms: what the log says of batches, whose sum is comparable with the validation; a run
            that does not log them has no curve of batches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    seen: list[float] = []
    for i, (title, path) in enumerate(logs.items()):
        records = list(map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()))
        styles: dict[str, dict[str, Any]] = {
            "batches": {"alpha": 0.4, "linewidth": 1, "label": f"{title}, batches"},
            "val_loss": {"marker": ".", "label": f"{title}, validation"},
        }
        for kind, style in styles.items():
            names = terms if kind == "batches" else (kind,)
            known = [r for r in records if all(r.get(name) is not None for name in names)]
            points = [(r["elapsed"], sum(r[name] for name in names)) for r in known]
            if points:
                times, losses = zip(*points, strict=True)
                ax.plot(times, losses, color=f"C{i}", **style)
                seen.extend(sorted(losses)[: math.ceil(0.95 * len(losses))])
    if seen:  # the first steps may be far above all others
        margin = 0.05 * (max(seen) - min(seen)) or 0.1
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    ax.set(xlabel="seconds of training", ylabel=ylabel)
    ax.grid(visible=True, alpha=0.3)
    ax.legend(fontsize=8)
    return figure
