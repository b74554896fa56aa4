"""normflows' discrete flows, by its own layers, with a plain MLP for conditioner.

Its `MaskedAffineAutoregressive` samples in one pass and finds densities feature by feature, and
its coupling splines are wrapped with their directions swapped; here both go from data to noise in
one pass, swapped in the same way, as in the other libraries.
"""

from __future__ import annotations

import warnings
from functools import partial

import normflows as nf
import torch
from _discrete import Architecture, Model, Plain
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from torch import Tensor, nn


class Swapped(nf.flows.Flow):
    """A layer with its directions swapped, as in normflows' `CoupledRationalQuadraticSpline`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        return self.layer.inverse(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        return self.layer(z)


def model(architecture: Architecture) -> Model:
    """Its `NormalizingFlow` of the layers; `sample` finds log q too, as it always does."""
    layers = [_layer(architecture, i) for i in range(architecture.layers)]
    if architecture.kind == "maf":
        turned = [(_reverse(architecture.features), layer) for layer in layers[1:]]
        layers = [layers[0], *(part for pair in turned for part in pair)]
    base = nf.distributions.DiagGaussian(architecture.features, trainable=False)
    flow = nf.NormalizingFlow(base, layers)
    return Model("normflows", flow, flow.log_prob, lambda n: flow.sample(n)[0], flow.sample)


def _layer(architecture: Architecture, i: int) -> nn.Module:
    if architecture.kind == "maf":
        return Swapped(nf.flows.MaskedAffineAutoregressive(**architecture.made()))
    if architecture.kind == "affine":
        # the lower and the upper half: it has no other split of an odd number
        inputs, outputs = architecture.conditioner_sizes(i)
        net = nf.nets.MLP([inputs, *architecture.hidden, outputs])
        return nf.flows.AffineCouplingBlock(net, split_mode=("channel_inv", "channel")[i % 2])
    # its warning is of a scale that a net of its own kind would add, at some cost
    warnings.filterwarnings("ignore", "Inputs to the softmax are not scaled down")
    return Swapped(
        PiecewiseRationalQuadraticCoupling(
            architecture.mask(i).int(),
            partial(Plain, hidden=architecture.hidden),
            architecture.bins,
            tails="linear",
            tail_bound=architecture.bound,
        )
    )


def _reverse(features: int) -> nn.Module:
    """The features in the other order, by the permutation that it has."""
    permute = nf.flows.Permute(features, mode="shuffle")
    permute.perm.copy_(torch.arange(features - 1, -1, -1))
    permute.inv_perm.copy_(permute.perm)
    return permute
