"""Closed-form traces of a perceptron's Jacobian: no product with the Jacobian, no noise.

A perceptron with the weights W_1 ... W_n, whose hidden layers have the slopes d_l = s'(a_l) (times
a gate), has the Jacobian J = W_n diag(d_{n-1}) ... diag(d_1) W_1. The first and the last product
of its trace do not depend on the state, so they are done once a solve, and the trace costs what one
hidden layer costs, whatever the dimension:

    one hidden layer    tr J = sum_i m_i d_i,      m_i = (W_1 W_2)_ii
    two                 tr J = d_2^T M d_1,        M = W_2 * (W_1 W_3)^T, elementwise
    any number          e^T J e = b^T diag(d_{n-1}) W_{n-1} ... diag(d_1) a,  a = W_1 e, b = W_n^T e
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["probe_ends", "quadratic_form", "trace", "trace_matrix"]


def trace_matrix(weights: Sequence[Tensor]) -> Tensor:
    """What the trace needs of the weights: tr W_1 (), m (H,) or M (H_2, H_1).

    Args:
        weights: W_1 (H_1, D), ..., W_n (D, H_{n-1}), of one to three layers.
    """
    if len(weights) == 1:
        return weights[0].trace()
    first, last = weights[0], weights[-1]
    if len(weights) == 2:
        return (first * last.t()).sum(1)
    return weights[1] * (first @ last).t()


def trace(slopes: Sequence[Tensor], matrix: Tensor, rows: int) -> Tensor:
    """tr J (B,).

    Args:
        slopes: d_1 (B, H_1), ... of the hidden layers; without samples (H_1,) if all have the same.
        matrix: from `trace_matrix`.
        rows: B.
    """
    if not slopes:
        return matrix.expand(rows)
    if len(slopes) == 1:
        return slopes[0] @ matrix
    return (F.linear(slopes[0], matrix) * slopes[1]).sum(-1)


def probe_ends(weights: Sequence[Tensor], probes: Tensor) -> tuple[Tensor, Tensor]:
    """a = W_1 e and b = W_n^T e for each probe, (B, k, H_1) and (B, k, H_{n-1}).

    Args:
        weights: W_1 ... W_n, of two layers or more.
        probes: e (B, k, D).
    """
    return F.linear(probes, weights[0]), probes @ weights[-1]


def quadratic_form(
    slopes: Sequence[Tensor], middle: Sequence[Tensor], ends: tuple[Tensor, Tensor]
) -> Tensor:
    """e^T J e for each probe, (B, k).

    Args:
        slopes: d_1 (B, H_1), ... of the hidden layers, at least one.
        middle: W_2 ... W_{n-1}.
        ends: from `probe_ends`.
    """
    v, last = ends
    one = v.shape[1] == 1
    if one:  # without a dimension of probes, whose views cost as much as small products
        v, last = v.squeeze(1), last.squeeze(1)
    else:
        slopes = [slope.unsqueeze(-2) for slope in slopes]
    for slope, weight in zip(slopes[:-1], middle, strict=True):
        v = F.linear(v * slope, weight)
    form = (v * slopes[-1] * last).sum(-1)
    return form.unsqueeze(1) if one else form
