"""`NFETrend`: has the field become so hard in training that its solves are much longer?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache
from statistics import median
from typing import Any

from cnf.checks import check_count
from cnf.ode import Solver, TorchDiffEq
from cnf.ode.methods import METHODS
from cnf.ode.stats import SolveStats
from cnf.warn import warn

__all__ = ["NFETrend"]


class NFETrend:
    """Warns once when the function evaluations of a training step have grown manifold.

    With n_i the evaluations of the forward solves of step i, and W the window, it warns at the
    first step k > W at which

        median(n_{k-W+1}, ..., n_k) >= growth * median(n_1, ..., n_W)

    Likelihood alone does not keep a field easy to solve: its weights may grow, and the steps of an
    adaptive method shrink, until training stands still or a solve fails. Medians, because single
    steps (a hard batch, a spike of the loss) tell nothing. Steps without evaluations are counted,
    but are in neither median. `fit` watches every run this way.

    Args:
        growth: How many times the first median the recent one must be, more than 1.
        window: Steps of a median.

    Attributes:
        step: Updates so far.
        first: The median of the first `window` steps, or None before there are so many.
        warned: Whether it has warned, after which it does not look any more.

    Example:
        In a loop of one's own, after each step:

        >>> import cnf, torch
        >>> flow, trend = cnf.FFJORD(2), NFETrend()
        >>> with cnf.record_solves() as solves:
        ...     loss = -flow.log_prob(torch.randn(5, 2)).mean()
        >>> trend.observe(solves)

        What it does with the numbers:

        >>> import warnings
        >>> trend = NFETrend(growth=5.0, window=3)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for nfe in [20, 26, 20, 500, 98, 104, 122, 700]:
        ...         trend.update(nfe)
        >>> trend.first, trend.step, len(caught)
        (20, 8, 1)
        >>> str(caught[0].message)[:75]
        'a training step takes 5.2 times the function evaluations that it took first'
    """

    def __init__(self, *, growth: float = 5.0, window: int = 100) -> None:
        check_count("window", window)
        if not growth > 1:
            raise ValueError(f"growth must be more than 1, got {growth}")
        self.growth = growth
        self.window = window
        self.step = 0
        self.first: float | None = None
        self.warned = False
        self._recent: deque[int] = deque(maxlen=window)

    def observe(self, solves: Iterable[SolveStats]) -> None:
        """`update` with what `record_solves` collected in one step.

        Of the forward solves by adaptive methods: fixed steps do not follow the field.
        """
        self.update(sum(s.nfe for s in solves if s.kind == "forward" and _adaptive(s.method)))

    def update(self, nfe: int) -> None:
        """Note the function evaluations of one training step; warn, if it is time.

        Warns:
            RuntimeWarning: The evaluations have grown; at most once.
        """
        self.step += 1
        if self.warned or nfe == 0:
            return
        self._recent.append(nfe)
        if len(self._recent) < self.window:
            return
        recent = median(self._recent)
        if self.first is None:
            self.first = recent
        elif recent >= self.growth * self.first:
            self.warned = True  # before the warning, which may be raised as an error
            warn(
                f"a training step takes {recent / self.first:.1f} times the function evaluations "
                f"that it took first: at step {self.step} the median of the last {self.window} is "
                f"{recent:g}, that of the first {self.window} was {self.first:g}. The field has "
                "become hard to solve, and may become harder. Regularise it (a penalty on its size "
                "or its Jacobian), use weight decay or smooth activations, loosen rtol and atol, "
                "lower the learning rate, or take a fixed-step method, such as "
                "Solver('rk4', steps=20)."
            )

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain values."""
        return {
            "step": self.step,
            "first": self.first,
            "warned": self.warned,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step, self.first = state["step"], state["first"]
        self.warned = state["warned"]
        self._recent = deque(state["recent"], maxlen=self.window)


@cache
def _adaptive(method: str) -> bool:
    """Whether a method, by the name in the statistics, chooses its steps by the tolerances."""
    return (Solver(method) if method in METHODS else TorchDiffEq(method)).adaptive
