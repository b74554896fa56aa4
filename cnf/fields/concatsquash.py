"""FFJORD's network: layers gated and shifted by time."""

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
from cnf.fields.trace import probe_ends, quadratic_form, trace, trace_matrix

__all__ = ["ConcatSquashField"]


class _ConcatSquashLinear(nn.Module):
    """(W x + b) * sigmoid(w_t s + b_t) + w_bt s, with s = (t, context); not gated if told so."""

    def __init__(self, n_in: int, n_out: int, conditions: int, *, gated: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.gate = nn.Linear(conditions, n_out) if gated else None
        self.shift = nn.Linear(conditions, n_out, bias=False)

    def forward(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer, and its gate, (n_out,) or (B, n_out), if it has one."""
        y = self.linear(x)
        if self.gate is None:
            return y + self.shift(s), None
        gate = torch.sigmoid(self.gate(s))
        return y * gate + self.shift(s), gate


class ConcatSquashField(VectorField):
    """FFJORD's vector field: a perceptron whose every layer is gated and shifted by time.

        layer(t, x) = (W x + b) * sigmoid(w_t t + b_t) + w_bt t

    Context, where there is any, stands beside t in the gates and shifts.

    With one or two hidden layers the exact divergence has a closed form (see `MLPField`), unless
    context gates the output: then every sample would need a matrix M of its own. It costs least
    without a gate at the output; with one that depends on time alone, M is computed at every
    evaluation.

    Args:
        features: dimensions of a sample, D, or its shape.
        hidden: widths of the hidden layers.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", ...) or an elementwise module.
        gated_output: whether the output layer has a gate too, as FFJORD's has.

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: sizes that are not positive, an unknown activation, x or context of a wrong
            shape.

    Reference: Grathwohl et al., arXiv 1810.01367.

    Example:
        >>> field = ConcatSquashField(2, hidden=(64, 64, 64))
        >>> field(torch.tensor(0.5), torch.randn(10, 2)).shape
        torch.Size([10, 2])
        >>> ConcatSquashField(2, context=3, gated_output=False).closed_form
        True
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        gated_output: bool = True,
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        widths = [self.dims, *hidden, self.dims]
        last = len(hidden)
        self.layers = nn.ModuleList(
            _ConcatSquashLinear(n_in, n_out, 1 + context, gated=gated_output or i < last)
            for i, (n_in, n_out) in enumerate(pairwise(widths))
        )
        self.activations = nn.ModuleList(make_activation(activation) for _ in hidden)

    batched_time = True

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the exact divergence has a closed form."""
        return (
            len(self.activations) <= 2
            and not (self._output_gated() and self.context)
            and self._known()
        )

    @property
    def closed_quadratic_form(self) -> bool:  # type: ignore[override]
        """Whether Hutchinson's estimate has a closed form."""
        return len(self.activations) > 0 and not self._output_gated() and self._known()

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        return self._run(t, x, context, lambda s, a: (s(a), None))[0]

    def divergence_constants(self) -> Constants:
        """(M,), what of the divergence depends on parameters alone; nothing with a gated output."""
        return () if self._output_gated() else (trace_matrix(self._weights()),)

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        dx, slopes, gate = self._run(t, x, context, value_and_slope)
        if gate is None:
            return dx, trace(slopes, constants[0], x.shape[0])
        *others, last = self._weights()
        matrix = trace_matrix([*others, gate.unsqueeze(1) * last])
        return dx, trace(slopes, matrix, x.shape[0])

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """(W_1 e, W_n^T e) for probes e (B, k, *event)."""
        return probe_ends(self._weights(), self._flat_probes(probes))

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        dx, slopes, _ = self._run(t, x, context, value_and_slope)
        return dx, quadratic_form(slopes, self._weights()[1:-1], (constants[0], constants[1]))

    def _weights(self) -> list[Tensor]:
        return [layer.linear.weight for layer in self._layers()]

    def _known(self) -> bool:
        """Whether the layers are what they were built as, with activations of known slopes."""
        own = all(type(layer) is _ConcatSquashLinear for layer in self.layers)
        linear = own and all(is_linear(layer.linear) for layer in self._layers())
        return linear and all(map(has_slope, self.activations))

    def _output_gated(self) -> bool:
        return self._layers()[-1].gate is not None

    def _layers(self) -> list[_ConcatSquashLinear]:
        return cast("list[_ConcatSquashLinear]", list(self.layers))

    def _run(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        apply: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """dx (B, D), the gated slopes of the hidden layers where `apply` gives them, and the
        output's gate (D,), or (B, D) with context.
        """
        s = t.unsqueeze(-1)  # (1,), or (B, 1 + C) with context
        if context is not None:
            s = torch.cat((s.expand(context.shape[0], 1), context), -1)
        *hidden, output = self.layers
        slopes = []
        for layer, activation in zip(hidden, self.activations, strict=True):
            a, gate = layer(s, x)
            x, slope = apply(activation, a)
            if slope is not None:
                slopes.append(slope * gate)
        dx, gate = output(s, x)
        return dx, slopes, gate
