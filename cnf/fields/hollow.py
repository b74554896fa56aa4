"""A vector field whose divergence is cheap by its wiring: HollowNet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks import check_count
from cnf.fields.activations import activation as make_activation
from cnf.fields.activations import has_slope, value_and_slope
from cnf.fields.base import Constants, VectorField, check_sizes
from cnf.fields.closed_form import is_linear, refuse_hooks
from cnf.fields.masked import MaskedLinear
from cnf.fields.time import check_frequencies, time_features

__all__ = ["HollowField"]


class HollowField(VectorField):
    """A vector field in which x_i enters f_i by a scalar function alone, and all else by h_i.

        f_i(t, x, c) = tau(x_i, h_i, t, c),    h_i = h_i(t, x_{-i}, c)    (x_{-i}: x without x_i)
        div f = sum_i d tau / d x_i at fixed h_i

    The conditioner h has a hollow Jacobian, of zero diagonal: half of the units of its hidden
    layers see x_{<i} and half x_{>i}, by masks as in MADE. So the exact divergence costs one
    tangent through tau, in any dimension and with any number of layers.

    Time enters as (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        hidden: widths of the hidden layers of the conditioner, 2 or more. With fewer than
            2 (D - 1) units in some layer h_i misses some of the x_j with j near i.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", "silu", ...) or an elementwise module
            with a method `value_and_slope(a) -> (s(a), s'(a))`.
        frequencies: number of Fourier frequencies by which time enters, 0 for t alone.
        conditioner_features: number of features of each h_i.
        tau_hidden: widths of the hidden layers of tau, which all i share.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, a hidden layer of one unit, an activation that is
            unknown or has no known slope, x or context of a wrong shape.

    Reference: Chen & Duvenaud, arXiv 1912.03579; MADE, Germain et al., arXiv 1502.03509.

    Example:
        >>> field = HollowField(2)
        >>> dx, div = field.with_divergence(torch.tensor(0.5), torch.randn(10, 2))
        >>> dx.shape, div.shape
        (torch.Size([10, 2]), torch.Size([10]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        frequencies: int = 3,
        conditioner_features: int = 16,
        tau_hidden: Sequence[int] = (32, 32),
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        check_sizes("tau_hidden", tau_hidden)
        if not tau_hidden:
            raise ValueError("tau_hidden=() must have at least one layer, such as (32, 32)")
        check_count("conditioner_features", conditioner_features)
        check_frequencies(frequencies)
        if min(hidden, default=2) < 2:
            raise ValueError(
                f"hidden={tuple(hidden)!r} must be widths of 2 or more: some units of each layer "
                "see x_{<i}, the others x_{>i}"
            )
        if not has_slope(make_activation(activation)):
            raise ValueError(
                f"activation={activation!r} has no known slope, which the divergence needs; give "
                "it a method value_and_slope(a) -> (s(a), s'(a))"
            )
        self.frequencies = frequencies
        times = 1 + 2 * frequencies
        self.conditioner = _HollowNetwork(
            self.dims, times + context, hidden, conditioner_features, activation
        )
        self.inputs = [1, conditioner_features, times + context]  # of tau: x_i, h_i, (t, c)
        widths = [sum(self.inputs), *tau_hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), make_activation(activation)]
        self.tau = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    batched_time = True

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether tau is what it was built as; then the divergence has a closed form."""
        return all(map(is_linear, self._linears())) and all(map(has_slope, list(self.tau)[1::2]))

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        a = self._first(t, x, context, self.conditioner.weights())
        dx: Tensor = self.tau[1:](a)  # (B * D, 1)
        return dx.reshape(x.shape)

    def divergence_constants(self) -> Constants:
        """The masked weights of the conditioner, and W_2 diag(w), w the weights of x_i in tau."""
        first, second, *_ = self._linears()
        return self.conditioner.weights(), second.weight * first.weight[:, 0]

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        weights, of_first_slope = constants
        h, slope = value_and_slope(self.tau[1], self._first(t, x, context, weights))
        h, tangent = self.tau[2](h), F.linear(slope, of_first_slope)  # dh / dx_i
        for activation, layer in zip(list(self.tau)[3::2], self._linears()[2:], strict=True):
            h, slope = value_and_slope(activation, h)
            h, tangent = layer(h), F.linear(slope * tangent, layer.weight)
        return h.reshape(x.shape), tangent.reshape(x.shape).sum(-1)

    def _linears(self) -> list[nn.Linear]:
        """The layers of tau, without its activations."""
        return cast("list[nn.Linear]", list(self.tau)[::2])

    def _first(
        self, t: Tensor, x: Tensor, context: Tensor | None, weights: tuple[Tensor, ...]
    ) -> Tensor:
        """The first layer of tau before its activation (B * D, H)."""
        s = time_features(t, self.frequencies).expand(x.shape[0], -1)  # (B, T)
        s = s if context is None else torch.cat((s, context), -1)
        h = self.conditioner(s, x, weights)  # (B, D, k)
        first = self._linears()[0]
        refuse_hooks(first)
        of_x, of_h, of_s = first.weight.t().split(self.inputs)
        a = torch.addmm(first.bias, s, of_s).unsqueeze(1)  # (B, 1, H)
        a = torch.addcmul(a, x.unsqueeze(-1), of_x)  # (B, D, H)
        return torch.addmm(a.flatten(0, 1), h.flatten(0, 1), of_h)


class _HollowNetwork(nn.Module):
    """A perceptron h (B, D, k) of x (B, D) and s (B, S), in which no path leads from x_i to h_i."""

    def __init__(
        self,
        dims: int,
        conditions: int,
        hidden: Sequence[int],
        features: int,
        activation: str | nn.Module,
    ) -> None:
        super().__init__()
        self.features = features
        with torch.device("cpu"):
            each = torch.eye(dims, dtype=torch.bool)
            none = each.new_zeros(conditions, dims)
            others = ~each.repeat_interleave(features, 0)
            count = max(1, min(dims - 1, min(hidden, default=0) // 2))
            seen = [torch.cat((each, none)), *(_seen(n, count, dims) for n in hidden), others]
            masks = [_subset(a, b).t() for a, b in pairwise(seen)]
        layers = [MaskedLinear(mask) for mask in masks]
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(make_activation(activation) for _ in hidden)
        for layer in layers:
            inputs = layer.mask.sum(1, keepdim=True).clamp_(min=1)
            with torch.no_grad():  # a unit's weights by the number of its own inputs
                layer.weight.uniform_(-1, 1).div_(inputs.sqrt_())

    def weights(self) -> tuple[Tensor, ...]:
        """The weights of each layer, masked."""
        for layer in self._linears():
            refuse_hooks(layer)
        return tuple(layer.masked_weight() for layer in self._linears())

    def _linears(self) -> list[MaskedLinear]:
        return cast("list[MaskedLinear]", list(self.layers))

    def forward(self, s: Tensor, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """h (B, D, k), with the weights of `weights()`."""
        h = torch.cat((x, s), -1)
        for i, (layer, weight) in enumerate(zip(self._linears(), weights, strict=True)):
            h = F.linear(self.activations[i - 1](h) if i else h, weight, layer.bias)
        return h.reshape(*x.shape, self.features)


def _seen(units: int, count: int, dims: int) -> Tensor:
    """Which x_i each unit of a hidden layer sees (units, D): for half of them x_{<=g}, and for half
    x_{>D-g}, with `count` values of g from 1 to D - 1, evenly.
    """
    half = (units + 1) // 2
    before = [-(-level * dims // (count + 1)) for level in _levels(half, count)]
    # Rounded down where the others are rounded up: with few units no x_i falls between them.
    after = [level * dims // (count + 1) for level in _levels(units - half, count)]
    i, g = torch.arange(dims), torch.tensor(before + after).unsqueeze(1).clamp(max=dims - 1)
    return torch.cat((i < g[:half], i >= dims - g[half:]))


def _levels(units: int, count: int) -> list[int]:
    """1 ... count, each for as many units as the others."""
    return [1 + j * count // units for j in range(units)]


def _subset(a: Tensor, b: Tensor) -> Tensor:
    """Whether each row of a (n, D), as a set, lies in each row of b (m, D): (n, m)."""
    return a.float() @ (~b).float().t() == 0
