"""Normalization of channels: by a first batch (`ActNorm`), or by every batch (`BatchNorm`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.checks import check_positive, tracing
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.inputs import check_event, check_like, check_vector

__all__ = ["ActNorm", "BatchNorm"]


class _ChannelTransform(DiscreteTransform):
    """A transform that treats the entries of the first dimension of a sample, its channels, alike.

    They are its D numbers for vectors (D,), and have H W pixels each for images (C, H, W).
    """

    @property
    def _pixels(self) -> int:
        return math.prod(self.event_shape[1:])

    def _like_x(self, parameter: Tensor) -> Tensor:
        """Numbers of channels (C,), to be broadcast against x (B, C, ...)."""
        return parameter.reshape(-1, *(1 for _ in self.event_shape[1:]))

    def _total(self, log_scale: Tensor, x: Tensor) -> Tensor:
        """The log-determinants (B,) of scales of the channels (C,)."""
        return (log_scale.sum() * self._pixels).expand(x.shape[0])

    def _by_channel(self, x: Tensor) -> Tensor:
        """All values of each channel (C, N) in x (B, C, ...)."""
        return x.transpose(0, 1).reshape(self.event_shape[0], -1)


class ActNorm(_ChannelTransform):
    """A scale and a shift of each channel, which a first batch sets and training then learns.

        x_c = exp(s_c) z_c + b_c,    log |det dx/dz| = H W sum_c s_c

    The first call in the direction x -> z sets b_c and exp(s_c) to the mean and the standard
    deviation of channel c, over the batch and its pixels, so that z has mean 0 and deviation 1; no
    later one does. Until then `forward` is the identity, and sets nothing. Whether it has happened
    is part of the state that is saved and loaded. It needs the values of x: before torch.compile,
    `torch.func` transforms, or DistributedDataParallel (where each process would set its own),
    call it once on a batch, or call `initialize`. Within `cnf.Inverse` the directions are swapped:
    there samples of the base would set it, so call `initialize`.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W); channels are the first
            dimension.

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        ValueError: in the call that initialises, fewer than two values for each channel, a channel
            that is constant or not finite, or values that cannot be looked at.

    Attributes:
        initialized: a tensor (), whether s and b have been set.

    Reference: Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> f = ActNorm(3)
        >>> z = f.inverse(5 + 2 * torch.randn(1000, 3))
        >>> bool(z.mean(0).abs().max() < 1e-5), f.initialized.item()
        (True, True)
    """

    initialized: Tensor

    def __init__(self, features: int | Sequence[int]) -> None:
        super().__init__(features)
        check_vector(self.event_shape)
        channels = self.event_shape[0]
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._seen_initialized = False  # spares later calls the wait for the device

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """exp(s) z + b and H W sum s."""
        s, b = self._like_x(self.log_scale), self._like_x(self.shift)
        return s.exp() * z + b, self._total(self.log_scale, z)

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """exp(-s) (x - b) and -H W sum s."""
        if not self._is_initialized():
            self._initialize(x)
        s, b = self._like_x(self.log_scale), self._like_x(self.shift)
        return (-s).exp() * (x - b), -self._total(self.log_scale, x)

    def initialize(self, x: Tensor) -> None:
        """Set s and b by x (*batch, *event), anew if they have been set before.

        Raises:
            TypeError: x of another dtype.
            ValueError: x by which they cannot be set.
        """
        check_event(x, self.event_shape, self)
        check_like(x, self)
        self._initialize(x.reshape(-1, *self.event_shape))

    def _is_initialized(self) -> bool:
        if not self._seen_initialized and not tracing():
            self._seen_initialized = bool(self.initialized)
        return self._seen_initialized

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        # Parameters that functional_call lends are not the module's own to set.
        if tracing() or not isinstance(self.log_scale, nn.Parameter):
            raise ValueError(
                "ActNorm is not initialised, and cannot be under torch.compile and torch.func's "
                "transforms; call it once on a batch outside of them, or call initialize(x)"
            )
        values = self._by_channel(x.detach())
        self._check_values(values)
        std, mean = torch.std_mean(values, 1, correction=0)
        self.log_scale.copy_(std.log())
        self.shift.copy_(mean)
        self.initialized.fill_(True)
        self._seen_initialized = True

    def _check_values(self, values: Tensor) -> None:
        """Refuse values (C, N) of which a channel has no finite, positive deviation."""
        remedy = "call initialize(x) on a larger batch first"
        if values.shape[1] < 2:
            raise ValueError(
                f"ActNorm cannot be initialised by a batch of {values.shape[1] // self._pixels}: "
                f"channel 0 has {values.shape[1]} values, expected 2 or more; {remedy}"
            )
        low, high = values.aminmax(dim=1)
        for fault, at in (
            ("is not finite", ~(high - low).isfinite()),
            ("is constant", low == high),
        ):
            if at.any():
                c = int(at.nonzero()[0])
                raise ValueError(
                    f"ActNorm cannot be initialised: channel {c} {fault} in this batch, from "
                    f"{float(low[c]):g} to {float(high[c]):g}; {remedy}, or leave the channel out"
                )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_initialized = False  # the flag loaded counts
        if not self.initialized.is_meta:
            self._is_initialized()

    def extra_repr(self) -> str:
        """The shape."""
        return f"{self.event_shape}"


class BatchNorm(_ChannelTransform):
    """Batch normalization as a flow: x -> z normalises each channel.

        z_c = exp(s_c) (x_c - m_c) / sqrt(v_c + eps) + b_c
        log |det dz/dx| = H W sum_c (s_c - log(v_c + eps) / 2)

    In train() mode, x -> z takes m and v of the batch and its pixels, with their gradients, and
    moves the running mean and variance towards them. z -> x always takes the running ones, and
    x -> z does in eval() mode: so only there is one the inverse of the other. This is the one
    transform for which the mode matters.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W); channels are the first
            dimension.
        momentum: of the running averages: new = (1 - momentum) old + momentum batch, with the
            unbiased variance, as in `torch.nn.BatchNorm1d`.
        eps: added to the variance.

    Shapes:
        z, x (*batch, *event); log_det (*batch,). All batch dimensions are one batch.

    Raises:
        TypeError: momentum or eps that are not numbers.
        ValueError: momentum outside (0, 1], eps that is not positive; in train() mode, one value
            for each channel, or a call within `torch.func` transforms.

    Attributes:
        running_mean: (C,), at first 0.
        running_var: (C,), at first 1.

    Reference: Dinh et al., arXiv 1605.08803; Papamakarios et al., arXiv 1705.07057.

    Example:
        >>> f = BatchNorm(3, momentum=1.0)
        >>> x = 5 + 2 * torch.randn(1000, 3)
        >>> z = f.inverse(x)
        >>> torch.allclose(f.eval().inverse(x), z, atol=1e-2)
        True
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, features: int | Sequence[int], momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__(features)
        check_positive("momentum", momentum)
        check_positive("eps", eps)
        if momentum > 1:
            raise ValueError(f"momentum={momentum!r} must be at most 1")
        self.momentum = momentum
        self.eps = eps
        check_vector(self.event_shape)
        channels = self.event_shape[0]
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x by the running mean and variance, and its log-determinant."""
        log_scale = self._log_scale(self.running_var)
        scale, b, m = map(self._like_x, ((-log_scale).exp(), self.shift, self.running_mean))
        return scale * (z - b) + m, -self._total(log_scale, z)

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z by the mean and variance of the batch, or the running ones; its log-determinant."""
        mean, var = self.running_mean, self.running_var
        if self.training and x.shape[0]:
            mean, var = self._of_batch(x)
        log_scale = self._log_scale(var)
        scale, b, m = map(self._like_x, (log_scale.exp(), self.shift, mean))
        return scale * (x - m) + b, self._total(log_scale, x)

    def _log_scale(self, var: Tensor) -> Tensor:
        """log dz/dx (C,)."""
        return self.log_scale - 0.5 * (var + self.eps).log()

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) of a batch; the running ones move towards them."""
        n = x.shape[0] * self._pixels
        if n < 2:
            raise ValueError(
                "BatchNorm in train() mode needs 2 or more values for each channel, got a batch of "
                "1; use eval(), or a larger batch"
            )
        if tracing() and not torch.compiler.is_compiling():
            raise ValueError(
                "BatchNorm in train() mode updates its running averages, which torch.func's "
                "transforms do not allow; use eval()"
            )
        var, mean = torch.var_mean(self._by_channel(x), 1, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return mean, var

    def extra_repr(self) -> str:
        """The shape and the constants."""
        return f"{self.event_shape}, momentum={self.momentum:g}, eps={self.eps:g}"
