"""Data without a density: rows or columns on which a likelihood grows without bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dependent_columns", "singularities"]

DEPENDENT = 1e-6  # the share of its deviation that the others must leave a column
SURFACE = 1e-5  # the same for squares and products, in which roundings add up
NUMBERS = 2**16  # looked at, at most
ROWS = 16  # fewer tell nothing
DIMS = 256  # with more, dependent columns are not looked for
SQUARES = 10  # dimensions up to which surfaces of the second order are
SHARE = 1 / 3  # of the rows, which a point or the value of a column may not hold


@torch.no_grad()
def singularities(x: Tensor, levels: int | tuple[int | None, ...] | None = None) -> list[str]:
    """Why data have no density, in words, with what to do; nothing if no reason is seen.

    Looked for are points that many rows share, columns of few values, columns that are linear in
    others, and, in few dimensions, a surface of the second order that holds all rows. A thousand
    rows are looked at, fewer in many dimensions.

    Args:
        x: data (B, *event).
        levels: of the flow's transform: columns of integers, which it dequantizes, are left out.

    Example:
        >>> x = torch.randn(100, 3)
        >>> singularities(x)
        []
        >>> singularities(torch.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], 1))
        ['column 2 is a linear combination of 0, 1: leave such columns out']
    """
    columns = _real_columns(x, levels)
    if not columns:
        return []
    rows = max(4 * ROWS, min(1000, NUMBERS // len(columns)))
    x = x.detach().reshape(len(x), -1)[:rows, columns].double()
    if len(x) < ROWS:
        return []
    if repeated := _repeated_rows(x):
        return [repeated]
    some, found = _values(x, columns)
    kept = [i for i in range(len(columns)) if i not in some]
    if len(kept) > 1 and len(kept) <= DIMS and len(x) > 2 * len(kept):
        found += _dependent(x[:, kept], [columns[i] for i in kept])
    return found


def dependent_columns(x: Tensor, names: Sequence[int]) -> list[str]:
    """Columns of x (N, D), none of them constant, that are linear in earlier ones, in words."""
    z = (x - x.mean(0)) / x.std(0, correction=0)
    kept: list[int] = []
    found = []
    for i in range(z.shape[1]):
        if kept:
            weights = torch.linalg.lstsq(z[:, kept], z[:, i : i + 1]).solution  # (K, 1)
            if (z[:, i : i + 1] - z[:, kept] @ weights).square().mean().sqrt() < DEPENDENT:
                others = [
                    str(names[k])
                    for k, w in zip(kept, weights.flatten().tolist(), strict=True)
                    if abs(w) > DEPENDENT
                ]
                found.append(f"{names[i]} is a linear combination of {', '.join(others)}")
                continue
        kept.append(i)
    return found


def _real_columns(x: Tensor, levels: int | tuple[int | None, ...] | None) -> list[int]:
    """Which numbers of a sample are not integers that the flow dequantizes."""
    if isinstance(levels, tuple):
        return [i for i, level in enumerate(levels) if level is None]
    size = x[:1].numel()
    return [] if levels is not None else list(range(size))


def _repeated_rows(x: Tensor) -> str | None:
    """A point that many rows share."""
    code = x @ torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device).sqrt()  # (N,)
    counts = code.unique(return_counts=True)[1]
    if counts.max() <= SHARE * len(x):
        return None
    return (
        f"{int(counts.max())} of {len(x)} rows are one and the same: remove repeated rows, or "
        "model how often they occur on its own"
    )


def _values(x: Tensor, columns: Sequence[int]) -> tuple[set[int], list[str]]:
    """The columns of few values, and those of which many rows share one."""
    ordered = x.sort(0).values
    distinct = (ordered[1:] != ordered[:-1]).sum(0) + 1  # (D,)
    few = distinct <= max(2, min(20, len(x) // 10))
    far = int(SHARE * len(x))  # what is so far apart in order, and equal: so many rows share it
    shared = (ordered[far:] == ordered[: len(x) - far]).any(0) & ~few
    which, other = few.nonzero().flatten().tolist(), shared.nonzero().flatten().tolist()
    found = []
    if which:
        found.append(
            f"{_listed([columns[i] for i in which])} few values, {int(distinct[which].min())} in "
            f"{len(x)} rows: end a flow of counts and categories in cnf.Sigmoid(columns=...) and "
            "cnf.UniformDequantization(levels) (None for columns of real numbers), give such "
            "columns as context, or leave them out"
        )
    if other:
        found.append(
            f"{_listed([columns[i] for i in other])} a value that more than {SHARE:.0%} of the "
            "rows share: model these rows apart, add noise of the size of the rounding, or leave "
            "such columns out"
        )
    return {*which, *other}, found


def _listed(columns: Sequence[int]) -> str:
    some = ", ".join(map(str, columns[:5])) + (", ..." if len(columns) > 5 else "")
    return f"column {some} has" if len(columns) == 1 else f"columns {some} have"


def _dependent(x: Tensor, names: Sequence[int]) -> list[str]:
    """Columns (N, D) that are linear in others, or a quadric that holds all rows."""
    if _smallest(x) < DEPENDENT**2 and (found := dependent_columns(x, names)):
        return [f"column {'; column '.join(found)}: leave such columns out"]
    if x.shape[1] > SQUARES:
        return []
    low, middle, high = x.quantile(x.new_tensor([0.25, 0.5, 0.75]), dim=0)
    z = (x - middle) / (high - low)
    z = z[(z.abs() <= 4).all(1)]  # one far row would make a number like its own square
    z = torch.linalg.svd(z - z.mean(0), full_matrices=False).U  # no two nearly the same
    i, j = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
    features = torch.cat([z, z[:, i] * z[:, j]], 1)
    if len(z) < 2 * features.shape[1] or _smallest(features) > SURFACE**2:
        return []
    return [
        "all rows lie on a surface of the second order, as unit vectors do: use coordinates of the "
        "surface, such as angles, or add noise that is part of the model"
    ]


def _smallest(x: Tensor) -> float:
    """The least eigenvalue of the correlations of x (N, D)."""
    std = x.std(0, correction=0)
    if not bool((std > 0).all()):
        return 0.0
    z = (x - x.mean(0)) / std
    return float(torch.linalg.eigvalsh(z.T @ z / len(z))[0])
