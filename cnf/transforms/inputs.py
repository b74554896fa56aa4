"""What a transform accepts as samples and context; everything else is refused with its remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.ode.inputs import check_floating

__all__ = [
    "check_context_like",
    "check_dtype",
    "check_event",
    "check_like",
    "check_shape",
    "check_vector",
]

_FLOATS = (torch.float32, torch.float64)


def check_event(x: Tensor, event_shape: Sequence[int], module: nn.Module) -> None:
    """Refuse what is not a float tensor (*batch, *event).

    Raises:
        TypeError: not a tensor, or of another dtype than float32 and float64.
        ValueError: of another shape.
    """
    check_dtype(x, module)
    check_shape(x, event_shape)


def check_dtype(x: Tensor, module: nn.Module) -> None:
    """Refuse what is not a float32 or float64 tensor, naming the dtype that the module needs.

    Raises:
        TypeError: not a tensor, or of another dtype.
    """
    if isinstance(x, Tensor) and x.dtype not in _FLOATS:
        own = _first_tensor(module)
        if own is not None and own.is_floating_point():
            _check_not_low(x, own)
            remedy = "x.float()" if own.dtype == torch.float32 else "x.double()"
            raise TypeError(
                f"x must be float32 or float64, got {str(x.dtype).removeprefix('torch.')}; use "
                f"{remedy}, as the parameters are {own.dtype}"
            )
    check_floating(x)


def _check_not_low(x: Tensor, own: Tensor) -> None:
    """Refuse parameters of half precision."""
    if own.dtype not in _FLOATS:
        also = "" if x.dtype in _FLOATS else " and x.float()"
        raise TypeError(
            f"the parameters are {own.dtype}, but states and log-densities are never below "
            f"float32; use flow.float(){also}"
        )


def check_shape(x: Tensor, event_shape: Sequence[int], name: str = "x") -> None:
    """Refuse what is not of the shape (*batch, *event).

    Raises:
        ValueError: of another shape.
    """
    event = tuple(event_shape)
    if x.ndim < len(event) or x.shape[x.ndim - len(event) :] != event:
        expected = f"(..., D={event[0]})" if len(event) == 1 else f"(..., {str(event)[1:-1]})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}")


def check_vector(event_shape: Sequence[int]) -> None:
    """Refuse scalars, for what acts along the first dimension of a sample.

    Raises:
        ValueError: a shape without dimensions.
    """
    if not event_shape:
        raise ValueError("features=() are scalars, which have no first dimension; use D or a shape")


def check_like(x: Tensor, module: nn.Module) -> None:
    """Refuse x of another device or dtype than the module's.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    own = _first_tensor(module)
    if own is None:
        return
    if own.is_meta and not x.is_meta:
        raise ValueError(
            "the parameters are on the meta device, where tensors have no values; use "
            f"module.to_empty(device={str(x.device)!r}) and load_state_dict"
        )
    if own.device != x.device:
        raise ValueError(
            f"x is on {x.device} but the parameters are on {own.device}; "
            f"use x.to({str(own.device)!r}) or module.to({str(x.device)!r})"
        )
    if own.is_floating_point() and own.dtype != x.dtype:
        _check_not_low(x, own)
        raise TypeError(
            f"x is {x.dtype} but the parameters are {own.dtype}; use "
            f"x.to({own.dtype}) or module.to({x.dtype})"
        )


def _first_tensor(module: nn.Module) -> Tensor | None:
    """A parameter or buffer, one of floats where there is one: the first that is met.

    `module.parameters()` takes thrice as long.
    """
    other = None
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_floating_point():
            return tensor
        other = tensor if other is None else other
    for child in module._modules.values():
        found = None if child is None else _first_tensor(child)
        if found is not None and found.is_floating_point():
            return found
        other = found if other is None else other
    return other


def check_context_like(context: Tensor, x: Tensor) -> None:
    """Refuse context of another device or dtype than x.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    if context.device != x.device:
        raise ValueError(
            f"context is on {context.device} but x is on {x.device}; use context.to(x)"
        )
    if context.dtype != x.dtype:
        raise TypeError(
            f"context is {context.dtype} but the flow computes in {x.dtype}; use "
            f"context.to({x.dtype})"
        )
