"""A convolutional network as a vector field on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf.checks import check_bool, check_choice
from cnf.fields.activations import activation as make_activation
from cnf.fields.activations import has_slope, value_and_slope
from cnf.fields.base import Constants, VectorField, check_sizes
from cnf.fields.conv_image import ContextImage, image_features
from cnf.fields.conv_layers import adjoint, convolutions, image_sizes, is_known, linear
from cnf.fields.conv_time import Concat, ConcatSquash, Film, Modulation, modulated
from cnf.fields.conv_trace import conv_trace, conv_trace_constants
from cnf.fields.time import check_frequencies, time_features

__all__ = ["ConvField"]


class ConvField(VectorField):
    """A vector field on images by convolutions, which time and context modulate.

        h_0 = x,  h_l = s(layer_l(t, h_{l-1}, c)),  f(t, x, c) = layer_n(t, h_{n-1}, c)

    where a layer is, by the choice of `time`, with s = (tau(t), c),

        "film":          (K * h + b) (1 + gamma(s)) + beta(s); the last one K * h + b
        "concat":        K * h + b + K_s * (s 1)
        "concatsquash":  (K * h + b) sigmoid(w s + v) + u s

    Here gamma and beta are linear in s, they, w, v and u are numbers for each channel, and s 1 is
    an image of constant channels; tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies.
    "concat" and "concatsquash" are FFJORD's layers: with tau(t) = t, as is their default.

    A context that is an image has K_c * c added to K_1 * x + b_1, and no place in s: its channels
    are joined to those of x.

    Images are padded by zeros. At stride 1, with one hidden layer or two, the exact divergence has
    a closed form, which `Exact` uses: it costs about what `Hutchinson` does with one probe,
    whatever the size of the image. There is none where a context vector gates an output of several
    channels. Hutchinson's estimate has one at any stride, with any number of layers.

    Args:
        features: shape of an image, (C, H, W).
        hidden: channels of the hidden layers, at least one of them.
        kernel_size: odd side of the kernels: one for all layers, or one for each hidden layer and
            one for the last. At other strides than 1 kernels are of 4.
        context: number of context features, 0 for none.
        activation: a smooth one by name ("tanh", "softplus", "silu", ...) or a module. Tanh bounds
            the field, and its slope needs no second exponential: 1 - tanh^2. FFJORD has "softplus".
        time: how time enters, "film", "concat" or "concatsquash".
        frequencies: number of Fourier frequencies by which time enters, 0 for t alone; None takes
            3 for "film", 0 for the others.
        gated_output: whether the last layer of "concatsquash" has its sigmoid too, as FFJORD's has.
        context_shape: shape of a context that is an image (C', H', W'), None for a vector. The
            context is that image, flattened: N = C' H' W'. H' and W' are H and W, or a multiple by
            one factor: then its blocks of pixels become channels (`torch.nn.PixelUnshuffle`).
        strides: for each hidden layer and the last, 1, 2 (halves images) or -2 (doubles them, by a
            transposed convolution); None for 1 everywhere.

    Shapes:
        t (), x (B, C, H, W), context (B, N) -> (B, C, H, W).

    Raises:
        ValueError: features that are no image's, no hidden layer, sizes that are not positive,
            kernels that are even or not one a layer, an unknown activation or choice of time,
            strides that change the size or halve an odd one, a context image that does not fit; x
            or context of a wrong shape.

    Reference: Grathwohl et al., arXiv 1810.01367; Perez et al., arXiv 1709.07871, for "film".

    Example:
        >>> field = ConvField((1, 28, 28), hidden=(32, 32), context=3)
        >>> t, x, context = torch.tensor(0.5), torch.randn(10, 1, 28, 28), torch.randn(10, 3)
        >>> field(t, x, context).shape
        torch.Size([10, 1, 28, 28])
        >>> dx, div = field.with_divergence(t, x, context)
        >>> div.shape
        torch.Size([10])
        >>> field = ConvField((1, 28, 28), (32, 32, 32), time="concat", strides=(2, 1, 1, -2))
        >>> field(t, x).shape
        torch.Size([10, 1, 28, 28])
    """

    def __init__(
        self,
        features: Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        kernel_size: int | Sequence[int] = 3,
        context: int = 0,
        activation: str | nn.Module = "tanh",
        time: str = "film",
        frequencies: int | None = None,
        gated_output: bool = True,
        context_shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> None:
        if context_shape is not None:
            context = image_features(context, context_shape)
        super().__init__(features, context)
        if len(self.event_shape) != 3:
            raise ValueError(f"features={features!r} must be the shape of an image, (C, H, W)")
        check_sizes("hidden", hidden)
        if not hidden:
            raise ValueError("hidden=() must name at least one hidden layer, such as (64, 64)")
        check_choice("time", time, ("film", "concat", "concatsquash"))
        check_bool("gated_output", gated_output)
        self.frequencies = _frequencies(frequencies, time)
        self.strides = _strides(strides, len(hidden) + 1)
        channels, *size = self.event_shape
        sizes = image_sizes(size, self.strides)[:-1]
        layers = convolutions([channels, *hidden, channels], kernel_size, self.strides)
        self.layers = nn.ModuleList(layers)
        conditions = 1 + 2 * self.frequencies + (0 if context_shape else context)
        self.modulation: nn.Module
        if time == "film":
            self.modulation = Film(hidden, conditions)
        elif time == "concat":
            self.modulation = Concat(layers, sizes, conditions)
        else:
            every = [*hidden, channels]
            self.modulation = ConcatSquash(every, conditions, gated_output=gated_output)
        self.image = ContextImage(context_shape, size, layers[0]) if context_shape else None
        self.activations = nn.ModuleList(make_activation(activation) for _ in hidden)

    batched_time = True

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the exact divergence has a closed form."""
        own_gates = self._output_gated() and self.context > 0 and self.image is None
        return (
            self.closed_quadratic_form
            and len(self.activations) <= 2
            and (not own_gates or self.event_shape[0] == 1)
            and all(layer.stride == (1, 1) for layer in self.layers)
        )

    @property
    def closed_quadratic_form(self) -> bool:  # type: ignore[override]
        """Whether Hutchinson's estimate has a closed form."""
        by_channel = type(self.modulation) in (Film, Concat, ConcatSquash)
        known = all(map(is_known, self.layers)) and all(map(has_slope, self.activations))
        return by_channel and known

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        return self._run(t, x, context, lambda s, a: (s(a), None))[0]

    def divergence_constants(self) -> Constants:
        """What of the divergence depends on parameters alone: kernels, or a map.

        The divergence is linear in the last kernel: where a gate scales its channels, there are
        constants for each of them.
        """
        kernels = [cast("nn.Conv2d", layer).weight for layer in self.layers]
        size, channels = self.event_shape[1:], self.event_shape[0]
        if not self._output_gated() or channels == 1:
            return conv_trace_constants(kernels, size)
        first, *others, last = kernels
        each = [
            conv_trace_constants([first[:, c : c + 1], *others, last[c : c + 1]], size)
            for c in range(channels)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        dx, slopes, (*gates, output) = self._run(t, x, context, value_and_slope)
        if output is not None and self.event_shape[0] == 1:
            gates[-1] = gates[-1] * output
        elif output is not None:
            constants = tuple(torch.tensordot(output.flatten(), part, 1) for part in constants)
        return dx, conv_trace(slopes, gates, constants)

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """K_1 * e and the transpose of K_n on e, for probes e (B, k, C, H, W).

        Where a gate stands between e and K_n, e itself in the place of the second.
        """
        e = probes.flatten(0, 1)
        start = linear(self.layers[0], e).unflatten(0, probes.shape[:2])
        if self._output_gated():
            return start, probes
        return start, adjoint(self.layers[-1], e).unflatten(0, probes.shape[:2])

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        dx, slopes, (*gates, output) = self._run(t, x, context, value_and_slope)
        factors = [d if g is None else d * g for d, g in zip(slopes, gates, strict=True)]
        if output is not None:
            factors.append(output)
        *factors, last = [factor.unsqueeze(-4) for factor in factors]  # beside that of probes
        v, end = constants  # (B, k, channels, H, W)
        _, *layers = self.layers
        for factor, layer in zip(factors, layers, strict=False):  # the last only to a gate
            v = linear(layer, (v * factor).flatten(0, 1)).unflatten(0, v.shape[:2])
        return dx, (v * last * end).flatten(2).sum(-1)

    def _output_gated(self) -> bool:
        modulation = self.modulation
        return isinstance(modulation, ConcatSquash) and modulation.gated == modulation.channels

    def _run(
        self,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        rule: Callable[[nn.Module, Tensor], tuple[Tensor, Any]],
    ) -> tuple[Tensor, list[Any], list[Any]]:
        """dx (B, D); rule(s, a)[1] of each hidden layer; and the scale of each layer, or None."""
        h, others = x.unflatten(1, self.event_shape), []  # (B, D) -> (B, C, H, W)
        modulations = self._modulations(t, context)
        *hidden, last = zip(self.layers, modulations, strict=True)
        for (layer, modulation), s in zip(hidden, self.activations, strict=True):
            h, other = rule(s, modulated(layer(h), *modulation))
            others.append(other)
        layer, modulation = last
        dx = modulated(layer(h), *modulation).flatten(1)  # (B, C, H, W) -> (B, D)
        return dx, others, [scale for scale, _ in modulations]

    def _modulations(self, t: Tensor, context: Tensor | None) -> list[Modulation]:
        """Of each layer."""
        tau = time_features(t, self.frequencies)
        if self.image is None:
            return cast("list[Modulation]", self.modulation(tau, context))
        (scale, shift), *others = self.modulation(tau, None)
        return [(scale, modulated(self.image(context), scale, shift)), *others]


def _frequencies(frequencies: int | None, time: str) -> int:
    if frequencies is None:
        return 3 if time == "film" else 0
    check_frequencies(frequencies)
    return frequencies


def _strides(strides: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    if strides is None:
        return (1,) * layers
    if not isinstance(strides, Sequence) or isinstance(strides, str):
        raise TypeError(f"strides={strides!r} must be a sequence of 1, 2 or -2, one for each layer")
    if len(strides) != layers:
        raise ValueError(
            f"strides={tuple(strides)!r} names {len(strides)} layers, but there are {layers}: give "
            "one for each hidden layer and one for the last"
        )
    return tuple(strides)
