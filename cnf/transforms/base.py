"""`Transform`: an invertible map that returns its value and its log-determinant together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from cnf.checks import tracing
from cnf.support import is_real

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cnf.divergence import Divergence
    from cnf.ode import Solver, TorchDiffEq
    from cnf.regularizers import Regularizer

__all__ = [
    "Choices",
    "Compose",
    "Inverse",
    "Transform",
    "check_choices",
    "check_no_context",
    "check_ranks",
    "check_real",
    "over_samples",
]


class Choices(TypedDict, total=False):
    """What one call may choose anew for every transform it reaches; absent means as built.

    Attributes:
        divergence: how div f is computed.
        solver: the choices of the solve.
        generator: source of noise: the estimator's, dequantization's.
        variances: a list to which every estimated log-determinant adds its variance (*batch,).
        regularizers: what every `CNF` integrates along its path, beside a log-determinant.
        integrals: a list to which every `CNF` adds these integrals (*batch, n).
        steer: every `CNF` ends at a time drawn uniformly within this distance of its end.
    """

    divergence: str | Divergence
    solver: Solver | TorchDiffEq
    generator: torch.Generator
    variances: list[Tensor]
    regularizers: tuple[Regularizer, ...]
    integrals: list[Tensor]
    steer: float


def check_choices(choices: Choices) -> None:
    """Refuse keywords that are no choices.

    Raises:
        TypeError: with the names of those that are.
    """
    if choices and (unknown := sorted(choices.keys() - Choices.__annotations__.keys())):
        known = ", ".join(Choices.__annotations__)
        raise TypeError(f"{', '.join(unknown)} cannot be chosen in a call; choose {known}")


def check_no_context(transform: Transform, context: Tensor | None) -> None:
    """Refuse context for a transform that takes none."""
    if context is not None:
        raise ValueError(
            f"context was given, but this {type(transform).__name__} takes none; leave it out"
        )


def check_real(name: str, transform: Transform, remedy: str) -> None:
    """Refuse a transform of integers where only one of real numbers can stand."""
    if transform.quantized:
        raise ValueError(
            f"{name}, a {type(transform).__name__}, has samples of integers, which only the end of "
            f"a flow can have; {remedy}"
        )


def over_samples(values: Tensor, batch_dims: int) -> Tensor:
    """The sum over all dimensions behind the first few, where there are any."""
    return values.flatten(batch_dims).sum(-1) if values.ndim > batch_dims else values


class Transform(nn.Module, ABC):
    """An invertible, differentiable map x = f(z), from base to data.

    To add a kind with samples of a fixed shape, inherit from `DiscreteTransform`, which checks its
    input. To add any other, inherit from here, and

    1. write `forward_and_log_det(z, context=None, **choices)`: x and log |det df/dz|;
    2. write `inverse_and_log_det(x, context=None, **choices)`: z and log |det df^-1/dx|;
    3. shapes: z, x (*batch, *event), log-determinants (*batch,), context (*batch, C);
    4. `forward` and `inverse`, values only, follow; override them where the log-determinant costs;
    5. `choices` concern transforms that solve ODEs or draw noise: others ignore them, containers
       pass them on;
    6. one that acts on each number by itself, whatever the shape, may return log-determinants of
       each, (*batch, *event): `Compose` and `Flow` sum them over samples;
    7. where no z is mapped to some x, set `bounded`, and let `inverse_and_log_det` return a finite
       z and the log-determinant -inf for them: so the density of a flow is zero there.

    Assumed, not checked: each direction is the inverse of the other.

    Attributes:
        event_shape: shape of a data sample x, where it is fixed, else None.
        base_shape: shape of a base sample z, where it is fixed, else None.
        event_dims: number of dimensions of a sample, where it is fixed without its shape being so.
        takes_context: whether it can be given context. Containers hand context to the transforms
            that take it, and leave it out for the others.
        levels: where data samples are integers, how many values they have, see
            `UniformDequantization`; else None.
        bounded: whether there are x that no z is mapped to.
    """

    event_shape: tuple[int, ...] | None = None
    base_shape: tuple[int, ...] | None = None
    event_dims: int | None = None
    takes_context: bool = True
    levels: int | tuple[int | None, ...] | None = None
    bounded: bool = False

    @property
    def quantized(self) -> bool:
        """Whether data samples are integers, in some columns at least."""
        return self.levels is not None

    @abstractmethod
    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x = f(z) (*batch, *event) and log |det df/dz| (*batch,)."""

    @abstractmethod
    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) (*batch, *event) and log |det df^-1/dx| (*batch,)."""

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x = f(z), without the log-determinant."""
        return self.forward_and_log_det(z, context, **choices)[0]

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z = f^-1(x), without the log-determinant; x that no z is mapped to is refused."""
        return only_mapped(self, x, *self.inverse_and_log_det(x, context, **choices))

    def codomain(self, event_shape: tuple[int, ...]) -> constraints.Constraint | None:
        """The samples that real numbers are mapped to; None where that is no simple set.

        Args:
            event_shape: shape of a data sample.
        """
        if any(isinstance(part, Transform) and part.bounded for part in self.modules()):
            return None
        return constraints.independent(constraints.real, len(event_shape))


def only_mapped(transform: Transform, x: Tensor, z: Tensor, log_det: Tensor) -> Tensor:
    """z of x, where nothing else can say that no z is mapped to some x.

    Raises:
        ValueError: such x; where values cannot be looked at, z is NaN for them.
    """
    if not transform.bounded:
        return z
    outside = log_det == -torch.inf
    if not (x.is_meta or tracing()) and bool(outside.any()):
        seen = x.detach()[outside].double()
        name = type(transform).__name__ if len(list(transform.modules())) > 1 else transform
        raise ValueError(
            f"x has {int(outside.sum())} values outside of what {name} maps to: they lie from "
            f"{seen.min().item():.6g} to {seen.max().item():.6g}; no z is mapped there, remove "
            "such samples"
        )
    return z.masked_fill(
        outside.reshape((*outside.shape, *[1] * (z.ndim - outside.ndim))), torch.nan
    )


class Compose(Transform):
    """Several transforms, one after the other: f = f_K o ... o f_1.

        log |det df/dz| = sum_k log |det df_k/dz_{k-1}|

    Context goes to those of them that take it.

    Args:
        transforms: f_1, ..., f_K, in the order from base to data; at least one.

    Raises:
        TypeError: an argument that is not a Transform.
        ValueError: no argument, neighbours of different shapes, or a dequantization that is not the
            last; in a call, context that none of them takes.

    Example:
        >>> import cnf
        >>> steps = [cnf.CNF(cnf.MLPField(2)) for _ in range(2)]
        >>> x, log_det = Compose(*steps).forward_and_log_det(torch.randn(5, 2))
        >>> x.shape, log_det.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("Compose needs at least one transform")
        for i, transform in enumerate(transforms):
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"transforms[{i}] must be a Transform, got {type(transform).__name__}"
                )
        for i, transform in enumerate(transforms[:-1]):
            check_real(f"transforms[{i}]", transform, "let it be the last")
        self.transforms = nn.ModuleList(transforms)
        self.base_shape, self.event_shape = _shapes_of(transforms)
        self.event_dims = next((t.event_dims for t in transforms if t.event_dims is not None), None)

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether one of them takes context."""
        return any(transform.takes_context for transform in self)

    @property
    def levels(self) -> int | tuple[int | None, ...] | None:  # type: ignore[override]
        """Those of the last of them."""
        return self[-1].levels

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(transform.bounded for transform in self)

    def codomain(self, event_shape: tuple[int, ...]) -> constraints.Constraint | None:
        """That of the last of them, where the others map to all real numbers, or for integers."""
        *others, last = self
        known = last.quantized or all(is_real(other.codomain(event_shape)) for other in others)
        return last.codomain(event_shape) if known else None

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.transforms)

    def __getitem__(self, i: int) -> Transform:
        return self.transforms[i]  # type: ignore[return-value]

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """x = f(z) and the sum of the log-determinants."""
        (first, own), *rest = self._with_context(context)
        x, log_det = first.forward_and_log_det(z, own, **choices)
        n = self._batch_dims(z, self.base_shape or self.event_shape)
        log_det = over_samples(log_det, n)
        for transform, own in rest:
            x, more = transform.forward_and_log_det(x, own, **choices)
            log_det = log_det + over_samples(more, n)
        return x, log_det

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """z = f^-1(x) and the sum of the log-determinants."""
        *rest, (last, own) = self._with_context(context)
        z, log_det = last.inverse_and_log_det(x, own, **choices)
        n = self._batch_dims(x, self.event_shape or self.base_shape)
        log_det = over_samples(log_det, n)
        for transform, own in reversed(rest):
            z, more = transform.inverse_and_log_det(z, own, **choices)
            log_det = log_det + over_samples(more, n)
        return z, log_det

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x = f(z), without the log-determinant."""
        for transform, own in self._with_context(context):
            z = transform.forward(z, own, **choices)
        return z

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z = f^-1(x), without the log-determinant."""
        for transform, own in reversed(self._with_context(context)):
            x = transform.inverse(x, own, **choices)
        return x

    def _batch_dims(self, x: Tensor, event_shape: tuple[int, ...] | None) -> int:
        """How many dimensions of x are the batch's: all, where samples may have any shape."""
        dims = self.event_dims if event_shape is None else len(event_shape)
        return x.ndim - (dims or 0)

    def _with_context(self, context: Tensor | None) -> list[tuple[Transform, Tensor | None]]:
        """Each transform and the context for it."""
        if context is not None and not self.takes_context:
            raise ValueError(
                f"context was given, but none of the {len(self)} transforms takes one; leave "
                "context out, or build one of them with context"
            )
        return [(t, context if t.takes_context else None) for t in self]


