"""Neural spline flows: rational-quadratic splines in couplings or autoregressive layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_choice
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.models.autoregressive import autoregressive_layers
from cnf.models.coupling import coupling_layers
from cnf.models.parts import stack
from cnf.transforms import RationalQuadraticSpline, Transform
from cnf.transforms.conditioners import Conditioner

__all__ = ["NeuralSpline"]


class NeuralSpline(Flow):
    """Neural spline flow: monotone rational-quadratic splines of each dimension, given others.

        RQ-NSF (C): x_a = z_a,  x_b = spline(z_b; parameters(z_a, context))
        RQ-NSF (AR): z_i = spline^-1(x_i; parameters(x_1, ..., x_{i-1}, context))

    Args:
        features: dimensions of a sample, D (2 or more for couplings), or its shape (couplings).
        layers: number of layers.
        hidden: widths of the hidden layers of each network; channels, for images.
        kind: "coupling" or "autoregressive".
        bins: number of bins of each spline.
        bound: splines reach from -bound to bound, beyond is the identity: standardise the data.
        context: number of context features, 0 for none.
        activation: of the networks, by name or as a module.
        mask: what the first coupling keeps, see `RealNVP`; for couplings alone.
        conditioner: makes each network, see `Coupling`; for couplings alone.
        mixing: what stands between layers: "lu" (a learned matrix), "none", "reverse", "random".
        base: base density; None for the standard normal.
        generator: source of random permutations.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, one dimension alone, a choice that is not known.

    Reference: Durkan et al., arXiv 1906.04032.

    Example:
        >>> flow = NeuralSpline(5, hidden=(32,), kind="autoregressive")
        >>> flow.log_prob(torch.randn(16, 5)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        layers: int = 5,
        hidden: Sequence[int] = (64, 64),
        *,
        kind: str = "coupling",
        bins: int = 8,
        bound: float = 5.0,
        context: int = 0,
        activation: str | nn.Module = "relu",
        mask: str | Tensor | None = None,
        mixing: str = "lu",
        conditioner: Conditioner | None = None,
        base: Base | Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_choice("kind", kind, ["coupling", "autoregressive"])
        event_shape = event_shape_of(features)
        spline = RationalQuadraticSpline(bins, bound)
        made: list[list[Transform]]
        if kind == "coupling":
            made = coupling_layers(
                event_shape,
                layers,
                spline,
                mask=mask,
                mixing=mixing,
                generator=generator,
                hidden=hidden,
                context=context,
                activation=activation,
                conditioner=conditioner,
            )
        else:
            if mask is not None or conditioner is not None:
                raise ValueError(
                    "mask and conditioner are for kind='coupling' alone; leave them out"
                )
            if len(event_shape) != 1:
                raise ValueError(
                    f"features={features!r} must be a number of dimensions D for "
                    "kind='autoregressive'"
                )
            made = autoregressive_layers(
                event_shape[0],
                layers,
                spline,
                ordering="alternate",
                mixing=mixing,
                generator=generator,
                hidden=hidden,
                context=context,
                activation=activation,
            )
        super().__init__(base_for(event_shape, base), stack(made))
