"""Rows of an evaluation that are far below the rest, which a mean over rows would hide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FarBelow", "far_below"]

FAR = 20.0  # interquartile ranges below the median, of one nat at least


@dataclass(frozen=True)
class FarBelow:
    """The rows far below the rest; `print` gives a sentence.

    Attributes:
        rows: their indices, the lowest first.
        count: of all rows.
        median: of all rows.
        worst: the lowest log-density.
    """

    rows: tuple[int, ...]
    count: int
    median: float
    worst: float

    def __str__(self) -> str:
        some = ", ".join(map(str, self.rows[:5])) + (", ..." if len(self.rows) > 5 else "")
        verb = "row is" if len(self.rows) == 1 else "rows are"
        return (
            f"{len(self.rows)} of {self.count} {verb} far below the rest (index {some}): "
            f"median {self.median:.4f}, worst {self.worst:.4g}"
        )


def far_below(log_prob: Tensor) -> FarBelow | None:
    """The rows whose log-density is far below that of the rest, or None if there are none.

        log p_i < median - 20 max(IQR, 1)

    with the median and the interquartile range of the rows that are finite. Rows of NaN or -inf
    are among them. Of a normal distribution no row is, in 1-D one of 10^10.

    Args:
        log_prob: log-densities (N,), in nats.

    Raises:
        ValueError: another shape.

    Example:
        >>> log_prob = torch.tensor([-1.0, -2.0, -1.5, -7e8, -1.2])
        >>> print(far_below(log_prob))
        1 of 5 row is far below the rest (index 3): median -1.5000, worst -7e+08
        >>> far_below(log_prob[:3]) is None
        True
    """
    if log_prob.ndim != 1:
        raise ValueError(f"log_prob has shape {tuple(log_prob.shape)}, expected (N,)")
    values = log_prob.detach().cpu().double().nan_to_num(nan=-torch.inf, posinf=torch.inf)
    ordered = values.sort().values
    finite = ordered[ordered.isfinite()]
    if not len(finite):
        return None
    low, median, high = (float(finite[int(q * (len(finite) - 1))]) for q in (0.25, 0.5, 0.75))
    far = values < median - FAR * max(high - low, 1.0)
    if not far.any():
        return None
    rows = [i for i in values.argsort().tolist() if far[i]]
    return FarBelow(tuple(rows), len(values), median, float(ordered[0]))
