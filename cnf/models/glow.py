"""Glow: a multi-scale flow of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_count
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.models.parts import check_squeezes
from cnf.transforms import (
    ActNorm,
    Compose,
    Conv1x1,
    Coupling,
    Inverse,
    Multiscale,
    Squeeze,
    Transform,
)
from cnf.transforms.conditioners import Conditioner

__all__ = ["Glow", "glow_step"]


def glow_step(
    event_shape: Sequence[int],
    hidden: Sequence[int] = (64, 64),
    *,
    context: int = 0,
    activation: str | nn.Module = "relu",
    conditioner: Conditioner | None = None,
    generator: torch.Generator | None = None,
) -> Transform:
    """A step of Glow, from data to base: ActNorm, an invertible 1x1 convolution, a coupling."""
    return Compose(
        Coupling(
            event_shape,
            "channel",
            "affine",
            hidden=hidden,
            context=context,
            activation=activation,
            conditioner=conditioner,
        ),
        Inverse(Conv1x1(event_shape, generator=generator)),
        ActNorm(event_shape),
    )


class Glow(Flow):
    """Glow: squeeze, steps of (ActNorm, 1x1 convolution, affine coupling), factor out half; repeat.

    The data-dependent `ActNorm` layers are set by the first batch whose density is computed.

    Args:
        features: shape of an image (C, H, W); H and W divisible by 2^levels.
        levels: number of scales.
        steps: number of steps at each scale.
        hidden: channels of the hidden layers of each coupling's network.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        conditioner: makes each network, see `Coupling`; None takes convolutions.
        base: base density; None for the standard normal.
        generator: source of the random permutations that the 1x1 convolutions start from.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a shape that is no image's, or whose height or width is not divisible.

    Reference: Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> flow = Glow((1, 8, 8), levels=2, steps=2, hidden=(16, 16))
        >>> flow.log_prob(torch.randn(16, 1, 8, 8)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        features: Sequence[int],
        levels: int = 2,
        steps: int = 4,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        conditioner: Conditioner | None = None,
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        event_shape = event_shape_of(features)
        if len(event_shape) != 3:
            raise ValueError(f"features={features!r} must be the shape of an image (C, H, W)")
        check_count("levels", levels)
        check_count("steps", steps)
        check_squeezes(event_shape, levels, levels)
        stages: list[Transform] = []
        shape = event_shape
        for _ in range(levels):
            squeeze = Squeeze(shape)
            made = [
                glow_step(
                    squeeze.base_shape,
                    hidden,
                    context=context,
                    activation=activation,
                    conditioner=conditioner,
                    generator=generator,
                )
                for _ in range(steps)
            ]
            stages.insert(0, Compose(*made, squeeze))
            channels, height, width = squeeze.base_shape
            shape = (channels // 2, height, width)
        super().__init__(base_for(event_shape, base), Multiscale(*stages))
