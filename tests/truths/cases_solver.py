"""Solves inside a compiled program: the same numbers as outside."""

from __future__ import annotations

import torch
from torch import Tensor

import cnf

from .table import Case, Sample, standard_normal


def scaling(solver: cnf.Solver) -> Sample:
    """dx/dt = -t x: x(1) = z exp(-1/2), a normal density of that scale."""
    torch.manual_seed(0)
    field = cnf.CNF(lambda t, x: -t * x, "exact", solver)
    return Sample(cnf.Flow(cnf.StandardNormal(2), field), torch.randn(64, 2))


def scaled_normal(x: Tensor, context: Tensor | None) -> Tensor:
    return standard_normal(x * torch.tensor(0.5).exp()) + 1.0


CASES = [
    Case(
        f"the steps of {solver.method}",
        lambda s=solver: scaling(s),
        scaled_normal,
        backend="inductor",  # which freezes some of the numbers that eager Python hands to it
    )
    for solver in (cnf.Solver(), cnf.Solver("rk4", steps=8))
]
