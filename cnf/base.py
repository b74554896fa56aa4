"""Base distributions as modules: they move and convert with the flow, and draw from a generator."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, transforms

from cnf.noise import Seeded, draw
from cnf.support import is_bounded, log_density, support_of
from cnf.transforms.inputs import check_shape

__all__ = ["Base", "DistributionBase", "StandardNormal", "as_base", "base_for"]


class Base(nn.Module, ABC):
    """The density that a flow starts from.

    To add one, inherit, and write

    1. `event_shape`, the shape of one sample;
    2. `log_prob(z)`: (*batch, *event) -> (*batch,);
    3. `rsample(shape, generator=None)`: (*shape, *event), differentiable where it can be;
    4. where its density is zero at some z: log_prob of -inf there, and `support`.
    """

    event_shape: tuple[int, ...]

    @property
    def support(self) -> constraints.Constraint | None:
        """Where the density is above zero; None where that is not known."""
        return constraints.independent(constraints.real, len(self.event_shape))

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
        check_shape(z, self.event_shape, "z")
        squares = z.square()
        if self.event_shape:
            squares = squares.sum(tuple(range(-len(self.event_shape), 0)))  # -> (*batch,)
        return -0.5 * (squares + math.prod(self.event_shape) * math.log(2 * math.pi))

    def rsample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples (*shape, *event)."""
        return draw(torch.randn, (*shape, *self.event_shape), like=self.like, generator=generator)


class DistributionBase(Base):
    """Any torch distribution as a base; its tensors are buffers: they move, convert and are saved.

    They are no parameters: to train a base, write a `Base` that holds its own.

    Args:
        distribution: with an empty batch shape: wrap in `torch.distributions.Independent` what
            has one. Its density is zero, log_prob -inf, outside of its support, whether torch
            validates arguments or not.

    Raises:
        TypeError: not a torch distribution.
        ValueError: a batch shape that is not empty; samples of no dimension, such as (0,).

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
        self.event_shape = tuple(distribution.event_shape)
        self.bounded = is_bounded(distribution)
        if 0 in self.event_shape:
            raise ValueError(f"base has event_shape {self.event_shape}, expected positive integers")
        tensors = {id(t): t for _, owner in _owners(distribution) for t in _tensors(owner).values()}
        self._distribution = copy.deepcopy(distribution, tensors)  # a copy with the same tensors
        self._names = [  # of each object in it, its tensors and the buffers that hold them
            (owner, {key: f"{path}{key}" for key in _tensors(owner)})
            for path, owner in _owners(self._distribution)
        ]
        for owner, names in self._names:
            if isinstance(owner, Distribution):
                owner._validate_args = False  # `log_density` says what lies outside
            for key, name in names.items():
                self.register_buffer(name, vars(owner)[key].contiguous())

    @property
    def distribution(self) -> Distribution:
        """The distribution, with the buffers as they are now."""
        for owner, names in self._names:
            for key in _tensors(owner).keys() - names:
                vars(owner).pop(key, None)  # what it has cached may be of another device
            vars(owner).update({key: getattr(self, name) for key, name in names.items()})
        return self._distribution

    @property
    def support(self) -> constraints.Constraint | None:
        """The distribution's."""
        return support_of(self.distribution)

    def extra_repr(self) -> str:
        """The distribution, for `print`."""
        return repr(self.distribution)

    def log_prob(self, z: Tensor, rounding: float | None = None) -> Tensor:
        """Log-density (*batch,) of z (*batch, *event); -inf outside the support.

        Args:
            z: where.
            rounding: the error that z has from an ODE solve, in units of the width of an interval,
                or of the standard deviation on a half-line; None for that of floating point. A z
                that lies outside by less is read as its mirror image inside: without it a flow
                would give some of its own samples the density zero.
        """
        check_shape(z, self.event_shape, "z")
        if not z.numel():  # which torch's Independent cannot sum
            return z.sum(tuple(range(-len(self.event_shape), 0))) if self.event_shape else z
        if not self.bounded:
            return self.distribution.log_prob(z)
        return log_density(self.distribution, z, rounding)

    def rsample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples (*shape, *event), by a generator seeded from `generator` on the own device."""
        distribution = self.distribution
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
        if generator is None or device.type == "meta":
            return draw(shape)
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        with Seeded(torch.Generator(device).manual_seed(int(seed))):
            return draw(shape)


def _tensors(owner: object) -> dict[str, Tensor]:
    """The tensors that an object holds itself."""
    return {key: value for key, value in list(vars(owner).items()) if isinstance(value, Tensor)}


def _owners(distribution: Distribution) -> list[tuple[str, object]]:
    """A distribution and the distributions and transforms it is made of, each with its path."""
    found: dict[int, tuple[str, object]] = {}
    queue: list[tuple[str, object]] = [("", distribution)]
    while queue:
        path, owner = queue.pop()
        if id(owner) in found:  # a transform and its inverse hold each other
            continue
        found[id(owner)] = (path, owner)
        for key, value in vars(owner).items():
            for i, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                if isinstance(part, (Distribution, transforms.Transform)):
                    queue.append((f"{path}{key}_{i}_", part))
    return list(found.values())


def as_base(base: Base | Distribution) -> Base:
    """A base module as it is, a torch distribution wrapped in one."""
    return base if isinstance(base, Base) else DistributionBase(base)


def base_for(event_shape: tuple[int, ...], base: Base | Distribution | None) -> Base:
    """The base density of a model: the standard normal where none is given.

    Raises:
        ValueError: a base of another shape.
    """
    made = StandardNormal(*event_shape) if base is None else as_base(base)
    if made.event_shape != event_shape:
        raise ValueError(
            f"base has event_shape {made.event_shape}, expected features={event_shape}"
        )
    return made
