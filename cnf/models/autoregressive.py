"""Models of autoregressive layers: MAF and IAF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_choice, check_count
from cnf.flow import Flow
from cnf.models.parts import mixed, stack
from cnf.transforms import Elementwise, Inverse, MaskedAutoregressive, Transform

__all__ = ["IAF", "MAF", "autoregressive_layers"]

ORDERINGS = ("alternate", "random")


def autoregressive_layers(
    features: int,
    layers: int,
    elementwise: str | Elementwise,
    *,
    ordering: str,
    mixing: str,
    generator: torch.Generator | None,
    **options: Any,
) -> list[list[Transform]]:
    """Autoregressive layers, each with what mixes behind it."""
    check_count("features", features)
    check_count("layers", layers)
    check_choice("ordering", ordering, ORDERINGS)
    made: list[Transform] = []
    for i in range(layers):
        own = ordering if ordering == "random" else ("forward", "reverse")[i % 2]
        layer = MaskedAutoregressive(
            features, elementwise, ordering=own, generator=generator, **options
        )
        made.append(layer)
    return mixed(made, mixing, (features,), generator)


class MAF(Flow):
    """Masked autoregressive flow: every dimension scaled and shifted given those before it.

        z_i = (x_i - m_i(x_1, ..., x_{i-1}, context)) / exp(s_i(x_1, ..., x_{i-1}, context))

    The density of data is one pass of each layer's network. Samples take D small steps a layer,
    in which every hidden unit is computed once.

    Args:
        features: number of dimensions D.
        layers: number of autoregressive layers.
        hidden: widths of the hidden layers of each network, a `MADE`.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        residual: whether the networks have residual layers.
        ordering: which dimension comes first: "alternate" (the first and the last in turns) or
            "random", drawn for each layer.
        mixing: what stands between layers: "none", "reverse", "random" or "lu".
        base: base density; None for the standard normal.
        generator: source of random orderings and permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, a choice that is not known.

    Reference: Papamakarios et al., arXiv 1705.07057.

    Example:
        >>> flow = MAF(5, hidden=(32,), context=3)
        >>> flow.log_prob(torch.randn(16, 5), torch.randn(16, 3)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        features: int,
        layers: int = 5,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        residual: bool = False,
        ordering: str = "alternate",
        mixing: str = "none",
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        made = autoregressive_layers(
            features,
            layers,
            "affine",
            ordering=ordering,
            mixing=mixing,
            generator=generator,
            hidden=hidden,
            context=context,
            activation=activation,
            residual=residual,
        )
        super().__init__(base_for((features,), base), stack(made))


class IAF(Flow):
    """Inverse autoregressive flow: MAF with the fast direction swapped, for variational inference.

        x_i = (z_i - m_i(z_1, ..., z_{i-1}, context)) / exp(s_i(z_1, ..., z_{i-1}, context))

    Samples with their density are one pass of each layer's network; the density of other points
    takes D small steps a layer.

    Args:
        features: number of dimensions D.
        layers: number of autoregressive layers.
        hidden: widths of the hidden layers of each network, a `MADE`.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        residual: whether the networks have residual layers.
        ordering: which dimension comes first: "alternate" (the first and the last in turns) or
            "random", drawn for each layer.
        mixing: what stands between layers: "none", "reverse", "random" or "lu".
        base: base density; None for the standard normal.
        generator: source of random orderings and permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, a choice that is not known.

    Reference: Kingma et al., arXiv 1606.04934.

    Example:
        >>> x, log_prob = IAF(5, hidden=(32,)).rsample_and_log_prob((16,))
        >>> x.shape, log_prob.shape
        (torch.Size([16, 5]), torch.Size([16]))
    """

    def __init__(
        self,
        features: int,
        layers: int = 5,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: str | nn.Module = "relu",
        residual: bool = False,
        ordering: str = "alternate",
        mixing: str = "none",
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        made = autoregressive_layers(
            features,
            layers,
            "affine",
            ordering=ordering,
            mixing=mixing,
            generator=generator,
            hidden=hidden,
            context=context,
            activation=activation,
            residual=residual,
        )
        super().__init__(base_for((features,), base), Inverse(stack(made)))