def _shapes_of(
    transforms: Sequence[Transform],
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The shape of a base and of a data sample, where known.

    Raises:
        ValueError: a transform whose samples are not of the shape that the next one reads.
    """
    check_ranks(transforms)
    base = shape = transforms[0].base_shape
    for i, transform in enumerate(transforms):
        reads = transform.base_shape
        if shape is not None and reads is not None and shape != reads:
            raise ValueError(
                f"transforms[{i}], a {type(transform).__name__}, has the base shape {reads}, but "
                f"what comes before it gives samples of shape {shape}"
            )
        base = reads if base is None else base
        shape = transform.event_shape or shape
    return base, shape


def check_ranks(transforms: Sequence[Transform], event_shape: Sequence[int] = ()) -> None:
    """Refuse transforms of samples with another number of dimensions than the others'.

    Args:
        transforms: those that meet the same samples.
        event_shape: the shape of these samples, where it is known.

    Raises:
        ValueError: a `CNF` without a shape of its own, and another event_dims.
    """
    shapes = [t.event_shape or t.base_shape for t in transforms]
    known = next((shape for shape in (event_shape, *shapes) if shape), None)
    for i, transform in enumerate(transforms):
        rank = transform.event_dims
        if known is not None and rank is not None and rank != len(known):
            raise ValueError(
                f"transforms[{i}], a {type(transform).__name__}, has event_dims={rank}, but "
                f"samples of the shape {tuple(known)} have {len(known)} dimensions; use "
                f"CNF(field, ..., event_dims={len(known)})"
            )


class Inverse(Transform):
    """A transform with its directions swapped.

    Args:
        transform: the transform to invert.

    Raises:
        TypeError: not a Transform.
        ValueError: a dequantization.

    Example:
        >>> import cnf
        >>> f = cnf.CNF(cnf.MLPField(2))
        >>> z = torch.randn(5, 2)
        >>> torch.equal(Inverse(f).inverse(z), f.forward(z))
        True
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a Transform, got {type(transform).__name__}")
        check_real("transform", transform, "it has no inverse that is a transform")
        self.transform = transform
        self.base_shape, self.event_shape = transform.event_shape, transform.base_shape
        self.event_dims = transform.event_dims

    @property
    def takes_context(self) -> bool:  # type: ignore[override]
        """Whether the transform within takes context."""
        return self.transform.takes_context

    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """The inverse of the transform within."""
        x, log_det = self.transform.inverse_and_log_det(z, context, **choices)
        return only_mapped(self.transform, z, x, log_det), log_det

    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> tuple[Tensor, Tensor]:
        """The transform within."""
        return self.transform.forward_and_log_det(x, context, **choices)

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """The inverse of the transform within, without the log-determinant."""
        return self.transform.inverse(z, context, **choices)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """The transform within, without the log-determinant."""
        return self.transform.forward(x, context, **choices)
