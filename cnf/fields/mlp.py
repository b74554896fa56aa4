"""A multilayer perceptron as a vector field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from cnf.fields.activations import activation as make_activation
from cnf.fields.activations import has_slope, value_and_slope
from cnf.fields.base import Constants, VectorField, check_sizes
from cnf.fields.closed_form import is_linear
from cnf.fields.time import check_frequencies, time_features
from cnf.fields.trace import probe_ends, quadratic_form, trace, trace_matrix

__all__ = ["MLPField"]


class MLPField(VectorField):
    """A vector field by a multilayer perceptron.

        f(t, x, c) = W_n h_{n-1} + b_n,    h_l = g_l s(W_l h_{l-1} + b_l),    h_0 = [x, tau(t), c]
        tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies
        g_l = sigmoid(G_l [tau(t), c] + v_l) with gates, else 1

    With one or two hidden layers its exact divergence has a closed form, which costs what one
    hidden layer costs, in any dimension: sum_i m_i d_i or d_2^T M d_1, with d_l = g_l s'(a_l) at
    the pre-activations and M = W_2 * (W_1 W_3)^T (see `cnf/fields/trace.py`). Hutchinson's
    estimate has one with any number of layers.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        hidden: widths of the hidden layers, any number of them.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", "silu", ...) or an elementwise module;
            a module of your own takes part in the closed form if it has a method
            `value_and_slope(a) -> (s(a), s'(a))`.
        frequencies: number of Fourier frequencies by which time enters, 0 for t alone.
        gates: whether time and context also gate the hidden layers.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, an unknown activation, x or context of a wrong
            shape.

    Example:
        >>> field = MLPField(2, hidden=(64, 64), context=3)
        >>> t, x, context = torch.tensor(0.5), torch.randn(10, 2), torch.randn(10, 3)
        >>> field(t, x, context).shape
        torch.Size([10, 2])
        >>> dx, div = field.with_divergence(t, x, context)
        >>> div.shape
        torch.Size([10])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        frequencies: int = 3,
        gates: bool = False,
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        check_frequencies(frequencies)
        self.frequencies = frequencies
        times = 1 + 2 * frequencies
        self.inputs = [self.dims, times, *([context] if context else [])]
        widths = [sum(self.inputs), *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), make_activation(activation)]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], self.dims))
        gated = (nn.Linear(times + context, n) for n in hidden)
        self.gates = nn.ModuleList(gated) if gates else None

    batched_time = True

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the exact divergence has a closed form."""
        return len(self.network) <= 5 and self._known()

    @property
    def closed_quadratic_form(self) -> bool:  # type: ignore[override]
        """Whether Hutchinson's estimate has a closed form."""
        return len(self.network) > 1 and self._known()

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        h, _ = self._hidden(t, x, context, lambda s, a: (s(a), None))
        return h if len(self.network) == 1 else self.network[-1](h)

    def divergence_constants(self) -> Constants:
        """(M,), what of the divergence depends on parameters alone."""
        return (trace_matrix(self._weights()),)

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        h, slopes = self._hidden(t, x, context, value_and_slope)
        dx = self.network[-1](h) if slopes else h
        return dx, trace(slopes, constants[0], x.shape[0])

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """(W_1 e, W_n^T e) for probes e (B, k, *event)."""
        return probe_ends(self._weights(), self._flat_probes(probes))

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        h, slopes = self._hidden(t, x, context, value_and_slope)
        middle = [layer.weight for layer in self._linears()[1:-1]]
        form = quadratic_form(slopes, middle, (constants[0], constants[1]))
        return self.network[-1](h), form

    def _weights(self) -> list[Tensor]:
        """W_1 (H, D), its columns for x alone, W_2, ..., W_n."""
        first, *others = (layer.weight for layer in self._linears())
        return [first[:, : self.dims], *others]

    def _known(self) -> bool:
        """Whether the layers are what they were built as, with activations of known slopes."""
        return all(map(is_linear, self._linears())) and all(map(has_slope, self._activations()))

    def _linears(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.network)[::2])

    def _activations(self) -> list[nn.Module]:
        return list(self.network)[1::2]

    def _hidden(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        apply: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, list[Tensor]]:
        """The last hidden layer (B, H), and the slopes of all, gated, where `apply` gives them."""
        tau = time_features(t, self.frequencies)
        layers, slopes = self._linears(), []
        h = self._first(tau, x, context)
        for i, activation in enumerate(self._activations()):
            h, slope = apply(activation, h if i == 0 else layers[i](h))
            if self.gates is not None:
                gate = self._gate(self.gates[i], tau, context)
                h, slope = h * gate, slope if slope is None else slope * gate
            if slope is not None:
                slopes.append(slope)
        return h, slopes

    def _first(self, tau: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """W_1 [x, tau, c] + b_1 (B, H)."""
        first = self._linears()[0]
        if first._forward_pre_hooks or first._forward_hooks:  # they must run
            parts = [x, tau.expand(x.shape[0], -1), *([] if context is None else [context])]
            return first(torch.cat(parts, 1))
        # The rows of W^T for x, tau and c: time is added once a batch, and products with few
        # columns, as in the gradient with respect to x, are several times faster this way round.
        weight = first.weight.t().contiguous()  # (D + T + C, H)
        of_x, of_time, *of_context = weight.split(self.inputs)
        if tau.ndim == 1:
            bias = torch.addmv(first.bias, of_time.t(), tau)  # (H,)
        else:  # a time of each sample
            bias = torch.addmm(first.bias, tau, of_time)  # (B, H)
        if context is not None:
            bias = torch.addmm(bias, context, of_context[0])  # (B, H)
        return torch.addmm(bias, x, of_x)

    def _gate(self, layer: nn.Module, tau: Tensor, context: Tensor | None) -> Tensor:
        """sigmoid(G_l [tau, c] + v_l), (H,), or (B, H) with context or times of each sample."""
        s = tau if context is None else torch.cat((tau.expand(context.shape[0], -1), context), 1)
        return torch.sigmoid(layer(s))
