"""`check`: can a flow's numbers be trusted? An audit against a tight solve in float64.

Read `run`, the function, first; then what it puts together: `subject`, the flow under audit and
its noise; `measure`, its values; `derivatives`, its divergence and gradients; `report`, the text.
"""

from __future__ import annotations

from cnf.audit.report import Audit
from cnf.audit.run import check

__all__ = ["Audit", "check"]
