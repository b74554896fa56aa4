"""MADE: a perceptron whose i-th outputs depend on the inputs before i alone, by masked weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks import check_bool, check_count
from cnf.fields.base import check_sizes
from cnf.fields.masked import MaskedLinear
from cnf.transforms.conditioners import make_activation, zeroed
from cnf.transforms.discrete import check_context_size

__all__ = ["MADE", "Walk"]


class MADE(nn.Module):
    """A masked perceptron: P numbers for each of D dimensions, of the dimensions before it.

        p_i = network(x_1, ..., x_{i-1}, context),    i = 1, ..., D

    Hidden units have degrees, evenly spread and in order: one of degree m sees x_1, ..., x_m.
    Those of degree 0, an eighth at least, see context alone, so that p_1 depends on it. Layers
    narrower than D have no unit for some degrees, so that some p_i do not depend on x_{i-1}; there
    is a warning. It is zero at first.

    Args:
        features: number of dimensions D.
        parameters: numbers P for each dimension.
        hidden: widths of the hidden layers.
        context: number of context features, 0 for none.
        activation: by name ("relu", "silu", "tanh", ...) or an elementwise module.
        residual: whether each hidden layer but the first is added to the one before (ResMADE);
            widths must then be equal.

    Shapes:
        x (B, D), context (B, C) -> (B, P, D).

    Raises:
        ValueError: sizes that are not positive; residual layers of different widths.

    Reference: Germain et al., arXiv 1502.03509.

    Example:
        >>> made = MADE(3, parameters=2, hidden=(16, 16))
        >>> made(torch.randn(10, 3)).shape
        torch.Size([10, 2, 3])
    """

    def __init__(
        self,
        features: int,
        parameters: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_count("features", features)
        check_count("parameters", parameters)
        check_sizes("hidden", hidden)
        check_context_size(context)
        check_bool("residual", residual)
        if not hidden:
            raise ValueError("hidden=() must have a layer at least, such as (64, 64)")
        if residual and len(set(hidden)) > 1:
            raise ValueError(
                f"hidden={tuple(hidden)!r} must be equal widths where residual=True, "
                "such as (64, 64)"
            )
        self.features, self.parameters_each, self.residual = features, parameters, residual
        degrees = [_degrees(features, width, with_context=context > 0) for width in hidden]
        if narrow := [width for width in hidden if width < features - 1]:
            warnings.warn(
                f"hidden={tuple(hidden)}: a layer of {min(narrow)} units cannot keep all of the "
                f"{features} dimensions apart, so some parameters will not depend on all those "
                f"before them; use {features} units or more",
                stacklevel=2,
            )
        self.degrees = degrees  # of every hidden layer, ascending
        inputs = list(range(1, features + 1))
        self.layers = nn.ModuleList()
        self.activations = nn.ModuleList()
        for before, after in zip([inputs, *degrees], degrees, strict=False):
            self.layers.append(_layer(before, after))
            self.activations.append(make_activation(activation))
        outputs = [i - 1 for i in inputs] * parameters  # an output i sees units of degree < i
        self.last = cast(MaskedLinear, zeroed(_layer(degrees[-1], outputs)))
        self.from_context = nn.Linear(context, hidden[0], bias=False) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """p (B, P, D) for x (B, D), context (B, C)."""
        h = x
        for i, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            a = layer(h)
            if i == 0 and self.from_context is not None:
                a = a + self.from_context(context)
            h = h + activation(a) if self.residual and i else activation(a)
        return cast(Tensor, self.last(h).reshape(x.shape[0], self.parameters_each, self.features))


def _degrees(features: int, width: int, *, with_context: bool) -> list[int]:
    """Degrees 0 or 1, ..., D - 1 over the units of a layer, ascending."""
    if features == 1:
        return [0] * width
    zeros = max(width // 8, width // features, 1) if with_context else 0
    rest = max(width - zeros, 1)
    steps = [1 + (features - 1) * k // rest for k in range(rest)]
    if rest < features - 1:  # the last one is never left out
        steps[-1] = features - 1
    return [0] * (width - rest) + steps


def _layer(before: Sequence[int], after: Sequence[int]) -> MaskedLinear:
    """A linear layer in which a unit sees those of its own degree or less."""
    inputs, outputs = (torch.tensor(degrees, device="cpu") for degrees in (before, after))
    return MaskedLinear(outputs[:, None] >= inputs)


class Walk:
    """The same network one dimension at a time, when x_i is known only after p_i.

    Every hidden unit is computed once, as soon as what it sees is known: all D steps together do
    the arithmetic of one pass of the network, where repeating the pass would do that of D.

    Args:
        made: the network.
        context: (B, C) or None.
        start: a tensor (B, 0), which gives size, dtype and device.
    """

    def __init__(self, made: MADE, context: Tensor | None, start: Tensor) -> None:
        self.made = made
        self.shift = None if made.from_context is None else made.from_context(context)
        self.known = [start for _ in range(1 + len(made.layers))]  # x, and each layer's units
        self.step = 0

    def parameters(self) -> Tensor:
        """p (B, P) of the next dimension, given those before it."""
        made, known = self.made, self.known
        for i, layer in enumerate(made.layers):
            first = known[i + 1].shape[1]
            last = sum(degree <= self.step for degree in made.degrees[i])
            if last == first:
                continue
            units = slice(first, last)
            h = _part(layer, units, known[i])
            if i == 0 and self.shift is not None:
                h = h + self.shift[:, units]
            h = made.activations[i](h)
            if made.residual and i:
                h = known[i][:, units] + h
            known[i + 1] = torch.cat([known[i + 1], h], 1)
        return _part(made.last, slice(self.step, None, made.features), known[-1])

    def append(self, x: Tensor) -> None:
        """Go on, with the value (B, 1) of that dimension."""
        self.known[0] = torch.cat([self.known[0], x], 1)
        self.step += 1


def _part(layer: nn.Module, units: slice, known: Tensor) -> Tensor:
    """Some units of a layer, of the inputs that are known: what is masked comes after them."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    return F.linear(known, weight[units, : known.shape[1]], bias[units])
