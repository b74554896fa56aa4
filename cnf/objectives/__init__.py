"""Objectives: modules whose forward takes a batch and returns a scalar loss."""

from __future__ import annotations

from cnf.objectives.likelihood import MaximumLikelihood

__all__ = ["MaximumLikelihood"]
