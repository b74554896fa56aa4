"""At which times of the path flow matching looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import check_number, check_positive
from cnf.noise import draw
from cnf.objectives.choices import as_function

__all__ = [
    "TIME_SAMPLING",
    "LogUniform",
    "LogitNormal",
    "Stratified",
    "TimeSampling",
    "Uniform",
    "as_sampling",
]

TimeSampling = Callable[..., Tensor]
"""(n, like=, generator=) -> times (n,) in [0, 1], of the dtype and device of `like`."""


@dataclass(frozen=True)
class Uniform:
    """Independent times, uniform on [0, 1).

    Example:
        >>> Uniform()(3, like=torch.zeros(()), generator=None).shape
        torch.Size([3])
    """

    def __call__(self, n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Times (n,)."""
        return draw(torch.rand, (n,), like=like, generator=generator)


@dataclass(frozen=True)
class Stratified:
    """Uniform times, one in each of n equal parts of [0, 1), in random order.

    Each time is uniform, so the loss is unbiased; its mean over a batch has less noise.

    Example:
        >>> t = Stratified()(4, like=torch.zeros(()), generator=None)
        >>> (4 * t).floor().sort().values.tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __call__(self, n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Times (n,)."""
        inside = draw(torch.rand, (n,), like=like, generator=generator)
        # By the ranks of random numbers: rows may come in an order, and times must not follow it.
        order = draw(torch.rand, (n,), like=like, generator=generator).argsort()
        return ((order + inside) / max(n, 1)).clamp(max=1.0)


@dataclass(frozen=True)
class LogitNormal:
    """Times whose logit is normal: more of them in the middle of the path, fewer at its ends.

        t = sigmoid(mean + std e),    e ~ N(0, 1)

    The loss weighs the times so too. Ends that are seen seldom cost likelihood.

    Args:
        mean: of the logit; above 0, times nearer to the data.
        std: of the logit.

    Raises:
        ValueError: a std that is not positive.

    Reference: Esser et al., arXiv 2403.03206.

    Example:
        >>> LogitNormal(std=2.0)(3, like=torch.zeros(()), generator=None).shape
        torch.Size([3])
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_positive("std", self.std)

    def __call__(self, n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Times (n,)."""
        e = draw(torch.randn, (n,), like=like, generator=generator)
        return torch.sigmoid(self.mean + self.std * e)


@dataclass(frozen=True)
class LogUniform:
    """Times near the data: the distance from it, 1 - t + epsilon, is log-uniform; stratified.

        p(t) = 1 / ((1 - t + epsilon) log((1 + epsilon) / epsilon))

    The velocity near the data decides the fine structure of a density, and its likelihood: for the
    linear path and a Gaussian base an error of the velocity costs the likelihood of the diffusion
    of the same marginals t / (1 - t) times its square. Uniform times see little of it.

    Args:
        epsilon: the scale, as a part of the path, below which times are uniform again: about that
            of the data's finest structure by the base's.

    Raises:
        ValueError: an epsilon that is not positive.

    Reference: the weight is that of Song et al., arXiv 2101.09258.

    Example:
        >>> t = LogUniform(0.03)(1000, like=torch.zeros(()), generator=None)
        >>> bool(t.median() > 0.75)
        True
    """

    epsilon: float = 0.03

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)

    def __call__(self, n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Times (n,)."""
        u = Stratified()(n, like=like, generator=generator)
        far = 1 + self.epsilon
        return (far - far * (self.epsilon / far) ** u).clamp(0.0, 1.0)


TIME_SAMPLING: dict[str, Callable[[], TimeSampling]] = {
    "stratified": Stratified,
    "uniform": Uniform,
    "logit-normal": LogitNormal,
    "log-uniform": LogUniform,
}
"""Every way that has a name."""


def as_sampling(sampling: str | TimeSampling) -> TimeSampling:
    """The way of that name, or the function itself; see `as_function`."""
    form = "(n, like=, generator=) -> times (n,)"
    return as_function("time_sampling", sampling, TIME_SAMPLING, form)
