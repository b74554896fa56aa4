"""The exponential moving average of the weights, which validation and evaluation look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["moving_average"]


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` whose parameters follow those of `module` slowly.

    After the n-th call of `update_parameters(module)`:

        average <- d average + (1 - d) parameter,    d = min(decay, (1 + n) / (10 + n))

    so that the average forgets the initial weights within the first steps. The first call copies,
    and buffers are always copied. The copy is in evaluation mode.

    Args:
        module: The module to follow.
        decay: In [0, 1); 0 keeps the average equal to the parameters.

    Raises:
        ValueError: `decay` is not in [0, 1).

    Example:
        >>> model = nn.Linear(1, 1)
        >>> ema = moving_average(model, 0.999)
        >>> ema.update_parameters(model)
        >>> bool(ema.module.weight == model.weight)
        True
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
    average = AveragedModel(module, multi_avg_fn=_follow(decay))
    average.n_averaged = torch.zeros((), dtype=torch.long, device="cpu")  # read in every step
    average.eval()
    return average


def _follow(decay: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averages: list[Tensor], parameters: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        d = min(decay, (1 + n) / (10 + n))
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter, 1 - d)

    return update
