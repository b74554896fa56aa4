"""What the tests of single layers share: drawn parameters, inputs, and the brute-force Jacobian."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from cnf.transforms import DiscreteTransform

DOUBLE = torch.float64
DIRECTIONS = ("forward", "inverse")
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_context = pytest.mark.parametrize("context", [0, 2])

Layer = TypeVar("Layer", bound=DiscreteTransform)


def drawn(layer: Layer, scale: float = 1.0) -> Layer:
    """The layer with every parameter drawn anew."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, scale)
    return layer


def inputs(layer: DiscreteTransform, n: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, ...]:
    """z (n, *event), and context where the layer takes it."""
    z = torch.randn(n, *layer.event_shape, dtype=dtype)
    return (z, torch.randn(n, layer.context, dtype=dtype)) if layer.context else (z,)


def brute_force(layer: DiscreteTransform, direction: str, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of every sample's |det J|."""

    def flat(x: Tensor, *context: Tensor) -> Tensor:
        return getattr(layer, direction)(x.reshape(layer.event_shape), *context).flatten()

    x, *context = args
    sign, log_det = torch.linalg.slogdet(vmap(jacrev(flat))(x.flatten(1), *context))
    return sign, log_det
