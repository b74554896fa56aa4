"""Models of coupling layers: NICE, RealNVP, HINT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_choice, check_count
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.models.parts import MIXINGS, mixed, mixing_layer, stack
from cnf.transforms import Coupling, Diagonal, Elementwise, RecursiveCoupling, Transform, make_mask
from cnf.transforms.conditioners import Conditioner

__all__ = ["HINT", "NICE", "RealNVP", "coupling_layers"]


def coupling_layers(
    event_shape: tuple[int, ...],
    layers: int,
    elementwise: str | Elementwise,
    *,
    mask: str | Tensor | None,
    mixing: str,
    generator: torch.Generator | None,
    **options: Any,
) -> list[list[Transform]]:
    """Couplings that keep and change in turns, each with what mixes behind it.

    Raises:
        ValueError: one layer alone, which would leave what it keeps as it is.
    """
    check_count("layers", layers)
    check_choice("mixing", mixing, MIXINGS)
    if layers < 2 and mixing != "lu":
        raise ValueError(
            f"layers={layers} must be 2 or more with mixing={mixing!r}: one coupling leaves the "
            "dimensions that it keeps as they are"
        )
    if mask is None:
        mask = "checkerboard" if len(event_shape) == 3 else "alternating"
    made: list[Transform] = []
    for i in range(layers):
        if i % 2 == 0:
            kept = make_mask(mask, event_shape, generator)
        made.append(Coupling(event_shape, ~kept if i % 2 else kept, elementwise, **options))
    return mixed(made, mixing, event_shape, generator)


class RealNVP(Flow):
    """RealNVP: affine couplings, which keep some dimensions and change the others, in turns.

        x_a = z_a,    x_b = exp(s(z_a, context)) z_b + m(z_a, context)

    Density and samples cost one pass of each layer's network.

    Args:
        features: dimensions of a sample, D (2 or more), or its shape, such as (C, H, W).
        layers: number of couplings.
        hidden: widths of the hidden layers of each network; channels, for images.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        mask: what the first coupling keeps, the second changes, and so on: "alternating",
            "halves", "random" (another one every second layer), for images "checkerboard",
            "channel"; or a boolean tensor. None takes "alternating", for images "checkerboard".
        mixing: what stands between layers: "none"; "lu" (a learned matrix); "reverse" or "random"
            (fixed permutations, between pairs of layers).
        conditioner: makes each network, see `Coupling`; None takes a perceptron, or convolutions
            for images.
        base: base density; None for the standard normal.
        generator: source of random masks and permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, one dimension alone, a choice that is not known.

    Reference: Dinh et al., arXiv 1605.08803.

    Example:
        >>> flow = RealNVP(5, layers=4, hidden=(32,), context=3)
        >>> flow.log_prob(torch.randn(16, 5), torch.randn(16, 3)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 8,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        mask: str | Tensor | None = None,
        mixing: str = "none",
        conditioner: Conditioner | None = None,
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        event_shape = event_shape_of(features)
        made = coupling_layers(
            event_shape,
            layers,
            "affine",
            mask=mask,
            mixing=mixing,
            generator=generator,
            hidden=hidden,
            context=context,
            activation=activation,
            conditioner=conditioner,
        )
        super().__init__(base_for(event_shape, base), stack(made))


class NICE(Flow):
    """NICE: additive couplings, which keep volumes, behind one learned scale for each dimension.

        x_a = z_a,    x_b = z_b + m(z_a, context)

    Args:
        features: dimensions of a sample, D (2 or more), or its shape, such as (C, H, W).
        layers: number of couplings.
        hidden: widths of the hidden layers of each network; channels, for images.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        mask: what the first coupling keeps, see `RealNVP`.
        mixing: what stands between layers: "none", "reverse", "random" or "lu".
        conditioner: makes each network, see `Coupling`; None takes a perceptron, or convolutions
            for images.
        base: base density; None for the standard normal.
        generator: source of random masks and permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, one dimension alone, a choice that is not known.

    Reference: Dinh et al., arXiv 1410.8516.

    Example:
        >>> NICE(5, hidden=(32,)).sample((16,)).shape
        torch.Size([16, 5])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 8,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        mask: str | Tensor | None = None,
        mixing: str = "none",
        conditioner: Conditioner | None = None,
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        event_shape = event_shape_of(features)
        made = coupling_layers(
            event_shape,
            layers,
            "additive",
            mask=mask,
            mixing=mixing,
            generator=generator,
            hidden=hidden,
            context=context,
            activation=activation,
            conditioner=conditioner,
        )
        super().__init__(base_for(event_shape, base), stack([[Diagonal(event_shape)], *made]))


class HINT(Flow):
    """HINT: recursive couplings, whose halves are coupled within, and so on to single dimensions.

    Every layer has a triangular Jacobian over all dimensions. At full depth it has D - 1 networks,
    each run once in both directions.

    Args:
        features: dimensions of a sample, D (2 or more), or its shape, such as (C, H, W).
        layers: number of recursive couplings.
        hidden: widths of the hidden layers of each network; channels, for images.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        elementwise: "affine", "additive", "spline", or an `Elementwise`.
        depth: number of levels; None goes down to halves of one dimension.
        mixing: what stands between layers: "lu" (a learned matrix), "reverse", "random".
        conditioner: makes each network, see `Coupling`; None takes a perceptron, or convolutions
            for images.
        base: base density; None for the standard normal.
        generator: source of random permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, one dimension alone, a choice that is not known.

    Reference: Kruse et al., arXiv 1905.10687.

    Example:
        >>> HINT(5, hidden=(32,)).log_prob(torch.randn(16, 5)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 4,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        elementwise: str | Elementwise = "affine",
        depth: int | None = None,
        mixing: str = "lu",
        conditioner: Conditioner | None = None,
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        event_shape = event_shape_of(features)
        check_count("layers", layers)
        check_choice("mixing", mixing, MIXINGS)
        if mixing == "none" or (layers < 2 and mixing != "lu"):
            raise ValueError(
                f"mixing={mixing!r} leaves the first dimension as it is in all of layers={layers}; "
                "use 'lu', or 'reverse' or 'random' with two layers or more"
            )
        made: list[list[Transform]] = []
        for _ in range(layers):
            coupling = RecursiveCoupling(
                event_shape,
                elementwise,
                depth=depth,
                hidden=hidden,
                context=context,
                activation=activation,
                conditioner=conditioner,
            )
            made.append([coupling, *mixing_layer(mixing, event_shape, generator, coupling.kept)])
        super().__init__(base_for(event_shape, base), stack(made))
