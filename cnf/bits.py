"""Log-likelihoods of integers in bits for each dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["bits_per_dim"]


def bits_per_dim(
    log_weights: Tensor, event_shape: Sequence[int], average: bool = False
) -> tuple[Tensor, Tensor]:
    """Bits for each dimension, from k draws of the log-likelihood; and their standard errors.

        -log2( 1/k sum_j w_j ) / D,    or the mean of -log2(w_j) / D

    Args:
        log_weights: log w_j, in nats (k, *batch).
        event_shape: of a sample, of D dimensions.
        average: whether to take the mean of the logarithms.

    Returns:
        bits (*batch,) and standard errors (*batch,), NaN for one draw.

    Example:
        >>> import torch
        >>> bits, stderr = bits_per_dim(torch.tensor([[0.25], [0.25]]).log(), (2,))
        >>> bits, stderr
        (tensor([1.]), tensor([0.]))
    """
    k = len(log_weights)
    nats = math.log(2) * math.prod(event_shape)
    if average:
        log_prob, spread = log_weights.mean(0), log_weights
    else:
        log_prob = log_weights.logsumexp(0) - math.log(k)
        spread = (log_weights - log_prob).exp()  # d log(mean w) = d mean(w) / mean(w)
    variance = (spread - spread.mean(0)).square().sum(0) / (k - 1 or math.nan)
    return -log_prob / nats, (variance / k).sqrt().detach() / nats
