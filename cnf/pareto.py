"""How heavy the tail of importance weights is: the shape of a generalized Pareto fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pareto_shape"]

_LEAST = 5  # weights that a fit needs
_TINY = math.log(torch.finfo(torch.float64).tiny)


def pareto_shape(log_weights: Tensor) -> Tensor:
    """The shape k of a generalized Pareto distribution of the largest weights, for each column.

        P(w - u > y | w > u) ~ (1 + k y / sigma)^(-1/k)

    u is the largest weight but the M = min(S / 5, 3 sqrt(S)) largest. E[w^a] is finite for a < 1/k:
    the variance for k < 1/2. The fit is the Bayesian one of Zhang and Stephens, which a weak prior
    draws towards 1/2, as is done for Pareto smoothed importance sampling.

    Args:
        log_weights: log w (S, *batch), up to a constant; minus infinity is a weight of zero.

    Returns:
        k (*batch,), float64; minus infinity where the largest weights are all equal, and NaN where
        fewer than 5 are above u, as with fewer than 25 draws.

    Reference: Vehtari et al., arXiv 1507.02646; Zhang and Stephens, Technometrics 51 (2009).

    Example:
        >>> u = torch.rand(10**5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> bool((pareto_shape(-0.6 * u.log()) - 0.6).abs() < 0.1)  # w = u^-0.6
        True
    """
    log_w = log_weights.double().flatten(1) if log_weights.ndim > 1 else log_weights[:, None]
    shapes = [_of_one(column) for column in log_w.double().unbind(1)]
    found = torch.stack(shapes) if shapes else log_w.new_zeros(0, dtype=torch.float64)
    return found.reshape(log_weights.shape[1:])


def _of_one(log_w: Tensor) -> Tensor:
    """The shape for one column of log-weights (S,)."""
    count = len(log_w)
    tail = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    if count <= tail:
        return log_w.new_tensor(math.nan)
    top = log_w.sort().values[-tail - 1 :]
    top = (top - top[-1]).clamp(min=_TINY)
    if top[0] == top[-1]:
        return log_w.new_tensor(-math.inf)
    above = top.exp() - top[0].exp()
    above = above[above > 0]  # (n,), ascending
    return _fitted_shape(above) if len(above) >= _LEAST else log_w.new_tensor(math.nan)


def _fitted_shape(x: Tensor) -> Tensor:
    """Zhang and Stephens' estimate from exceedances x (n,), ascending: k with the weak prior.

    The mean of theta = -k / sigma over its profile likelihood, at m points of a quantile grid.
    """
    n, m = len(x), 30 + int(math.sqrt(len(x)))
    i = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (m / (i - 0.5)).sqrt()) / (3 * quartile)  # (m,)
    k = torch.log1p(-theta[:, None] * x).mean(1)
    likelihood = n * ((-theta / k).log() - k - 1)
    mean = (likelihood.softmax(0) * theta).sum()
    shape = torch.log1p(-mean * x).mean()
    return (n * shape + 5) / (n + 10)  # as if 10 more weights had told 1/2
