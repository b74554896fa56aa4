"""The divergence of a vector field, div f = tr df/dx, exact or by Hutchinson's estimator.

The trace is what turns a solve into a density (the instantaneous change of variables, Chen et
al., arXiv 1806.07366). Noise is an argument: drawn once a solve by `sample_noise`, then the same
at every evaluation, so that the estimated system is an ODE with a solution.
"""

from __future__ import annotations

from cnf.checks import check_choice
from cnf.divergence.base import BoundField, Divergence, Estimator
from cnf.divergence.estimators import Hutchinson, HutchPlusPlus
from cnf.divergence.exact import Exact

__all__ = [
    "BoundField",
    "Divergence",
    "Estimator",
    "Exact",
    "HutchPlusPlus",
    "Hutchinson",
    "as_divergence",
]


def as_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence that a string names ("exact", "hutchinson"), or the object itself.

    Raises:
        ValueError: another string.
        TypeError: neither a string nor a `Divergence`.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            "divergence must be 'exact', 'hutchinson' or a Divergence such as cnf.Exact(), "
            f"got {type(divergence).__name__}"
        )
    names: dict[str, Divergence] = {"exact": Exact(), "hutchinson": Hutchinson()}
    check_choice("divergence", divergence, names)
    return names[divergence]
