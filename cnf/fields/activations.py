"""Activations by name, with their slopes. Smooth ones only: an adaptive solver pays for kinks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks import check_choice, tracing
from cnf.fields.closed_form import written_for

__all__ = ["ACTIVATIONS", "Tanh", "activation", "has_slope", "value_and_slope"]


class Tanh(nn.Module):
    """The hyperbolic tangent; in float32 on a CPU as 2 sigmoid(2 a) - 1, several times faster.

    That differs from torch.tanh by rounding, 1.2e-7 at most.
    """

    def forward(self, a: Tensor) -> Tensor:
        """tanh(a), of any shape."""
        if not _by_sigmoid(a):
            return torch.tanh(a)
        h: Tensor = _TanhBySigmoid.apply(a) if torch.is_grad_enabled() else _tanh(a)
        return h


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
}
"""Every activation that has a name."""


def activation(
    choice: str | nn.Module, names: Mapping[str, type[nn.Module]] = ACTIVATIONS
) -> nn.Module:
    """A new activation module, from its name or as a copy of a module.

    Raises:
        ValueError: a name that is not known.
        TypeError: neither a name nor a module.

    Example:
        >>> activation("softplus")
        Softplus(beta=1.0, threshold=20.0)
    """
    if isinstance(choice, nn.Module):
        return copy.deepcopy(choice)  # one each: a learnable activation is not shared by accident
    if not isinstance(choice, str):
        raise TypeError(
            f"activation must be a name or a module, got {type(choice).__name__}; "
            f"names are {', '.join(names)}"
        )
    check_choice("activation", choice, names, ", or a module")
    return names[choice]()


def has_slope(activation: nn.Module) -> bool:
    """Whether `value_and_slope` knows a module: one of this file's table, or one of your own
    with a method `value_and_slope(a) -> (s(a), s'(a))`.

    Example:
        >>> has_slope(nn.SiLU()), has_slope(nn.Softmax(-1))
        (True, False)
    """
    if type(activation) in _SLOPES:
        return True
    return written_for(activation, ["value_and_slope"], ["forward", "__call__"])


def value_and_slope(activation: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative, s(a) and s'(a), of any shape.

    Both are differentiable in a. For modules that `has_slope` knows.

    Example:
        >>> value_and_slope(nn.Sigmoid(), torch.zeros(1))
        (tensor([0.5000]), tensor([0.2500]))
    """
    rule = _SLOPES.get(type(activation))
    if rule is None:
        pair: tuple[Tensor, Tensor] = activation.value_and_slope(a)  # type: ignore[operator]
        return pair
    return rule(activation, a)


def _by_sigmoid(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and not tracing()


def _tanh(a: Tensor) -> Tensor:
    return (2 * a).sigmoid_().mul_(2).sub_(1)


class _TanhBySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        h = _tanh(a)
        ctx.save_for_backward(h)
        ctx.save_for_forward(h)
        return h

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(g, h)

    @staticmethod
    def jvp(ctx: Any, da: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return da * (1 - h * h)


class _TanhAndSlope(torch.autograd.Function):
    """(h, 1 - h^2), whose backward pass is one kernel and a product: plain operations take six."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        h, d = _tanh_and_slope(a)
        ctx.save_for_backward(h, d)
        ctx.save_for_forward(h, d)
        return h, d

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gd: Tensor) -> Tensor:
        h, d = ctx.saved_tensors
        return torch.addcmul(gh, gd, h, value=-2) * d

    @staticmethod
    def jvp(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor]:
        h, d = ctx.saved_tensors
        return d * da, -2 * h * d * da


def _tanh_and_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    h = _tanh(a) if _by_sigmoid(a) else torch.tanh(a)
    one = torch.ones((), dtype=h.dtype, device=h.device)
    return h, torch.addcmul(one, h, h, value=-1)


def _tanh_rule(_: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    if tracing():  # a function with rules for torch.func costs 20 us a call
        h = torch.tanh(a)
        return h, 1 - h * h
    if torch.is_grad_enabled():
        pair: tuple[Tensor, Tensor] = _TanhAndSlope.apply(a)
        return pair
    return _tanh_and_slope(a)


def _sigmoid_rule(_: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.sigmoid(a)
    return h, h * (1 - h)


def _softplus_rule(s: nn.Softplus, a: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.sigmoid(s.beta * a)
    return s(a), torch.where(s.beta * a > s.threshold, torch.ones_like(slope), slope)


def _silu_rule(_: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.sigmoid(a)
    h = a * p
    return h, p + h * (1 - p)


def _gelu_rule(s: nn.GELU, a: Tensor) -> tuple[Tensor, Tensor]:
    if s.approximate == "tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        u = torch.tanh(c * (a + k * a**3))
        return s(a), 0.5 * (1 + u) + 0.5 * a * (1 - u * u) * c * (1 + 3 * k * a * a)
    normal = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))  # its distribution function
    return a * normal, normal + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _elu_rule(s: nn.ELU, a: Tensor) -> tuple[Tensor, Tensor]:
    below = s.alpha * torch.exp(a.clamp(max=0))
    return F.elu(a, s.alpha), torch.where(a > 0, torch.ones_like(a), below)  # never in place


def _mish_rule(s: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.tanh(nn.functional.softplus(a))
    return a * u, u + a * (1 - u * u) * torch.sigmoid(a)


_SLOPES: dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    Tanh: _tanh_rule,
    nn.Tanh: _tanh_rule,
    nn.Softplus: _softplus_rule,
    nn.SiLU: _silu_rule,
    nn.GELU: _gelu_rule,
    nn.ELU: _elu_rule,
    nn.Mish: _mish_rule,
    nn.Sigmoid: _sigmoid_rule,
}
"""(module, a) -> (s(a), s'(a)). Subclasses may do anything, so types are matched exactly."""
