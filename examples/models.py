"""The models that the examples train: how each is built, its flags, and its defaults."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cnf
from cnf.transforms import ConvNet

FIELDS = {
    "mlp": cnf.MLPField,
    "concatsquash": cnf.ConcatSquashField,
    "potential": cnf.PotentialField,
    "hollow": cnf.HollowField,
}
CONTINUOUS = frozenset(
    "field hidden blocks trace method solver_steps rtol atol gradient compile".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Model:
    """How one of the models is built and trained.

    Attributes:
        build: from the flags and the number of dimensions, or an image's shape, to the flow.
        takes: the flags that it takes and not every other model does.
        defaults: the flags that neither the user nor the script gives: what fits 8gaussians in
            about a minute on one core.
    """

    build: Callable[[argparse.Namespace, Any], cnf.Flow]
    takes: frozenset[str]
    defaults: dict[str, Any]


def ffjord(args: argparse.Namespace, features: int) -> cnf.FFJORD:
    """The continuous flow that the flags describe."""
    return cnf.FFJORD(
        features,
        args.hidden,
        blocks=args.blocks,
        divergence=None if args.trace == "auto" else args.trace,
        solver=flow_solver(args),
        field=FIELDS[args.field],
    )


def flow_solver(args: argparse.Namespace) -> cnf.Solver:
    """The solver that the flags describe."""
    return cnf.Solver(
        args.method,
        rtol=args.rtol,
        atol=args.atol,
        steps=args.solver_steps,
        max_steps=200,  # a field that needs more has diverged
        gradient=args.gradient,
        compile=args.compile,
    )


def hint(features: int, **options: Any) -> cnf.HINT:
    """Two dimensions learn faster when they swap than when a matrix mixes them."""
    return cnf.HINT(features, mixing="reverse" if features == 2 else "lu", **options)


def networks(flow: Callable[..., cnf.Flow], layers: int | None = None, **own: Any) -> Model:
    """A discrete flow with networks in its layers."""

    def build(args: argparse.Namespace, features: int) -> cnf.Flow:
        return flow(features, hidden=args.hidden, **number(args.layers), **own)

    defaults = {"steps": 3000, "lr": 3e-3, "hidden": [64, 64], "layers": layers}
    return Model(build, frozenset({"layers", "hidden"}), defaults)


def formulas(flow: Callable[..., cnf.Flow], layers: int | None = None) -> Model:
    """A discrete flow of layers without networks, whose formulas are those of the density here."""

    def build(args: argparse.Namespace, features: int) -> cnf.Flow:
        return flow(features, explicit="density", **number(args.layers))

    return Model(build, frozenset({"layers"}), {"steps": 3000, "lr": 3e-2, "layers": layers})


def number(layers: int | None) -> dict[str, int]:
    """The number of layers as an argument, or none for the flow's own."""
    return {} if layers is None else {"layers": layers}


MODELS = {
    "ffjord": Model(ffjord, CONTINUOUS, {"steps": 1000, "lr": 1e-2, "hidden": [64, 64]}),
    "realnvp": networks(cnf.RealNVP, 16),
    "nice": networks(cnf.NICE, 16),
    "maf": networks(cnf.MAF, 16),
    "iaf": networks(cnf.IAF, 16),
    "nsf": networks(cnf.NeuralSpline),
    "nsf-ar": networks(cnf.NeuralSpline, kind="autoregressive"),
    "hint": networks(hint, 16),
    "planar": formulas(cnf.PlanarFlow),
    "radial": formulas(cnf.RadialFlow, 32),
    "sylvester": formulas(cnf.SylvesterFlow, 8),
}


def multiscale(args: argparse.Namespace, shape: tuple[int, ...]) -> cnf.MultiscaleFFJORD:
    """The continuous flow of images that the flags describe."""
    return cnf.MultiscaleFFJORD(
        shape,
        args.hidden,
        levels=args.levels,
        blocks=args.blocks,
        divergence=None if args.trace == "auto" else args.trace,
        solver=flow_solver(args),
    )


def glow(args: argparse.Namespace, shape: tuple[int, ...]) -> cnf.Glow:
    """Glow of images."""
    levels = {} if args.levels is None else {"levels": args.levels}
    return cnf.Glow(shape, steps=args.layers, hidden=args.hidden, **levels)


def image_realnvp(args: argparse.Namespace, shape: tuple[int, ...]) -> cnf.RealNVP:
    """RealNVP of images, of one scale."""
    return cnf.RealNVP(shape, layers=args.layers, hidden=args.hidden)


def noise_flow(shape: tuple[int, ...]) -> cnf.RealNVP:
    """A flow of the noise between grey levels, given the image."""
    network = partial(ConvNet, hidden=(32, 32), context_shape=shape)
    return cnf.RealNVP(shape, layers=4, context=math.prod(shape), conditioner=network)


IMAGE_MODELS = {
    "ffjord": Model(
        multiscale, CONTINUOUS - {"field"} | {"levels", "probes"}, {"lr": 1e-3, "hidden": [64, 64]}
    ),
    "glow": Model(
        glow,
        frozenset({"layers", "hidden", "levels"}),
        {"lr": 2e-3, "hidden": [64, 64], "layers": 8},
    ),
    "realnvp": Model(
        image_realnvp,
        frozenset({"layers", "hidden"}),
        {"lr": 2e-3, "hidden": [64, 64], "layers": 8},
    ),
}
"""The flows of images, by the flag that chooses them."""


def optional(models: Mapping[str, Model]) -> frozenset[str]:
    """The flags that only some of the models take."""
    return frozenset[str]().union(*(model.takes for model in models.values()))
