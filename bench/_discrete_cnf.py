"""cnf's discrete flows, by its own models."""

from __future__ import annotations

from _discrete import Architecture, Model

import cnf


def model(architecture: Architecture) -> Model:
    """`cnf.RealNVP`, `cnf.NeuralSpline` or `cnf.MAF`, without what could stand between layers."""
    flow = _flow(architecture)
    return Model(
        "cnf",
        flow,
        flow.log_prob,
        lambda n: flow.sample((n,)),
        lambda n: flow.sample_and_log_prob((n,)),
    )


def _flow(architecture: Architecture) -> cnf.Flow:
    sizes = (architecture.features, architecture.layers, architecture.hidden)
    if architecture.kind == "affine":
        return cnf.RealNVP(*sizes, activation="relu", mask="halves")
    if architecture.kind == "maf":
        return cnf.MAF(*sizes, activation="relu")
    return cnf.NeuralSpline(
        *sizes,
        bins=architecture.bins,
        bound=architecture.bound,
        activation="relu",
        mixing="none",
    )
