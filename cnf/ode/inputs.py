"""What a solve accepts as state and times; everything else is refused with its remedy."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from cnf.checks import check_dense, check_values, tracing
from cnf.ode.step import Clock, time_dtype

__all__ = ["check_finite", "check_floating", "check_state", "clock_of"]


def check_state(x: Tensor, batch_dims: int = 1) -> None:
    """Refuse a state that is not a finite float32 or float64 tensor."""
    check_floating(x)
    if x.ndim < batch_dims:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {batch_dims} batch dimensions")
    check_finite(x, batch_dims)


def check_floating(x: Tensor, name: str = "x") -> None:
    """Refuse what is not a float32 or float64 tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; use torch.as_tensor")
    check_dense(x, name)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {str(x.dtype).removeprefix('torch.')}; "
            f"use {name}.float()"
        )


def check_finite(x: Tensor, batch_dims: int, name: str = "x") -> None:
    """Refuse a tensor with NaN or infinite values, naming the first sample that has one.

    Nothing is refused where values cannot be looked at, as under torch.func.vmap.
    """
    check_values(x, name)
    if tracing() or math.isfinite(x.detach().sum().item()):  # one that overflows proves nothing
        return
    rows = ~x.detach().isfinite().unsqueeze(-1).flatten(batch_dims).all(-1)
    if not rows.any():
        return
    raise ValueError(
        f"non-finite values in {name}: {int(rows.sum())} of {rows.numel()} rows "
        f"(first index {int(rows.reshape(-1).nonzero()[0])}); remove or repair them"
    )


def clock_of(t0: float | Tensor, t1: float | Tensor, x: Tensor) -> Clock:
    """The span, with its gradient where a time requires grad.

    Raises:
        TypeError: a time that is neither a number nor a tensor.
        ValueError: a time that is not finite, or a span below the resolution of the dtype.
    """
    times = []
    for name, t in (("t0", t0), ("t1", t1)):
        if isinstance(t, Tensor) and t.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor (), got shape {tuple(t.shape)}")
        if not isinstance(t, (Real, Tensor)):
            raise TypeError(f"{name} must be a number or a tensor (), got {type(t).__name__}")
        times.append(float(t.detach() if isinstance(t, Tensor) else t))
        if not math.isfinite(times[-1]):
            raise ValueError(f"{name} is {times[-1]}; times must be finite")
    start, end = times
    resolution = torch.finfo(x.dtype).eps * max(abs(start), abs(end))
    if start != end and abs(end - start) < 100 * resolution:
        raise ValueError(
            f"the span from t0={start!r} to t1={end!r} is below the resolution of time in "
            f"{x.dtype}; shift the times towards zero or use float64"
        )
    if not (
        torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (t0, t1))
    ):
        return Clock(start, end)
    exact = [_as_tensor(t, x) for t in (t0, t1)]
    return Clock(start, end, *exact)


def _as_tensor(t: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=time_dtype(x), device=x.device).reshape(())
