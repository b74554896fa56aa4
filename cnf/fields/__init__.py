"""Vector fields dx/dt = f(t, x, context): what a continuous flow learns."""

from __future__ import annotations

from cnf.fields.base import VectorField
from cnf.fields.concatsquash import ConcatSquashField
from cnf.fields.mlp import MLPField

__all__ = ["ConcatSquashField", "MLPField", "VectorField"]
