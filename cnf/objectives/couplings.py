"""Couplings of flow matching: which base sample goes with which data sample of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from cnf.checks import check_count, check_number
from cnf.noise import draw
from cnf.objectives.choices import as_function
from cnf.warn import warn

__all__ = ["COUPLINGS", "Coupling", "Independent", "OptimalTransport", "as_coupling"]

Coupling = Callable[..., Tensor]
"""(x0, x1, context, generator=) -> for each data sample the index of its base sample (B,)."""


@dataclass(frozen=True)
class Independent:
    """Base and data samples as they were drawn.

    Example:
        >>> Independent()(torch.randn(3, 2), torch.randn(3, 2), None).tolist()
        [0, 1, 2]
    """

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """0, ..., B - 1."""
        return torch.arange(len(x1), device=x1.device)


@dataclass(frozen=True)
class OptimalTransport:
    """Minibatch optimal transport: the pairs of a batch that are nearest in the mean.

        min over permutations pi of sum_j |x0_pi(j) - x1_j|^2

    Paths then seldom cross, so fields are straighter and easier to solve. It is that of the batch:
    for the base and the data themselves it is biased, less so with larger batches.

    With conditions only base samples of rows with the very same context are exchanged: pairs found
    across conditions would make the base depend on the condition, and p(x | c) wrong. So of a
    continuous context nothing is left to pair (a warning says so), unless `context_weight` trades
    that bias for straightness: then the cost is |x0_i - x1_j|^2 + context_weight |c_i - c_j|^2,
    with the base sample i as one of the condition c_i.

    Args:
        regularization: 0 for the exact assignment (scipy); above it the strength, relative to the
            mean cost, of the entropic regularisation of Sinkhorn's algorithm, and base samples are
            drawn from that plan (POT, the package `ot`): for batches of thousands.
        context_weight: weight of the context in the cost, or None for equal contexts alone.
        group: how many samples are paired among themselves; None for all of a batch. The time of an
            assignment grows with the third power: about 1 ms for 128 samples, 50 for 512.

    Raises:
        ImportError: scipy, or POT where there is a regularization, is not installed.
        ValueError: a negative number, a group that is not a positive integer.

    Reference: Tong et al., arXiv 2302.00482; Pooladian et al., arXiv 2304.14772; with conditions,
    Cheng and Schwing, arXiv 2503.10636.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.1], [0.1]])
        >>> OptimalTransport()(x0, x1, None).tolist()
        [1, 0]
    """

    regularization: float = 0.0
    context_weight: float | None = None
    group: int | None = 128

    def __post_init__(self) -> None:
        if self.group is not None:
            check_count("group", self.group)
        for name in ("regularization", "context_weight"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
                if not 0 <= value < math.inf:
                    raise ValueError(f"{name}={value!r} must be 0 or more, and finite")

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """For each data sample the index of its base sample (B,), on the device of x1."""
        if context is None:
            return self._pairs(x0, x1, None, generator)
        if self.context_weight is not None:
            return self._pairs(x0, x1, context, generator)
        index = torch.arange(len(x1), device=x1.device)
        _, group, counts = context.unique(dim=0, return_inverse=True, return_counts=True)
        if len(x1) > 1 and int(counts.max()) == 1:
            warn(
                f"no two of the {len(x1)} rows of context are equal, so optimal transport has no "
                "pairs to choose and the coupling is the independent one; use "
                "coupling='independent', or OptimalTransport(context_weight=...) at the price of a "
                "bias"
            )
            return index
        for k in range(len(counts)):
            rows = index[group == k]
            index[rows] = rows[self._pairs(x0[rows], x1[rows], None, generator)]
        return index

    def _pairs(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The index of a base sample for each data sample, group by group (B,)."""
        size, indices = self.group or max(1, len(x1)), []
        for start in range(0, len(x1), size):
            rows = slice(start, start + size)
            own = None if context is None else context[rows]
            indices.append(start + self._assigned(x0[rows], x1[rows], own, generator))
        return torch.cat(indices) if indices else torch.arange(0, device=x1.device)

    def _assigned(
        self,
        x0: Tensor,
        x1: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The index of a base sample for each data sample, over all of them (B,)."""
        if len(x1) < 2:
            return torch.arange(len(x1), device=x1.device)
        cost = _squares(x1, x0)  # (B, B)
        if context is not None and self.context_weight:
            cost = cost + self.context_weight * _squares(context, context)
        if self.regularization:
            return self._drawn(cost, generator).to(x1.device)
        scipy = _require("scipy.optimize", "scipy")
        _, columns = scipy.linear_sum_assignment(cost.numpy())
        return torch.from_numpy(columns).to(x1.device)

    def _drawn(self, cost: Tensor, generator: torch.Generator | None) -> Tensor:
        """A base sample for each data sample, from its row of Sinkhorn's plan."""
        ot = _require("ot", "POT")
        matrix = (cost / cost.mean().clamp(min=1e-300)).numpy()
        plan = torch.from_numpy(
            ot.sinkhorn([], [], matrix, self.regularization, method="sinkhorn_stabilized")
        )
        rows = plan / plan.sum(1, keepdim=True)
        u = draw(torch.rand, (len(rows), 1), like=rows, generator=generator)
        return torch.searchsorted(rows.cumsum(1), u).squeeze(1).clamp(max=len(rows) - 1)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, on the host, where the libraries compute, without overflow."""
    first, second = (part.detach().flatten(1).cpu().double() for part in (a, b))
    return torch.cdist(first, second).square()


COUPLINGS: dict[str, Callable[[], Coupling]] = {
    "independent": Independent,
    "optimal-transport": OptimalTransport,
}
"""Every coupling that has a name."""


def as_coupling(coupling: str | Coupling) -> Coupling:
    """The coupling of that name, or the function itself; see `as_function`."""
    return as_function(
        "coupling", coupling, COUPLINGS, "(x0, x1, context, generator=) -> indices (B,)"
    )


def _require(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"optimal transport needs {package}: pip install {package}, or use "
            "coupling='independent'"
        ) from error
