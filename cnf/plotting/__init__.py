"""Pictures of flows: on the plane their samples, density and path; images; how training went.

Needs matplotlib and Pillow: pip install "cnf[examples]". Every function draws on figures of its
own, without pyplot's global state, and returns the figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from cnf.plotting.calibration import plot_calibration, plot_posteriors
from cnf.plotting.energy import plot_energies
from cnf.plotting.images import plot_images
from cnf.plotting.plane import (
    animate_path,
    log_density_grid,
    plot_densities,
    plot_flow,
    plot_path,
    plot_samples,
)
from cnf.plotting.table import plot_table
from cnf.plotting.trace import plot_trace
from cnf.plotting.training import plot_training
from cnf.truncation import truncate

__all__ = [
    "animate_path",
    "log_density_grid",
    "plot_calibration",
    "plot_densities",
    "plot_energies",
    "plot_flow",
    "plot_images",
    "plot_path",
    "plot_posteriors",
    "plot_samples",
    "plot_table",
    "plot_trace",
    "plot_training",
    "truncate",
]
