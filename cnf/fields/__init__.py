"""Vector fields dx/dt = f(t, x, context): what a continuous flow learns."""

from __future__ import annotations

from cnf.fields.base import VectorField
from cnf.fields.concatsquash import ConcatSquashField
from cnf.fields.linear import LinearField
from cnf.fields.mlp import MLPField
from cnf.fields.sum import SumField

__all__ = ["ConcatSquashField", "LinearField", "MLPField", "SumField", "VectorField"]
