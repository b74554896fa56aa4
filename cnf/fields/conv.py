"""A convolutional network as a vector field on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.activations import activation as make_activation
from cnf.fields.activations import has_slope, value_and_slope
from cnf.fields.base import Constants, VectorField, check_sizes
from cnf.fields.closed_form import is_linear
from cnf.fields.conv_trace import conv_trace, conv_trace_constants
from cnf.fields.time import check_frequencies, time_features

__all__ = ["ConvField"]


class ConvField(VectorField):
    """A vector field on images by convolutions, whose hidden layers time and context modulate.

        h_0 = x,  h_l = s(a_l),  a_l = (K_l * h_{l-1} + b_l) (1 + gamma_l(t, c)) + beta_l(t, c)
        f(t, x, c) = K_n * h_{n-1} + b_n
        gamma_l, beta_l: a number for each channel, linear in (tau(t), c)
        tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies

    Strides are 1 and images are padded by zeros, so every layer keeps their size. With one hidden
    layer or two the exact divergence has a closed form, which `Exact` uses: it costs about what
    `Hutchinson` does with one probe, whatever the size of the image. Hutchinson's estimate has one
    with any number of layers.

    Args:
        features: shape of an image, (C, H, W).
        hidden: channels of the hidden layers, at least one of them.
        kernel_size: odd side of the kernels: one for all layers, or one for each hidden layer and
            one for the last.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", "silu", ...) or a module. Tanh bounds
            the field, and its slope needs no second exponential: 1 - tanh^2.
        frequencies: number of Fourier frequencies by which time enters, 0 for t alone.

    Shapes:
        t (), x (B, C, H, W), context (B, N) -> (B, C, H, W).

    Raises:
        ValueError: features that are no image's, no hidden layer, sizes that are not positive,
            kernels that are even or not one a layer, an unknown activation, x or context of a
            wrong shape.

    Reference: Perez et al., arXiv 1709.07871, for the modulation by channel.

    Example:
        >>> field = ConvField((1, 28, 28), hidden=(32, 32), context=3)
        >>> t, x, context = torch.tensor(0.5), torch.randn(10, 1, 28, 28), torch.randn(10, 3)
        >>> field(t, x, context).shape
        torch.Size([10, 1, 28, 28])
        >>> dx, div = field.with_divergence(t, x, context)
        >>> div.shape
        torch.Size([10])
    """

    def __init__(
        self,
        features: Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        kernel_size: int | Sequence[int] = 3,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        frequencies: int = 3,
    ) -> None:
        super().__init__(features, context)
        if len(self.event_shape) != 3:
            raise ValueError(f"features={features!r} must be the shape of an image, (C, H, W)")
        check_sizes("hidden", hidden)
        if not hidden:
            raise ValueError("hidden=() must name at least one hidden layer, such as (64, 64)")
        check_frequencies(frequencies)
        self.frequencies = frequencies
        self.hidden = tuple(hidden)
        self.inputs = [1 + 2 * frequencies, *([context] if context else [])]
        channels = [self.event_shape[0], *hidden, self.event_shape[0]]
        sizes = _kernel_sizes(kernel_size, len(hidden) + 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(n_in, n_out, k, padding=k // 2)
            for (n_in, n_out), k in zip(pairwise(channels), sizes, strict=True)
        )
        self.modulation = nn.Linear(sum(self.inputs), 2 * sum(hidden))
        self.activations = nn.ModuleList(make_activation(activation) for _ in hidden)

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the exact divergence has a closed form."""
        return len(self.hidden) <= 2 and self.closed_quadratic_form

    @property
    def closed_quadratic_form(self) -> bool:  # type: ignore[override]
        """Whether Hutchinson's estimate has a closed form."""
        return all(map(_is_plain, self.layers)) and all(map(has_slope, self.activations))

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        h, _ = self._hidden(x, self._modulations(t, context), lambda s, a: (s(a), None))
        dx: Tensor = self.layers[-1](h).flatten(1)  # (B, C, H, W) -> (B, D)
        return dx

    def divergence_constants(self) -> Constants:
        """What of the divergence depends on parameters alone: kernels, or a map."""
        return conv_trace_constants(self._kernels(), self.event_shape[1:])

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        modulations = self._modulations(t, context)
        h, slopes = self._hidden(x, modulations, value_and_slope)
        gates = [scale for scale, _ in modulations]
        return self.layers[-1](h).flatten(1), conv_trace(slopes, gates, constants)

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """K_1 * e and the transpose of K_n on e, for probes e (B, k, C, H, W)."""
        first, *_, last = self._kernels()
        e = probes.flatten(0, 1)
        start = F.conv2d(e, first, padding=first.shape[-1] // 2)
        end = F.conv_transpose2d(e, last, padding=last.shape[-1] // 2)
        return start.unflatten(0, probes.shape[:2]), end.unflatten(0, probes.shape[:2])

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        modulations = self._modulations(t, context)
        h, slopes = self._hidden(x, modulations, value_and_slope)
        v, end = constants  # (B, k, channels, H, W)
        gated = [
            (d * scale).unsqueeze(1) for d, (scale, _) in zip(slopes, modulations, strict=True)
        ]
        for d, kernel in zip(gated[:-1], self._kernels()[1:-1], strict=True):
            moved = F.conv2d((v * d).flatten(0, 1), kernel, padding=kernel.shape[-1] // 2)
            v = moved.unflatten(0, v.shape[:2])
        return self.layers[-1](h).flatten(1), (v * gated[-1] * end).flatten(2).sum(-1)

    def _kernels(self) -> list[Tensor]:
        return [cast("nn.Conv2d", layer).weight for layer in self.layers]

    def _hidden(
        self,
        x: Tensor,
        modulations: list[tuple[Tensor, Tensor]],
        rule: Callable[[nn.Module, Tensor], tuple[Tensor, Any]],
    ) -> tuple[Tensor, list[Any]]:
        """The last hidden layer (B, H, height, width), and of each layer rule(s, a)[1]."""
        h, others = x.unflatten(1, self.event_shape), []  # (B, D) -> (B, C, H, W)
        *layers, _ = self.layers
        for layer, s, (scale, shift) in zip(layers, self.activations, modulations, strict=True):
            h, other = rule(s, torch.addcmul(shift, layer(h), scale))
            others.append(other)
        return h, others

    def _modulations(self, t: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """1 + gamma and beta of each hidden layer, (H, 1, 1), or (B, H, 1, 1) with context."""
        of_time, *of_context = self.modulation.weight.split(self.inputs, 1)
        both = torch.addmv(self.modulation.bias, of_time, time_features(t, self.frequencies))
        if context is not None:
            both = torch.addmm(both, context, of_context[0].t())
        gamma, beta = both.unflatten(-1, (-1, 1, 1)).chunk(2, -3)
        scales, shifts = (1 + gamma).split(self.hidden, -3), beta.split(self.hidden, -3)
        return list(zip(scales, shifts, strict=True))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of stride 1, padded by zeros to the same size."""
    return (
        is_linear(layer, nn.Conv2d)
        and isinstance(layer, nn.Conv2d)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.padding == tuple(k // 2 for k in layer.kernel_size)
    )


def _kernel_sizes(kernel_size: int | Sequence[int], layers: int) -> list[int]:
    sizes = [kernel_size] * layers if isinstance(kernel_size, int) else kernel_size
    check_sizes("kernel_size", sizes, "such as 3")
    if any(k % 2 == 0 for k in sizes):
        raise ValueError(f"kernel_size={kernel_size!r} must be odd, so that images keep their size")
    if len(sizes) != layers:
        raise ValueError(
            f"kernel_size={kernel_size!r} names {len(sizes)} layers, but there are {layers}: "
            "give one for each hidden layer and one for the last, or a single number"
        )
    return list(sizes)
