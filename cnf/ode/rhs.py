"""The right-hand side of a solve: the caller's function, counted and checked at each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnf.ode.stats import SolveStats

__all__ = ["Derivative", "RightHandSide"]

Derivative = tuple[Tensor, "Tensor | None"]
"""dx/dt and the integrands of the quadratures, if any."""


class RightHandSide:
    """f(t, x) -> (dx, dq) with every evaluation counted and every result checked.

    Args:
        f: the caller's function; it returns dx, or (dx, dq) with dq None or (*batch, n).
        batch_dims: leading dimensions of x that index samples.
        stats: where evaluations are counted.
        per_sample: whether dq must have the shape (*batch, n) (the adjoint's own has not).
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor | Derivative],
        batch_dims: int,
        stats: SolveStats,
        *,
        per_sample: bool = True,
    ) -> None:
        self.f = f
        self.batch_dims = batch_dims
        self.stats = stats
        self.per_sample = per_sample
        self.precision: Callable[[], AbstractContextManager[Any]] | None = None

    def counting(self, stats: SolveStats) -> RightHandSide:
        """The same right-hand side, counted elsewhere, at the same precision."""
        other = RightHandSide(self.f, self.batch_dims, stats, per_sample=self.per_sample)
        other.precision = self.precision
        return other

    def __call__(self, t: Tensor, x: Tensor) -> Derivative:
        """(dx, dq) at t and x, checked."""
        self.stats.nfe += 1
        version = None if x.is_inference() else x._version
        if self.precision is None:
            self.precision = _precision(x)
        with self.precision():
            result = self.f(t, x)
        if version is not None and x._version != version:
            raise RuntimeError(
                "the vector field modified its argument x in-place, which corrupts the solve; "
                "write x = x.clone() first, or use the out-of-place operation"
            )
        dx, dq = result if isinstance(result, tuple) else (result, None)
        low = self.precision is not nullcontext
        dx = _like(dx, x, "dx", low)
        if dx.shape != x.shape:
            raise ValueError(
                f"the vector field must return dx of the shape of x, {tuple(x.shape)}, "
                f"got {tuple(dx.shape)}"
            )
        if dq is not None:
            dq = _like(dq, x, "dq", low)
            batch = x.shape[: self.batch_dims]
            if self.per_sample and (dq.ndim != len(batch) + 1 or dq.shape[:-1] != batch):
                raise ValueError(
                    f"quadratures dq must have the shape (*batch, n) = {(*batch, 'n')}, "
                    f"got {tuple(dq.shape)}"
                )
        return dx, dq


def _precision(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast mode of now, for evaluations in a backward pass that runs outside it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))


def _like(value: object, x: Tensor, name: str, low: bool) -> Tensor:
    """The derivative, refused unless it is a tensor of the dtype and device of x."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the vector field must return a tensor {name} of shape {tuple(x.shape)}, "
            f"got {type(value).__name__}"
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x is on {x.device}; move one of them")
    if value.dtype != x.dtype:
        if not low:
            raise TypeError(
                f"the vector field returned {name} of {value.dtype} for x of {x.dtype}; "
                f"convert one of them, for example field.to({x.dtype})"
            )
        value = value.to(x.dtype)  # autocast computes below the precision of the state
    return value
