"""Multi-scale architectures: squeezing pixels into channels, and factoring dimensions out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.fields.base import event_shape_of
from cnf.transforms.base import (
    Choices,
    Compose,
    Transform,
    check_choices,
    check_ranks,
    check_real,
    over_samples,
)
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.inputs import check_event, check_vector

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Multiscale", "Split", "Squeeze"]


class Squeeze(DiscreteTransform):
    """Blocks of 2 x 2 pixels as channels: data (C, H, W), base (4 C, H/2, W/2).

    `inverse` squeezes, `forward` unfolds; the log-determinant is zero.

    Args:
        features: shape of a data sample, (C, H, W), with H and W even.
        order: of the channels. "channel" puts the pixels of a block side by side, channel by
            channel, as `torch.nn.PixelUnshuffle` does. "checkerboard" puts first, for all channels,
            the two pixels on the diagonal of each block, then the two others: so the halves of the
            channels are the two colours of a checkerboard, as in RealNVP.

    Shapes:
        x (*batch, C, H, W); z (*batch, 4 C, H/2, W/2); log_det (*batch,).

    Raises:
        ValueError: another rank than (C, H, W), an odd height or width, an unknown order.

    Reference: Dinh et al., arXiv 1605.08803.

    Example:
        >>> f = Squeeze((1, 2, 2))
        >>> f.inverse(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).flatten()
        tensor([0., 1., 2., 3.])
    """

    def __init__(self, features: Sequence[int], order: str = "channel") -> None:
        shape = event_shape_of(features)
        check_choice("order", order, ("channel", "checkerboard"))
        if len(shape) != 3:
            raise ValueError(f"features={shape} must be the shape of an image, (C, H, W)")
        channels, height, width = shape
        for name, size in (("height", height), ("width", width)):
            if size % 2:
                raise ValueError(
                    f"features={shape} cannot be squeezed: {name} {size} not divisible by 2; pad "
                    "or crop the images"
                )
        super().__init__(shape, base_shape=(4 * channels, height // 2, width // 2))
        self.order = order

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) and zero (B,)."""
        channels, height, width = self.event_shape
        if self.order == "channel":
            blocks = z.reshape(z.shape[0], channels, 4, height // 2, width // 2)
        else:
            a, d, b, c = z.reshape(z.shape[0], 4, channels, height // 2, width // 2).unbind(1)
            blocks = torch.stack((a, b, c, d), 2)
        blocks = blocks.reshape(z.shape[0], channels, 2, 2, height // 2, width // 2)
        x = blocks.permute(0, 1, 4, 2, 5, 3).reshape(z.shape[0], *self.event_shape)
        return x, z.new_zeros(z.shape[0])

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, 4 C, H/2, W/2) and zero (B,)."""
        channels, height, width = self.event_shape
        blocks = x.reshape(x.shape[0], channels, height // 2, 2, width // 2, 2)
        blocks = blocks.permute(0, 1, 3, 5, 2, 4)  # (B, C, 2, 2, H/2, W/2)
        if self.order == "checkerboard":
            (a, b), (c, d) = (row.unbind(2) for row in blocks.unbind(2))
            blocks = torch.stack((a, d, b, c), 1)
        return blocks.reshape(x.shape[0], *self.base_shape), x.new_zeros(x.shape[0])

    def extra_repr(self) -> str:
        """The shape and the order."""
        return f"{self.event_shape}, order={self.order!r}"


class Split(Transform):
    """A transform of the first half of a sample, which leaves the other half as it is.

        x = (f(z_a), z_b),    log |det dx/dz| = log |det df/dz_a|

    On the way to the base, x_b is factored out: it is Gaussian as it stands, and f goes on with
    x_a alone. Halves are of the first dimension of a sample: of channels, for images; the first is
    the larger one where their number is odd. z has the shape of x: where the base samples of f have
    another shape than its data samples, they are reshaped, which a base of independent, equal
    components does not notice.

    Args:
        transform: f, of any kind; context and choices go to it.
        features: dimensions of a sample, D, or its shape, such as (C, H, W).

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        TypeError: not a Transform.
        ValueError: one channel alone, or a transform of samples of another shape than the half's.

    Reference: Dinh et al., arXiv 1605.08803.

    Example:
        >>> from cnf.transforms.linear import Linear
        >>> f = Split(Linear(2), 4)
        >>> z = torch.randn(10, 4)
        >>> torch.equal(f.forward(z)[:, 2:], z[:, 2:])
        True
    """

    event_shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    def __init__(self, transform: Transform, features: int | Sequence[int]) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a Transform, got {type(transform).__name__}")
        check_real("transform", transform, "put it behind all others, in a Compose")
        self.event_shape = self.base_shape = event_shape_of(features)
        check_vector(self.event_shape)
        n, *others = self.event_shape
        if n == 1:
            raise ValueError(
                f"features={self.event_shape} cannot be split: its first dimension is 1; put a "
                "Squeeze before it, or leave the split out"
            )
        self.sizes = (n - n // 2, n // 2)
        self.first_shape = (self.sizes[0], *others)
        if transform.event_shape not in (None, self.first_shape):
            raise ValueError(
                f"transform has the event shape {transform.event_shape}, but the first half of "
                f"samples of shape {self.event_shape} has the shape {self.first_shape}"
            )
        check_ranks([transform], self.first_shape)
        _check_size("transform", transform, self.first_shape)
        self.transform = transform

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether the transform within takes context."""
        return self.transform.takes_context

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        """Whether the transform within is."""
        return self.transform.bounded

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x = (f(z_a), z_b) and log |det df/dz_a|."""
        a, b = self._halves(z, choices)
        a = _reshaped(a, self.first_shape, self.transform.base_shape)
        a, log_det = self.transform.forward_and_log_det(a, context, **choices)
        return self._joined(a, b), over_samples(log_det, b.ndim - len(self.event_shape))

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z = (f^-1(x_a), x_b) and log |det df^-1/dx_a|."""
        a, b = self._halves(x, choices)
        a, log_det = self.transform.inverse_and_log_det(a, context, **choices)
        a = _reshaped(a, self.transform.base_shape, self.first_shape)
        return self._joined(a, b), over_samples(log_det, b.ndim - len(self.event_shape))

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x = (f(z_a), z_b), without the log-determinant."""
        a, b = self._halves(z, choices)
        a = _reshaped(a, self.first_shape, self.transform.base_shape)
        return self._joined(self.transform.forward(a, context, **choices), b)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z = (f^-1(x_a), x_b), without the log-determinant."""
        a, b = self._halves(x, choices)
        a = self.transform.inverse(a, context, **choices)
        return self._joined(_reshaped(a, self.transform.base_shape, self.first_shape), b)

    def _halves(self, x: Tensor, choices: Choices) -> tuple[Tensor, ...]:
        check_choices(choices)
        check_event(x, self.event_shape, self)
        return x.split(self.sizes, -len(self.event_shape))

    def _joined(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), -len(self.event_shape))

    def extra_repr(self) -> str:
        """The shape."""
        return f"{self.event_shape}"


class Multiscale(Transform):
    """A multi-scale architecture: after each stage, half of the dimensions are factored out.

        f = s_K o (s_{K-1} o (... (s_1, id) ...), id)

    On the way to the base, the last stage s_K sees all dimensions; the second half of what it gives
    goes to the base as it is, and the first half through the stage before it; and so on (`Split`).
    z has the shape of x: the base samples of the stages, in a row. So each stage need not work on
    the dimensions that stages after it have made Gaussian, which saves time and memory.

    A stage of an image usually ends, on the data side, in a `Squeeze`. Glow, for images (3, 32, 32)
    with three scales and K steps each, is

        step(shape) = Compose(Coupling(shape, "channel"), Inverse(Conv1x1(shape)), ActNorm(shape))
        stage(shape) = Compose(*K steps of the squeezed shape, Squeeze(shape))
        Multiscale(stage((12, 8, 8)), stage((6, 16, 16)), stage((3, 32, 32)))

    where (3, 32, 32), squeezed, is (12, 16, 16), of which (6, 16, 16) go on, and so on.

    Args:
        stages: s_1, ..., s_K, in the order from base to data; at least one, of any kind of
            transform. Context and choices go to each.

    Shapes:
        z, x (*batch, *event) with the last stage's event shape; log_det (*batch,).

    Raises:
        TypeError: an argument that is not a Transform.
        ValueError: no stage, or stages whose shapes do not fit; in a call, x of a wrong shape, or
            context that no stage takes.

    Reference: Dinh et al., arXiv 1605.08803; Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> from cnf.transforms.linear import Conv1x1
        >>> def stage(c, h, w):
        ...     return Compose(Conv1x1((4 * c, h // 2, w // 2)), Squeeze((c, h, w)))
        >>> f = Multiscale(stage(2, 4, 4), stage(1, 8, 8))
        >>> f.inverse(torch.randn(10, 1, 8, 8)).shape
        torch.Size([10, 1, 8, 8])
    """

    event_shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    def __init__(self, *stages: Transform) -> None:
        super().__init__()
        if not stages:
            raise ValueError("Multiscale needs at least one stage")
        for i, stage in enumerate(stages):
            if not isinstance(stage, Transform):
                raise TypeError(f"stages[{i}] must be a Transform, got {type(stage).__name__}")
            check_real(
                f"stages[{i}]", stage, "use Compose(Multiscale(...), ...) with it at the end"
            )
        shape = stages[-1].event_shape
        if shape is None:
            raise ValueError(f"{_named(stages, -1)} has no fixed event shape; build it with one")
        _check_size(_named(stages, -1), stages[-1], shape)
        self.event_shape = self.base_shape = shape
        self.transform = _nested(stages)

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether a stage takes context."""
        return self.transform.takes_context

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        """Whether a stage is."""
        return self.transform.bounded

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x = f(z) and log |det df/dz|."""
        self._check(z, choices)
        z = _reshaped(z, self.base_shape, self.transform.base_shape)
        return self.transform.forward_and_log_det(z, context, **choices)

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and log |det df^-1/dx|."""
        self._check(x, choices)
        z, log_det = self.transform.inverse_and_log_det(x, context, **choices)
        return _reshaped(z, self.transform.base_shape, self.base_shape), log_det

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x = f(z), without the log-determinant."""
        self._check(z, choices)
        z = _reshaped(z, self.base_shape, self.transform.base_shape)
        return self.transform.forward(z, context, **choices)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z = f^-1(x), without the log-determinant."""
        self._check(x, choices)
        z = self.transform.inverse(x, context, **choices)
        return _reshaped(z, self.transform.base_shape, self.base_shape)

    def _check(self, x: Tensor, choices: Choices) -> None:
        check_choices(choices)
        check_event(x, self.event_shape, self)


def _nested(stages: Sequence[Transform]) -> Transform:
    """The stages, each applied to the first half of what the one after it gives."""
    nested = stages[0]
    for i, stage in enumerate(stages[1:], 1):
        if stage.base_shape is None:
            raise ValueError(f"{_named(stages, i)} has no fixed base shape; build it with one")
        try:
            nested = Compose(Split(nested, stage.base_shape), stage)
        except ValueError as error:
            raise ValueError(
                f"{_named(stages, i - 1)} does not fit the half of the base samples of "
                f"{_named(stages, i)} that goes on to it: {error}"
            ) from None
    return nested


def _named(stages: Sequence[Transform], i: int) -> str:
    i %= len(stages)
    return f"stages[{i}] (a {type(stages[i]).__name__})"


def _check_size(name: str, transform: Transform, shape: tuple[int, ...]) -> None:
    """Refuse a transform whose base samples have more or fewer numbers than the shape."""
    base = transform.base_shape
    if base is not None and math.prod(base) != math.prod(shape):
        raise ValueError(
            f"{name} has the base shape {base}, of another number of dimensions than {shape}; it "
            "must keep their number"
        )


def _reshaped(x: Tensor, shape: tuple[int, ...] | None, to: tuple[int, ...] | None) -> Tensor:
    """Samples of one shape in another, whatever the batch dimensions; None is any shape."""
    if shape is None or to is None or to == shape:
        return x
    return x.reshape(*x.shape[: x.ndim - len(shape)], *to)
