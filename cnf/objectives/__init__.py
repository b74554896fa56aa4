"""Objectives: modules whose forward takes a batch and returns a scalar loss."""

from __future__ import annotations

from cnf.objectives.flow_matching import FlowMatching
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.reverse_kl import ReverseKL

__all__ = ["FlowMatching", "MaximumLikelihood", "ReverseKL"]
