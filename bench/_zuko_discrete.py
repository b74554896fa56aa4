"""zuko's discrete flows, by its own classes, conditioners among them."""

from __future__ import annotations

import torch
import zuko
from _discrete import Architecture, Model
from zuko.flows.coupling import GeneralCouplingTransform


def model(architecture: Architecture) -> Model:
    """Its `MAF`, or couplings like those of its `RealNVP`, with the other half first."""
    if architecture.kind == "maf":
        flow = zuko.flows.MAF(
            architecture.features,
            transforms=architecture.layers,
            hidden_features=architecture.hidden,
        )
    else:  # its NSF masks a network of all features instead of splitting them
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal,
            torch.zeros(architecture.features),
            torch.ones(architecture.features),
            buffer=True,
        )
        layers = [_coupling(architecture, i) for i in range(architecture.layers)]
        flow = zuko.lazy.Flow(layers, base)
    return Model(
        "zuko",
        flow,
        lambda x: flow().log_prob(x),
        lambda n: flow().sample((n,)),
        lambda n: flow().rsample_and_log_prob((n,)),
    )


def _coupling(architecture: Architecture, i: int) -> GeneralCouplingTransform:
    options = {"mask": ~architecture.mask(i), "hidden_features": architecture.hidden}
    if architecture.kind == "affine":
        return GeneralCouplingTransform(architecture.features, **options)
    bins, bound = architecture.bins, architecture.bound
    return GeneralCouplingTransform(
        architecture.features,
        univariate=lambda *phi: zuko.transforms.MonotonicRQSTransform(*phi, bound=bound),
        shapes=[(bins,), (bins,), (bins - 1,)],
        **options,
    )
