"""nflows' discrete flows, by its own layers, with a plain MLP for conditioner."""

from __future__ import annotations

import warnings
from functools import partial

from _discrete import Architecture, Model, Plain
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    MaskedAffineAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    ReversePermutation,
    Transform,
)


def model(architecture: Architecture) -> Model:
    """Its `Flow` of the layers; `sample` finds the log-determinant too, as it always does."""
    layers = [_layer(architecture, i) for i in range(architecture.layers)]
    if architecture.kind == "maf":
        turned = [(ReversePermutation(architecture.features), layer) for layer in layers[1:]]
        layers = [layers[0], *(part for pair in turned for part in pair)]
    flow = Flow(CompositeTransform(layers), StandardNormal([architecture.features]))
    return Model("nflows", flow, flow.log_prob, flow.sample, flow.sample_and_log_prob)


def _layer(architecture: Architecture, i: int) -> Transform:
    if architecture.kind == "maf":
        return MaskedAffineAutoregressiveTransform(**architecture.made())
    mask, net = architecture.mask(i).int(), partial(Plain, hidden=architecture.hidden)
    if architecture.kind == "affine":
        return AffineCouplingTransform(mask, net)
    # its warning is of a scale that a net of its own kind would add, at some cost
    warnings.filterwarnings("ignore", "Inputs to the softmax are not scaled down")
    return PiecewiseRationalQuadraticCouplingTransform(
        mask, net, architecture.bins, tails="linear", tail_bound=architecture.bound
    )
