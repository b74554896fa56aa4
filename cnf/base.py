"""Base distributions as modules: they move and convert with the flow, and draw from a generator."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["Base", "DistributionBase", "StandardNormal", "as_base"]


class Base(nn.Module, ABC):
    """The density that a flow starts from.

    To add one, inherit, and write

    1. `event_shape`, the shape of one sample;
    2. `log_prob(z)`: (*batch, *event) -> (*batch,);
    3. `rsample(shape, generator=None)`: (*shape, *event), differentiable where it can be.
    """

    event_shape: tuple[int, ...]

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (*batch,) of z (*batch, *event)."""

    @abstractmethod
    def rsample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples (*shape, *event)."""


class StandardNormal(Base):
    """The standard normal density.

        log p(z) = -|z|^2 / 2 - D log(2 pi) / 2

    Args:
        event_shape: shape of one sample: `StandardNormal(2)`, `StandardNormal(1, 28, 28)`, or
            nothing for scalars.

    Raises:
        ValueError: a size that is not a positive integer.

    Example:
        >>> base = StandardNormal(2)
        >>> base.log_prob(torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """

    like: Tensor

    def __init__(self, *event_shape: int) -> None:
        super().__init__()
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in event_shape):
            raise ValueError(f"event_shape={event_shape!r} must be positive integers")
        self.event_shape = event_shape
        self.register_buffer("like", torch.zeros(()), persistent=False)  # dtype and device

    def extra_repr(self) -> str:
        """The event shape, for `print`."""
        return ", ".join(map(str, self.event_shape))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (*batch,) of z (*batch, *event)."""
        n = z.ndim - len(self.event_shape)
        squares = z.square().unsqueeze(-1).flatten(n).sum(-1)  # (*batch, *event) -> (*batch,)
        return -0.5 * (squares + math.prod(self.event_shape) * math.log(2 * math.pi))

    def rsample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples (*shape, *event)."""
        device = self.like.device if generator is None else generator.device
        full = (*shape, *self.event_shape)
        z = torch.randn(full, dtype=self.like.dtype, device=device, generator=generator)
        return z.to(self.like.device)


class DistributionBase(Base):
    """Any torch distribution as a base; its tensors move and convert with the module.

    They are no parameters: to train a base, write a `Base` that holds its own.

    Args:
        distribution: with an empty batch shape: wrap in `torch.distributions.Independent` what
            has one.

    Raises:
        TypeError: not a torch distribution.
        ValueError: a batch shape that is not empty.

    Example:
        >>> from torch.distributions import Independent, Laplace
        >>> base = DistributionBase(Independent(Laplace(torch.zeros(2), torch.ones(2)), 1))
        >>> base.event_shape, base.log_prob(torch.zeros(1, 2))
        ((2,), tensor([-1.3863]))
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"base must be a cnf base module or a torch distribution, "
                f"got {type(distribution).__name__}"
            )
        if distribution.batch_shape:
            raise ValueError(
                f"base has batch_shape {tuple(distribution.batch_shape)}, expected (); make it "
                f"part of the event with Independent(base, {len(distribution.batch_shape)})"
            )
        self.distribution = distribution
        self.event_shape = tuple(distribution.event_shape)

    def extra_repr(self) -> str:
        """The distribution, for `print`."""
        return repr(self.distribution)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (*batch,) of z (*batch, *event)."""
        return self.distribution.log_prob(z)

    def rsample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples (*shape, *event); torch distributions draw from the global generator, which is
        seeded from `generator` for the draw and put back after it.
        """
        draw = (
            self.distribution.rsample if self.distribution.has_rsample else self.distribution.sample
        )
        if generator is None:
            return draw(shape)
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            return draw(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistributionBase:
        super()._apply(fn, recurse)
        self.distribution = _map_tensors(self.distribution, fn)
        return self


def _map_tensors(distribution: Distribution, fn: Callable[[Tensor], Tensor]) -> Distribution:
    """A copy of a distribution with fn applied to every tensor in it, and in those within it."""
    new = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor):
            vars(new)[name] = fn(value)
        elif isinstance(value, Distribution):
            vars(new)[name] = _map_tensors(value, fn)
    return new


def as_base(base: Base | Distribution) -> Base:
    """A base module as it is, a torch distribution wrapped in one."""
    return base if isinstance(base, Base) else DistributionBase(base)
