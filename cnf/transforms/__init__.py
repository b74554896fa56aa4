"""Invertible maps with log-determinants; every flow is a base density and one of these."""

from __future__ import annotations

from cnf.transforms.base import Choices, Compose, Inverse, Transform
from cnf.transforms.continuous import CNF
from cnf.transforms.discrete import DiscreteTransform

__all__ = ["CNF", "Choices", "Compose", "DiscreteTransform", "Inverse", "Transform"]
