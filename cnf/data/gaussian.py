"""The Gaussian fitted to a table: the score that every model of the table must beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cnf.data.read import check_finite
from cnf.singular import dependent_columns

__all__ = ["gaussian_log_prob"]


def gaussian_log_prob(train: Tensor, x: Tensor) -> Tensor:
    """Log-density of the Gaussian with the mean m and covariance S of `train`.

        log p(x) = -(x - m)^T S^-1 (x - m) / 2 - log det(2 pi S) / 2

    S divides by N: the maximum-likelihood fit.

    Args:
        train: rows to fit (N, D), N > D.
        x: points (*batch, D).

    Returns:
        log p(x) (*batch,), in float64.

    Raises:
        ValueError: if the shapes do not fit, a row of train is not finite, or S is singular: the
            dependent columns are named.

    Example:
        >>> rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> gaussian_log_prob(rows, rows).shape
        torch.Size([1000])
    """
    if train.dim() != 2 or x.dim() == 0 or x.shape[-1] != train.shape[1]:
        raise ValueError(
            f"train (N, D) and x (..., D) do not fit: got {tuple(train.shape)} and {tuple(x.shape)}"
        )
    if len(train) <= train.shape[1]:
        raise ValueError(
            f"train has {len(train)} rows of {train.shape[1]} columns; "
            "the covariance needs more rows than columns"
        )
    train = train.detach().double()
    check_finite(train, "train")
    check_independent(train)
    mean, std = train.mean(0), train.std(0, correction=0)
    z = (train - mean) / std
    factor = torch.linalg.cholesky(z.T @ z / len(z))  # (D, D)
    points = ((x.double() - mean) / std).reshape(-1, len(std)).T  # (D, B)
    white = torch.linalg.solve_triangular(factor, points, upper=False)  # (D, B)
    log_scale = (factor.diagonal().log() + std.log()).sum() + 0.5 * len(std) * math.log(2 * math.pi)
    log_prob: Tensor = -0.5 * white.square().sum(0) - log_scale  # (B,)
    return log_prob.reshape(x.shape[:-1])


def check_independent(x: Tensor) -> None:
    """Raise, with names, if columns of x (N, D) are constant or combinations of earlier ones."""
    constant = x.amax(0) == x.amin(0)
    found = [f"{i} is constant" for i in constant.nonzero().flatten().tolist()]
    found += dependent_columns(x[:, ~constant], (~constant).nonzero().flatten().tolist())
    if found:
        raise ValueError(
            f"train has a singular covariance: column {'; column '.join(found)}; "
            "leave such columns out"
        )
