"""Vector fields dx/dt = f(t, x, context): what a continuous flow learns."""

from __future__ import annotations

from cnf.fields.base import VectorField
from cnf.fields.concatsquash import ConcatSquashField
from cnf.fields.conv import ConvField
from cnf.fields.hollow import HollowField
from cnf.fields.linear import LinearField
from cnf.fields.mlp import MLPField
from cnf.fields.potential import PotentialField
from cnf.fields.sum import SumField

__all__ = [
    "ConcatSquashField",
    "ConvField",
    "HollowField",
    "LinearField",
    "MLPField",
    "PotentialField",
    "SumField",
    "VectorField",
]
