"""Stacks of planar, radial and Sylvester layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_choice, check_count
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.transforms import Compose, Inverse, Planar, Radial, Sylvester, Transform

__all__ = ["PlanarFlow", "RadialFlow", "SylvesterFlow"]


class PlanarFlow(Flow):
    """Planar flow: layers that bend the space along planes, x = z + u h(w . z + b).

    Args:
        features: dimensions of a sample, D, or its shape.
        layers: number of layers.
        context: number of context features, 0 for none: each layer's parameters are then predicted
            from it (amortised).
        activation: h, one whose slope lies in [0, 1]: "tanh", "softplus", "elu", "leaky_relu",
            "sigmoid", "arctan".
        explicit: which direction is the formula and which one a root finding: "sampling" (z to x,
            variational inference) or "density" (x to z, maximum likelihood).
        base: base density; None for the standard normal.

    Raises:
        ValueError: a size that is not positive, a choice that is not known.

    Reference: Rezende and Mohamed, arXiv 1505.05770.

    Example:
        >>> x, log_prob = PlanarFlow(2, layers=4).rsample_and_log_prob((16,))
        >>> x.shape, log_prob.shape
        (torch.Size([16, 2]), torch.Size([16]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 16,
        *,
        context: int = 0,
        activation: str = "tanh",
        explicit: str = "sampling",
        base: Base | Distribution | None = None,
    ) -> None:
        transform = _stack(
            layers, explicit, lambda _: Planar(features, context=context, activation=activation)
        )
        super().__init__(base_for(event_shape_of(features), base), transform)


class RadialFlow(Flow):
    """Radial flow: layers that contract or expand space around a point.

        x = z + b (z - c) / (a + |z - c|)

    Args:
        features: dimensions of a sample, D, or its shape.
        layers: number of layers.
        context: number of context features, 0 for none: each layer's parameters are then predicted
            from it (amortised).
        explicit: which direction is the formula above: "sampling" (z to x, variational inference)
            or "density" (x to z, maximum likelihood); the other has a closed form too.
        base: base density; None for the standard normal.

    Raises:
        ValueError: a size that is not positive, a choice that is not known.

    Reference: Rezende and Mohamed, arXiv 1505.05770.

    Example:
        >>> RadialFlow(2, layers=4).sample((16,)).shape
        torch.Size([16, 2])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 16,
        *,
        context: int = 0,
        explicit: str = "sampling",
        base: Base | Distribution | None = None,
    ) -> None:
        transform = _stack(layers, explicit, lambda _: Radial(features, context=context))
        super().__init__(base_for(event_shape_of(features), base), transform)


class SylvesterFlow(Flow):
    """Sylvester flow: planar layers of several units at once, x = z + Q R h(R~ Q^T z + b).

    Args:
        features: dimensions of a sample, D, or its shape.
        layers: number of layers.
        kind: of the orthonormal Q: "orthogonal", "householder" or "triangular" (permutations).
        activation: h, see `PlanarFlow`.
        context: number of context features, 0 for none: each layer's parameters are then predicted
            from it (amortised).
        explicit: which direction is the formula and which one a root finding: "sampling" (z to x,
            variational inference) or "density" (x to z, maximum likelihood).
        base: base density; None for the standard normal.
        options: passed to each `Sylvester`: rank=, reflections=.

    Raises:
        ValueError: a size that is not positive, a choice that is not known.

    Reference: van den Berg et al., arXiv 1803.05649.

    Example:
        >>> SylvesterFlow(3, layers=2, kind="householder").sample((16,)).shape
        torch.Size([16, 3])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 4,
        *,
        kind: str = "orthogonal",
        context: int = 0,
        activation: str = "tanh",
        explicit: str = "sampling",
        base: Base | Distribution | None = None,
        **options: Any,
    ) -> None:
        def make(i: int) -> Transform:
            reverse = kind == "triangular" and i % 2 == 1  # in turns
            return Sylvester(
                features,
                kind=kind,
                context=context,
                activation=activation,
                reverse=reverse,
                **options,
            )

        transform = _stack(layers, explicit, make)
        super().__init__(base_for(event_shape_of(features), base), transform)


def _stack(layers: int, explicit: str, make: Callable[[int], Transform]) -> Transform:
    """Layers in a row, inverted where the density is to be the explicit direction."""
    check_count("layers", layers)
    check_choice("explicit", explicit, ["sampling", "density"])
    made = Compose(*(make(i) for i in range(layers)))
    return Inverse(made) if explicit == "density" else made
