"""FFJORD's multi-scale architecture for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_count
from cnf.divergence import Divergence
from cnf.fields import ConvField
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.models.ffjord import cnf_blocks
from cnf.models.parts import check_squeezes
from cnf.ode import Solver, TorchDiffEq
from cnf.transforms import Compose, Multiscale, Squeeze, Transform
from cnf.transforms.times import Time

__all__ = ["MultiscaleFFJORD"]

FFJORDS_FIELD = partial(ConvField, time="concat")


class MultiscaleFFJORD(Flow):
    """FFJORD for images: at each scale CNFs, a squeeze, CNFs; then half of the channels go.

        scale (C, H, W), data to base:  blocks CNFs, squeeze to (4 C, H/2, W/2), blocks CNFs,
                                        factor out half; (2 C, H/2, W/2) go on to the next scale
        the last scale:                 blocks CNFs

    Args:
        features: shape of an image (C, H, W); H and W divisible by 2^(levels - 1).
        hidden: channels of the hidden layers of each field. With one or two of them `ConvField` has
            its exact trace in closed form; FFJORD has three, (64, 64, 64).
        levels: number of scales; None for one more than there are squeezes to a side of 4 or more,
            as FFJORD has: 3 for 28 x 28, 4 for 32 x 32.
        blocks: number of CNFs before and after each squeeze.
        context: number of context features, 0 for none.
        divergence: "exact", "hutchinson", or a `Divergence`; None for the exact one where the field
            has a closed form, and Hutchinson's elsewhere.
        solver: the choices of each solve; None for `Solver()`.
        field: what makes a field, called as field(shape, hidden, context=..., **options); the
            default is `ConvField` with time="concat", FFJORD's layers.
        base: base density; None for the standard normal.
        times: (base, data) times of each CNF; an `nn.Parameter` () is learned, by each for itself.
        options: passed to `field`, such as activation="softplus", time="concatsquash".

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a shape that is no image's, or cannot be squeezed so often; a size that is not
            positive, or a choice that is not known.

    Reference: Grathwohl et al., arXiv 1810.01367, section 4.2 and appendix B.

    Example:
        >>> import torch
        >>> flow = MultiscaleFFJORD((1, 8, 8), hidden=(16, 16))
        >>> flow.log_prob(torch.randn(4, 1, 8, 8)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        features: Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        levels: int | None = None,
        blocks: int = 2,
        context: int = 0,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        field: Callable[..., nn.Module] = FFJORDS_FIELD,
        base: Base | Distribution | None = None,
        times: tuple[Time, Time] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        event_shape = event_shape_of(features)
        if len(event_shape) != 3:
            raise ValueError(f"features={features!r} must be the shape of an image (C, H, W)")
        if levels is None:
            levels = _levels_of(event_shape)
        check_count("levels", levels)
        check_squeezes(event_shape, levels, levels - 1)

        def cnfs(shape: tuple[int, ...]) -> list[Transform]:
            return cnf_blocks(
                shape,
                hidden,
                blocks=blocks,
                context=context,
                divergence=divergence,
                solver=solver,
                field=field,
                times=times,
                **options,
            )

        stages: list[Transform] = []
        shape = event_shape
        for _ in range(levels - 1):
            squeeze = Squeeze(shape)
            stages.insert(0, Compose(*cnfs(squeeze.base_shape), squeeze, *cnfs(shape)))
            channels, height, width = squeeze.base_shape
            shape = (channels // 2, height, width)
        stages.insert(0, Compose(*cnfs(shape)))
        super().__init__(base_for(event_shape, base), Multiscale(*stages))


def _levels_of(shape: tuple[int, ...]) -> int:
    """One, and one more for each squeeze to sides of 4 or more."""
    side, other = sorted(shape[1:])
    levels = 1
    while side >= 8 and side % 2 == 0 and other % 2 == 0:
        side, other, levels = side // 2, other // 2, levels + 1
    return levels
