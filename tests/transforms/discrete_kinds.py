"""The registry of the discrete contract: every transform and option, and what its inputs are.

To put a transform under the contract of `test_discrete_contract.py`, add a `Kind` to `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cnf
from cnf.transforms import (
    MLP,
    ActNorm,
    Affine,
    BatchNorm,
    Compose,
    Conv1x1,
    Coupling,
    Diagonal,
    Interval,
    Inverse,
    Linear,
    LULinear,
    MaskedAutoregressive,
    Multiscale,
    Permutation,
    Planar,
    QRLinear,
    Radial,
    RationalQuadraticSpline,
    RecursiveCoupling,
    Sigmoid,
    Split,
    Squeeze,
    Sylvester,
    Transform,
)

Parameters = dict[str, Tensor]
Shape = tuple[int, ...]


def nothing(transform: Transform) -> None:
    """The preparation of a transform that needs none."""


@dataclass(frozen=True)
class Kind:
    """A kind of transform, and what its inputs look like.

    Attributes:
        name: of the transform and its options.
        make: builds it.
        event: shape of a data sample.
        base: shape of a base sample, where it is another.
        context: number of context features.
        prepare: what must happen before use, such as an initialisation from data.
        volume_preserving: whether the log-determinant is zero for all parameters.
        modes: whether train() and eval() are different maps, as of batch statistics.
        spread: parameters are drawn with the standard deviation spread / sqrt(fan-in).
        idle: parameters that have no effect.
        drawn: whether building it draws what training never changes, such as a random mask.
        compiled: the backend of torch.compile, None where another kind runs the same operations.
        domain: from any numbers to those that data may be.
    """

    name: str
    make: Callable[[], Transform]
    event: Shape = (3,)
    base: Shape | None = None
    context: int = 0
    prepare: Callable[[Transform], None] = nothing
    volume_preserving: bool = False
    modes: bool = False
    spread: float = 1.5
    idle: tuple[str, ...] = ()
    drawn: bool = False
    compiled: str | None = "aot_eager"
    domain: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def shape(self, direction: str) -> Shape:
        """Of a sample that the direction reads."""
        return self.event if direction == "inverse" or self.base is None else self.base

    def inputs(
        self, direction: str, *batch: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """(z,), or (z, context), drawn in float32 whatever the dtype."""
        x = torch.randn(*batch, *self.shape(direction)).to(dtype)
        x = self.domain(x) if direction == "inverse" else x
        return (x, torch.randn(*batch, self.context).to(dtype)) if self.context else (x,)

    def networks(self, n: int) -> tuple[Transform, Parameters]:
        """The transform, prepared, and n draws of every parameter, each (n, ...)."""
        transform = self.make()
        self.prepare(transform)
        draws = {}
        for name, parameter in transform.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            draws[name] = torch.randn(n, *parameter.shape) * (self.spread / math.sqrt(fan_in))
        return transform, draws

    def random(self, dtype: torch.dtype = torch.float32) -> Transform:
        """The transform with every parameter drawn anew, so that none of it is the identity."""
        transform, draws = self.networks(1)
        with torch.no_grad():
            for name, parameter in transform.named_parameters():
                parameter.copy_(draws[name][0])
        return transform.to(dtype)


ABOUT = (
    "base",
    "prepare",
    "volume_preserving",
    "modes",
    "spread",
    "idle",
    "drawn",
    "compiled",
    "domain",
)
SMOOTH = {"hidden": (8,), "activation": "silu"}  # for gradcheck
VOLUME = {"volume_preserving": True}
UNTRACED = {"compiled": None}
MILD = {"spread": 1.0}  # for what magnifies the rounding of float32
SPLINE = {"spread": 0.7}
ITERATES = {"compiled": "eager"}  # AOT autograd takes seconds for what iterates


def kinds_of(make: Callable[..., Transform], family: str, **common: Any) -> Callable[..., Kind]:
    """What makes the kinds of one class, called as f(name, features, *args, **options).

    Options that are attributes of `Kind` go there, all others to the class.
    """

    def kind(name: str, features: int | Shape, *args: Any, **options: Any) -> Kind:
        options = {**common, **options}
        about = {key: options.pop(key) for key in ABOUT if key in options}
        return Kind(
            f"{family}-{name}" if name else family,
            lambda: make(features, *args, **options),
            event=features if isinstance(features, tuple) else (features,),
            context=options.get("context", 0),
            **about,
        )

    return kind


def initialised(transform: Transform) -> None:
    """ActNorm sets itself by the first batch."""
    transform.inverse(3 * torch.randn(50, *transform.event_shape) - 1)


def with_statistics(transform: Transform) -> None:
    """BatchNorm in eval(), with running averages of its own."""
    for _ in range(5):
        transform.inverse(3 * torch.randn(50, *transform.event_shape) - 1)
    transform.eval()


planar = kinds_of(Planar, "planar")
PLANAR = [
    planar("tanh", 3, activation="tanh", **ITERATES),
    planar("softplus", 3, activation="softplus", **UNTRACED),
    planar("elu", 3, activation="elu", **UNTRACED),
    planar("leaky_relu", 3, activation="leaky_relu", **UNTRACED),
    planar("sigmoid", 3, activation="sigmoid", **UNTRACED),
    planar("arctan", 3, activation="arctan", **UNTRACED),
    planar("context", 3, context=2, **ITERATES),
    planar("one-dimension", 1, **UNTRACED),
    planar("picture", (2, 1, 2), **UNTRACED),
]

radial = kinds_of(Radial, "radial")
RADIAL = [
    radial("", 3, **UNTRACED),
    radial("context", 3, context=2),
    radial("one-dimension", 1, **UNTRACED),
    radial("picture", (2, 1, 2), **UNTRACED),
]

sylvester = kinds_of(Sylvester, "sylvester")
SYLVESTER = [
    sylvester("orthogonal", 3, **UNTRACED),
    sylvester("orthogonal-rank", 3, 2, **ITERATES),
    sylvester("orthogonal-context", 3, 2, context=2, **UNTRACED),
    sylvester("householder", 3, kind="householder", **UNTRACED),
    sylvester("householder-reflections", 2, kind="householder", reflections=2, **ITERATES),
    sylvester("householder-context", 3, kind="householder", context=2, **UNTRACED),
    sylvester("triangular", 3, kind="triangular", **UNTRACED),
    sylvester("triangular-reverse", 3, kind="triangular", reverse=True, **UNTRACED),
    sylvester("triangular-context", 3, kind="triangular", context=2, **UNTRACED),
    sylvester("softplus", 3, 2, activation="softplus", **UNTRACED),
    sylvester("picture", (2, 1, 2), 2, **UNTRACED),
]

LINEAR = [
    kinds_of(Linear, "linear")("", 3),
    kinds_of(Linear, "linear")("picture", (2, 1, 2), **UNTRACED),
    kinds_of(LULinear, "lu-linear")("", 3, drawn=True),
    kinds_of(LULinear, "lu-linear")("picture", (2, 1, 2), **UNTRACED),
    kinds_of(QRLinear, "qr-linear")("", 3),
    kinds_of(QRLinear, "qr-linear")("reflections", 4, reflections=2, **UNTRACED),
    kinds_of(Diagonal, "diagonal")("", 3),
    kinds_of(Diagonal, "diagonal")("context", 3, context=2),
    kinds_of(Diagonal, "diagonal")("picture", (2, 1, 2), **UNTRACED),
    kinds_of(Diagonal, "diagonal")("picture-context", (2, 1, 2), context=2, **UNTRACED),
    kinds_of(Conv1x1, "conv1x1")("lu", (3, 2, 2), drawn=True),
    kinds_of(Conv1x1, "conv1x1")("qr", (3, 2, 2), "qr", **UNTRACED),
    kinds_of(Conv1x1, "conv1x1")("full", (3, 2, 2), "full", **UNTRACED),
    kinds_of(Conv1x1, "conv1x1")("vector", 3, **UNTRACED),
]

permutation = kinds_of(Permutation, "permutation")
PERMUTATION = [
    permutation("reverse", 3, **VOLUME),
    permutation("random", 5, "random", drawn=True, **VOLUME, **UNTRACED),
    permutation("own", 4, (2, 0, 3, 1), **VOLUME, **UNTRACED),
    permutation("channels", (4, 1, 2), "reverse", **VOLUME, **UNTRACED),
]

NORMALIZATION = [
    kinds_of(ActNorm, "actnorm")("", 3, prepare=initialised),
    kinds_of(ActNorm, "actnorm")("picture", (2, 2, 2), prepare=initialised, **UNTRACED),
    kinds_of(BatchNorm, "batchnorm")("", 3, prepare=with_statistics, modes=True),
    kinds_of(BatchNorm, "batchnorm", momentum=0.5, eps=0.1)(
        "picture", (2, 2, 2), prepare=with_statistics, modes=True, **UNTRACED
    ),
]

ONE_OF_FOUR = torch.tensor([False, False, True, False])
LAST_OF_FOUR = torch.tensor([False, False, True, True])
coupling = kinds_of(Coupling, "coupling", **SMOOTH)
COUPLING = [
    coupling("additive", 3, "halves", "additive", **VOLUME),
    coupling("affine", 3, "halves", "affine", **UNTRACED),
    coupling("spline", 3, "halves", "spline", **SPLINE),
    coupling("additive-context", 3, "halves", "additive", context=2, **VOLUME, **UNTRACED),
    coupling("affine-context", 3, "halves", "affine", context=2),
    coupling("spline-context", 3, "halves", "spline", context=2, **SPLINE, **UNTRACED),
    coupling("alternating", 4, "alternating"),
    coupling("random", 4, "random", drawn=True, **UNTRACED),
    coupling("random-of-two", 2, "random", drawn=True, **UNTRACED),
    coupling("random-channels", (2, 2, 2), "random", drawn=True, **UNTRACED),
    coupling("own-mask", 4, ONE_OF_FOUR, "spline", **SPLINE, **UNTRACED),
    coupling("own-mask-swapped", 4, LAST_OF_FOUR, **UNTRACED),
    coupling(
        "spline-bins", 3, "halves", RationalQuadraticSpline(3, bound=1.0), **SPLINE, **UNTRACED
    ),
    coupling("affine-bound", 3, "halves", Affine(max_log_scale=1.0), **UNTRACED),
    coupling("deep", 3, hidden=(8, 8), **UNTRACED),
    coupling("linear-conditioner", 3, hidden=(), **UNTRACED),
    coupling("own-conditioner", 3, conditioner=MLP, **UNTRACED),
    coupling("rows", (4, 2), "alternating", **UNTRACED),
    coupling("channel", (2, 2, 2), "channel"),
    coupling("channel-context", (3, 2, 2), "channel", context=2, **UNTRACED),
    coupling("checkerboard", (1, 2, 2), "checkerboard"),
    coupling("checkerboard-context", (1, 2, 2), "checkerboard", context=2, **UNTRACED),
    coupling("checkerboard-spline", (1, 2, 2), "checkerboard", "spline", **SPLINE, **UNTRACED),
    coupling("checkerboard-additive", (1, 2, 2), "checkerboard", "additive", **VOLUME, **UNTRACED),
]

recursive = kinds_of(RecursiveCoupling, "recursive", **SMOOTH)
RECURSIVE = [
    recursive("additive", 5, "additive", **VOLUME, **UNTRACED),
    recursive("affine", 5, "affine", **MILD, compiled="eager"),
    recursive("spline", 5, "spline", spread=0.5, **UNTRACED),
    recursive("context", 5, context=2, **MILD, **UNTRACED),
    recursive("depth", 5, depth=1, **MILD, **UNTRACED),
    recursive("picture", (4, 1, 2), depth=2, **MILD, **UNTRACED),
]

autoregressive = kinds_of(MaskedAutoregressive, "autoregressive", **SMOOTH)
AUTOREGRESSIVE = [
    autoregressive("additive", 3, "additive", **VOLUME, **UNTRACED),
    autoregressive("affine", 3, "affine", **UNTRACED),
    autoregressive("spline", 3, "spline", **SPLINE, **UNTRACED),
    autoregressive("additive-context", 3, "additive", context=2, **VOLUME, **UNTRACED),
    autoregressive("affine-context", 3, "affine", context=2),
    autoregressive("spline-context", 3, "spline", context=2, **SPLINE, **UNTRACED),
    autoregressive("reverse", 4, ordering="reverse", **UNTRACED),
    autoregressive("random", 4, ordering="random", drawn=True, **UNTRACED),
    autoregressive("random-of-two", 2, ordering="random", drawn=True, **UNTRACED),
    autoregressive("own-ordering", 4, ordering=(2, 0, 3, 1), **UNTRACED),
    autoregressive("residual", 4, hidden=(8, 8, 8), residual=True, **UNTRACED),
    autoregressive("one-dimension", 1, idle=("conditioner.layers.0.weight",), **UNTRACED),
]

LOW, HIGH = torch.tensor([0.0, -math.inf, -math.inf]), torch.tensor([1.0, 0.0, math.inf])
squeeze = kinds_of(Squeeze, "squeeze")
CONTAINERS = [
    squeeze("channel", (2, 2, 4), base=(8, 1, 2), **VOLUME),
    squeeze("checkerboard", (2, 2, 4), "checkerboard", base=(8, 1, 2), **VOLUME),
    Kind("sigmoid", lambda: Compose(Diagonal(3), Sigmoid(0.05)), domain=torch.sigmoid),
    Kind(
        "interval",
        lambda: Compose(Diagonal(3), Interval(-2, 3, columns=(0, 2)), Permutation(3)),
        domain=lambda x: torch.where(torch.tensor([1, 0, 1]) > 0, 5 * torch.sigmoid(x) - 2, x),
    ),
    Kind(
        "half-line",
        lambda: Compose(Diagonal(3), Interval(-2, math.inf), Permutation(3)),
        domain=lambda x: x.exp() - 2,
        **UNTRACED,
    ),
    Kind(
        "intervals",
        lambda: Compose(Diagonal(3), Interval(LOW, HIGH)),
        domain=lambda x: torch.stack((x[..., 0].sigmoid(), -x[..., 1].exp(), x[..., 2]), -1),
    ),
    Kind("split", lambda: Split(LULinear(2), 3), **UNTRACED),
    Kind(
        "split-context",
        lambda: Split(Coupling(2, context=2, **SMOOTH), 4),
        event=(4,),
        context=2,
        **UNTRACED,
    ),
    Kind(
        "multiscale",
        lambda: Multiscale(
            Compose(Coupling((2, 1, 1), "channel", **SMOOTH), Permutation((2, 1, 1))),
            Compose(Conv1x1((4, 1, 1)), Squeeze((1, 2, 2))),
        ),
        event=(1, 2, 2),
        **UNTRACED,
    ),
    Kind(
        "multiscale-context",
        lambda: Multiscale(
            Compose(Diagonal((8, 1, 1)), Squeeze((2, 2, 2))),
            Compose(Coupling((4, 2, 2), context=2, **SMOOTH), Squeeze((1, 4, 4))),
        ),
        event=(1, 4, 4),
        context=2,
        **UNTRACED,
    ),
    Kind("multiscale-vector", lambda: Multiscale(Radial(2), LULinear(4)), event=(4,), **UNTRACED),
    Kind("inverse", lambda: Inverse(LULinear(3)), **UNTRACED),
    Kind("inverse-autoregressive", lambda: Inverse(MaskedAutoregressive(3, **SMOOTH)), **UNTRACED),
    Kind("inverse-squeeze", lambda: Inverse(Squeeze((1, 2, 2))), (4, 1, 1), (1, 2, 2), **VOLUME),
    Kind("compose", lambda: Compose(LULinear(3), Planar(3), Permutation(3)), **UNTRACED),
    Kind(
        "compose-context",
        lambda: Compose(
            Coupling((4, 1, 1), "alternating", context=2, **SMOOTH),
            Inverse(Compose(Inverse(Squeeze((1, 2, 2))), Diagonal((4, 1, 1), context=2))),
            Inverse(Conv1x1((1, 2, 2))),
        ),
        event=(1, 2, 2),
        base=(4, 1, 1),
        context=2,
        **UNTRACED,
    ),
]


def model(name: str, features: int | Shape, make: Callable[..., cnf.Flow], **options: Any) -> Kind:
    """The transform of a model, of two layers."""

    def transform(*args: Any, **more: Any) -> Transform:
        return make(*args, **more).transform

    return kinds_of(transform, "model", spread=0.7, **UNTRACED)(name, features, **options)


MODELS = [
    model("real-nvp", 3, cnf.RealNVP, layers=2, **SMOOTH, context=2),
    model("nice", 3, cnf.NICE, layers=2, **SMOOTH),
    model("maf", 3, cnf.MAF, layers=2, **SMOOTH, context=2),
    model("iaf", 3, cnf.IAF, layers=2, **SMOOTH),
    model("neural-spline", 3, cnf.NeuralSpline, layers=2, **SMOOTH),
    model("hint", 3, cnf.HINT, layers=2, **SMOOTH),
    model("planar", 3, cnf.PlanarFlow, layers=2),
    model("radial", 3, cnf.RadialFlow, layers=2, context=2),
    model("sylvester", 3, cnf.SylvesterFlow, layers=2),
    model("glow", (1, 4, 4), cnf.Glow, levels=2, steps=1, **SMOOTH, prepare=initialised),
    model(
        "glow-colours",
        (3, 4, 4),
        cnf.Glow,
        levels=2,
        steps=1,
        **SMOOTH,
        prepare=initialised,
        spread=0.5,
    ),
]

KINDS = [
    *PLANAR,
    *RADIAL,
    *SYLVESTER,
    *LINEAR,
    *PERMUTATION,
    *NORMALIZATION,
    *COUPLING,
    *RECURSIVE,
    *AUTOREGRESSIVE,
    *CONTAINERS,
    *MODELS,
]
