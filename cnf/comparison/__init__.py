"""`compare_trace`: what each way to compute the trace costs a flow, and how far off it is."""

from __future__ import annotations

from cnf.comparison.report import TraceComparison, TraceRow
from cnf.comparison.run import compare_trace

__all__ = ["TraceComparison", "TraceRow", "compare_trace"]
