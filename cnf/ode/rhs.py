"""The right-hand side of a solve: the caller's function, counted and checked at each evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnf.ode.stats import SolveStats
from cnf.user_modules import copies, tracked, versions, writes_unseen

__all__ = ["Derivative", "Function", "RightHandSide", "Watch", "evaluate"]

Watch = Callable[[Tensor], AbstractContextManager[Any]]
"""What stands around the first evaluation of a solve."""

Derivative = tuple[Tensor, "Tensor | None"]
"""dx/dt and the integrands of the quadratures, if any."""

Function = Callable[..., "Tensor | Derivative"]
"""f(t, x, *args) -> dx, or (dx, dq) with dq None or (*batch, n)."""


class RightHandSide:
    """f(t, x) -> (dx, dq) with every evaluation counted and every result checked.

    Args:
        f: the caller's function f(t, x, *args).
        args: tensors that belong to the samples, (*batch, ...), or None.
        shared: tensors that belong to none of them, which f gets after the args.
        batch_dims: leading dimensions of x that index samples.
        stats: where evaluations are counted.
        per_sample: whether dq must have the shape (*batch, n) (the adjoint's own has not).
    """

    def __init__(
        self,
        f: Function,
        batch_dims: int,
        stats: SolveStats,
        *,
        args: Sequence[Tensor | None] = (),
        shared: Sequence[Tensor] = (),
        per_sample: bool = True,
    ) -> None:
        self.f = f
        self.args = tuple(args)
        self.shared = tuple(shared)
        self.batch_dims = batch_dims
        self.stats = stats
        self.per_sample = per_sample
        self.tracked = tracked(self.inputs)
        self.precision: Callable[[], AbstractContextManager[Any]] | None = None
        self.watch: Watch | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What f gets after t and x."""
        return (*self.args, *self.shared)

    @property
    def trainable(self) -> list[Tensor]:
        """Those of the inputs that require grad."""
        return [v for v in self.inputs if v is not None and v.requires_grad]

    def counting(self, stats: SolveStats) -> RightHandSide:
        """The same right-hand side, counted elsewhere, at the same precision."""
        other = copy.copy(self)
        other.stats, other.watch = stats, None
        return other

    def detached(self) -> RightHandSide:
        """The same with leaves in the place of inputs that require grad."""
        other = copy.copy(self)
        other.args = tuple(_leaf(v) for v in self.args)
        other.shared = tuple(_leaf(v) for v in self.shared)
        other.tracked = tracked(other.inputs)
        return other

    def rows(self, index: Tensor) -> RightHandSide:
        """The same for the samples of an index (N,)."""
        other = copy.copy(self)
        other.args = tuple(a if a is None else a[index] for a in self.args)
        other.tracked = tracked(other.inputs)
        return other

    def in_precision(self, x: Tensor) -> AbstractContextManager[Any]:
        """The autocast mode of the first evaluation: a backward pass runs outside it."""
        if self.precision is None:
            self.precision = _precision(x)
        return self.precision()

    def watched(self, x: Tensor) -> AbstractContextManager[Any]:
        """The watch over the first evaluation; nothing for later ones."""
        watch, self.watch = self.watch, None
        return nullcontext() if watch is None else watch(x)

    def __call__(self, t: Tensor, x: Tensor) -> Derivative:
        """(dx, dq) at t and x, checked; t () or one a sample (B,)."""
        if self.watch is not None:
            with self.watched(x):
                return self(t, x)
        self.stats.nfe += 1
        args, shared = self.args, self.shared
        given = None
        if writes_unseen(x):
            t, x = t.clone(), x.clone()
            args, shared = copies(args), copies(shared)
        else:
            given = versions((t, x, *self.tracked))
        try:
            with self.in_precision(x):
                result = evaluate(self.f, t, x, args, shared, self.batch_dims, self.per_sample)
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise _wrote("an argument") from error  # autograd forbids it before we see it
        if given is not None and (now := versions((t, x, *self.tracked))) != given:
            changed = [a != b for a, b in zip(now, given, strict=True)].index(True)
            raise _wrote({0: "its argument t", 1: "its argument x"}.get(changed, _BEHIND))
        return result


def evaluate(
    f: Function,
    t: Tensor,
    x: Tensor,
    args: Sequence[Tensor | None],
    shared: Sequence[Tensor],
    batch_dims: int,
    per_sample: bool = True,
) -> Derivative:
    """f(t, x, *args, *shared) as (dx, dq), refused unless shapes, dtypes and devices are right."""
    # torch 2.6 compiles anew for every object that is called as f(...), but not for its methods.
    call: Function = getattr(f, "__call__") if hasattr(f, "identity") else f  # noqa: B004, B009
    result = _with_own_times(f, t, x, args, shared) if t.ndim else call(t, x, *args, *shared)
    dx, dq = result if isinstance(result, tuple) else (result, None)
    dx = _like(dx, x, "dx")
    if dx.shape != x.shape:
        raise ValueError(
            f"the vector field must return dx of the shape of x, {tuple(x.shape)}, "
            f"got {tuple(dx.shape)}"
        )
    if dq is not None:
        dq = _like(dq, x, "dq")
        batch = x.shape[:batch_dims]
        if per_sample and (dq.ndim != len(batch) + 1 or dq.shape[:-1] != batch):
            raise ValueError(
                f"quadratures dq must have the shape (*batch, n) = {(*batch, 'n')}, "
                f"got {tuple(dq.shape)}"
            )
    return dx, dq


def _with_own_times(
    f: Function,
    t: Tensor,
    x: Tensor,
    args: Sequence[Tensor | None],
    shared: Sequence[Tensor],
) -> Tensor | Derivative:
    """f at one time a sample, t (B,): each sample as a batch of one, vectorised over samples."""
    own = getattr(f, "with_own_times", None)
    if own is not None:
        result: Tensor | Derivative = own(t, x, *args, *shared)
        return result

    def single(t: Tensor, x: Tensor, *args: Tensor | None) -> Tensor | Derivative:
        result = f(t, x[None], *(a if a is None else a[None] for a in args), *shared)
        if isinstance(result, tuple):
            dx, dq = result
            return dx[0] if dq is None else (dx[0], dq[0])
        return result[0]

    dims = (0, 0, *(None if a is None else 0 for a in args))
    mapped: Tensor | Derivative = torch.func.vmap(single, dims)(t, x, *args)
    return mapped


_BEHIND = "an argument behind x (its context, or one of args= of odeint)"


def _wrote(what: str) -> RuntimeError:
    """The error of a field that writes into what it is given."""
    return RuntimeError(
        f"the vector field modified {what} in-place, which corrupts the solve; copy it first, as "
        "in x = x.clone(), or use the out-of-place operation (x * 2 for x *= 2, inplace=False)"
    )


def _leaf(v: Any) -> Any:
    """A leaf of its own, where a tensor requires grad."""
    return v if v is None or not v.requires_grad else v.detach().requires_grad_()


def _precision(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast mode of now."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))


def _like(value: object, x: Tensor, name: str) -> Tensor:
    """The derivative, refused unless it is a tensor of the dtype and device of x."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the vector field must return a tensor {name} of shape {tuple(x.shape)}, "
            f"got {type(value).__name__}"
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x is on {x.device}; move one of them")
    if value.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"the vector field returned {name} of {value.dtype} for x of {x.dtype}; "
                f"convert one of them, for example field.to({x.dtype})"
            )
        value = value.to(x.dtype)  # autocast computes below the precision of the state
    return value
