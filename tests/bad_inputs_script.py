"""Bad inputs and the error that each must raise, as a table; run as a script, it checks them all.

`test_bad_inputs.py` runs every case by name, and this file once more under `python -O`, which
removes assertions. So nothing here may be an `assert`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import cnf
from cnf import calibration, data, variational
from cnf import transforms as layer

SECONDS = 5.0
NAN = float("nan")
ERRORS = (ValueError, TypeError, RuntimeError, cnf.SolverError)


def elsewhere(*shape: int) -> Tensor:
    """A tensor that says it is on a GPU, on machines without one too."""
    with FakeTensorMode():
        return torch.empty(*shape, device="cuda")


class Case(NamedTuple):
    """A call that must fail, how, and what its message must say."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]
    status: str | None = None


def complaint(case: Case) -> str | None:
    """What is wrong with the way in which a case fails, or None."""
    start = time.process_time()
    try:
        result = case.call()
    except Exception as error:
        seconds = time.process_time() - start
        if type(error) is not case.error:
            return f"raised {type(error).__name__}, not {case.error.__name__}: {error}"
        missing = [word for word in case.words if word not in str(error)]
        if missing:
            return f"does not say {missing}: {error}"
        if case.status is not None and error.status != case.status:
            return f"has status {error.status}, not {case.status}: {error}"
        if seconds > SECONDS:
            return f"took {seconds:.1f} s"
        return None
    return f"raised nothing, and returned {result!r}"


def flow(**options: Any) -> cnf.Flow:
    """A small flow on the plane."""
    return cnf.FFJORD(2, hidden=(8,), **options)


def points(n: int = 64, d: int = 2) -> Tensor:
    """Finite points (n, d)."""
    return torch.linspace(-1, 1, n * d).reshape(n, d)


def spoilt(value: float, *, shape: tuple[int, ...] = (64, 2)) -> Tensor:
    """Points of which sample 3 has one bad number."""
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    x[3].reshape(-1)[-1] = value
    return x


def log_det(
    field: Callable[..., Any], x: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """The log-determinant of a field's flow."""
    x = points(5) if x is None else x
    return cnf.CNF(field, "exact", *args, **kwargs).forward_and_log_det(x)[1]


def with_nan_weights(**options: Any) -> cnf.Flow:
    """A flow one of whose weights is NaN."""
    bad = flow(**options)
    with torch.no_grad():
        bad.transform.field.network[2].weight[0, 1] = NAN
    return bad


def inputs() -> Iterator[Case]:
    """x of a wrong kind, shape, dtype or device, or with bad numbers."""
    rows = ("x", "1 of 64 rows", "first index 3", "remove")
    for name, value in (("nan", NAN), ("inf", float("inf")), ("minus-inf", -float("inf"))):
        yield Case(f"x-{name}", lambda v=value: flow().log_prob(spoilt(v)), ValueError, rows)
    picture = cnf.FFJORD((1, 2, 2), hidden=(8,))
    yield Case(
        "x-nan-picture",
        lambda: picture.log_prob(spoilt(NAN, shape=(5, 1, 2, 2))),
        ValueError,
        ("x", "1 of 5 rows", "first index 3"),
    )
    scalar = cnf.CNF(lambda t, x: -x, event_dims=0)
    yield Case(
        "x-nan-scalar",
        lambda: scalar.forward(spoilt(NAN, shape=(5, 1))[:, 0]),
        ValueError,
        ("x", "1 of 5 rows", "first index 3"),
    )
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float16):
        yield Case(
            f"x-{dtype}",
            lambda d=dtype: flow().log_prob(points().to(d)),
            TypeError,
            ("x", str(dtype).removeprefix("torch."), "x.float()"),
        )
    for value in (None, [[0.0, 1.0]], points().numpy()):
        kind = type(value).__name__
        words = ("x", kind, "torch.as_tensor")
        yield Case(f"x-{kind}", lambda v=value: flow().log_prob(v), TypeError, words)
        yield Case(
            f"cnf-x-{kind}", lambda v=value: cnf.CNF(cnf.MLPField(2)).inverse(v), TypeError, words
        )
    both = ("torch.float32", "torch.float64", "x.to(", "module.to(")
    yield Case("x-float64", lambda: flow().log_prob(points().double()), TypeError, both)
    yield Case("x-float32", lambda: flow().double().log_prob(points()), TypeError, both)
    both = ("cuda:0", "cpu", "x.to(", "module.to(")
    yield Case("x-device", lambda: flow().log_prob(elsewhere(3, 2)), ValueError, both)
    both = ("meta", "cpu", "x.to(", "module.to(")
    yield Case("x-meta", lambda: flow().log_prob(points().to("meta")), ValueError, both)
    words = ("x", "meta", "no values", "device='cpu'")
    meta = points().to("meta")
    yield Case("all-meta", lambda: flow().to("meta").log_prob(meta), TypeError, words)
    words = ("parameters", "meta", "to_empty(device='cpu')", "load_state_dict")
    yield Case("module-meta", lambda: flow().to("meta").log_prob(points()), ValueError, words)
    for shape in ((5, 3), (3,), (), (2, 1)):
        yield Case(
            f"x-shape-{shape}",
            lambda s=shape: flow().log_prob(torch.zeros(s)),
            ValueError,
            ("x", f"{shape}", "(..., D=2)"),
        )
    yield Case(
        "x-shape-picture",
        lambda: picture.log_prob(torch.zeros(5, 2, 2)),
        ValueError,
        ("x", "(5, 2, 2)", "1, 2, 2"),
    )
    yield Case(
        "cnf-x-shape",
        lambda: cnf.CNF(cnf.MLPField((1, 2, 2))).forward(torch.zeros(2, 2)),
        ValueError,
        ("x", "(2, 2)", "3 event dimensions"),
    )
    yield Case(
        "on-nonfinite",
        lambda: flow().log_prob(points(), on_nonfinite="skip"),
        ValueError,
        ("'skip'",),
    )


def contexts() -> Iterator[Case]:
    """Context missing, unexpected, or of a wrong kind."""
    x, asks = points(5), flow(context=3)
    for name, call in (
        ("log-prob", lambda c: asks.log_prob(x, *c)),
        ("sample", lambda c: asks.sample(5, *c)),
        ("sample-and-log-prob", lambda c: asks.sample_and_log_prob(5, *c)),
        ("distribution", lambda c: asks.distribution(*c).sample()),
    ):
        missing = ("context is missing", "context=3", "(..., 3)")
        yield Case(f"context-missing-{name}", lambda f=call: f(()), ValueError, missing)
        yield Case(
            f"context-wide-{name}",
            lambda f=call: f((torch.zeros(5, 4),)),
            ValueError,
            ("context", "4 features", "context=3"),
        )
        yield Case(
            f"context-list-{name}",
            lambda f=call: f(([0.0, 0.0, 0.0],)),
            TypeError,
            ("context", "list", "torch.as_tensor"),
        )
        yield Case(
            f"context-scalar-{name}",
            lambda f=call: f((torch.tensor(0.0),)),
            ValueError,
            ("context", "(..., C)"),
        )
    extra = ("context of shape (5, 3)", "context")
    yield Case("context-extra", lambda: flow().log_prob(x, torch.zeros(5, 3)), ValueError, extra)
    yield Case(
        "context-extra-function",
        lambda: cnf.CNF(lambda t, x: -x).forward(x, torch.zeros(5, 3)),
        ValueError,
        (*extra, "f(t, x, context)"),
    )
    yield Case(
        "context-missing-function",
        lambda: cnf.CNF(lambda t, x, context: context).forward(x),
        ValueError,
        ("context is missing", "(*batch, C)"),
    )
    for on_nonfinite in ("raise", "nan"):
        yield Case(
            f"context-batch-{on_nonfinite}",
            lambda o=on_nonfinite: asks.log_prob(x, torch.zeros(4, 3), on_nonfinite=o),
            ValueError,
            ("context of shape (4, 3)", "(5,)", "(*batch, C)"),
        )
    words = ("context", "torch.float64", "context.to(torch.float32)")
    yield Case(
        "context-dtype", lambda: asks.log_prob(x, torch.zeros(5, 3).double()), TypeError, words
    )
    words = ("context", "cuda:0", "cpu", "context.to(x)")
    yield Case("context-device", lambda: asks.log_prob(x, elsewhere(5, 3)), ValueError, words)
    yield Case(
        "context-nan",
        lambda: asks.log_prob(x, spoilt(NAN, shape=(5, 3))),
        ValueError,
        ("context", "1 of 5 rows", "first index 3"),
    )


def fields() -> Iterator[Case]:
    """Fields that return something else than dx."""
    shape = ("(5, 2)", "vector field", "return")
    double = ("torch.float64", "torch.float32", "vector field")
    wrong: list[tuple[str, Callable[..., Any], type[Exception], tuple[str, ...]]] = [
        ("column", lambda t, x: x[:, :1], ValueError, (*shape, "(5, 1)")),
        ("row", lambda t, x: x[:1], ValueError, (*shape, "(1, 2)")),
        ("scalar", lambda t, x: x.sum(), ValueError, (*shape, "()")),
        ("none", lambda t, x: None, TypeError, (*shape, "NoneType")),
        ("number", lambda t, x: 1.0, TypeError, (*shape, "float")),
        ("array", lambda t, x: x.detach().numpy(), TypeError, (*shape, "ndarray")),
        ("pair", lambda t, x: (x, x), TypeError, (*shape, "tuple")),
        ("float64", lambda t, x: x.double(), TypeError, double),
        ("in-place", lambda t, x: x.mul_(2.0), RuntimeError, ("in-place",)),
    ]
    solvers = {
        "backprop": cnf.Solver(),
        "checkpoint": cnf.Solver(gradient="checkpoint"),
        "adjoint": cnf.Solver(gradient="adjoint"),
        "rk4": cnf.Solver("rk4"),
        "torchdiffeq": cnf.TorchDiffEq(),
    }
    for (name, field, error, words), (kind, solver) in itertools.product(wrong, solvers.items()):
        yield Case(
            f"field-{name}-{kind}", lambda f=field, s=solver: log_det(f, None, s), error, words
        )
    for name, field, error, words in wrong:
        yield Case(
            f"field-{name}-hutchinson",
            lambda f=field: cnf.CNF(f).forward_and_log_det(points(5)),
            error,
            words,
        )
        yield Case(
            f"field-{name}-value", lambda f=field: cnf.CNF(f).forward(points(5)), error, words
        )
    for name, field in (
        ("number", 3),
        ("one", lambda x: x),
        ("four", lambda t, x, context, extra: x),
    ):
        yield Case(
            f"not-a-field-{name}", lambda f=field: cnf.CNF(f), TypeError, ("field", "function")
        )


def solves() -> Iterator[Case]:
    """Fields that no solver can integrate, in every gradient mode and with every backend."""

    def nan_at_once(t: Tensor, x: Tensor) -> Tensor:
        return x * NAN

    def nan_later(t: Tensor, x: Tensor) -> Tensor:
        return x * (NAN if t > 0.5 else -1.0)

    def nan_in_sample(t: Tensor, x: Tensor) -> Tensor:
        return x * torch.where(x.detach()[:, :1] > 0.2, NAN, -1.0)

    def square(t: Tensor, x: Tensor) -> Tensor:  # x(t) = 1 / (1/2 - t) from x(0) = 2
        return x * x

    def stiff(t: Tensor, x: Tensor) -> Tensor:
        return -1e6 * (x - torch.cos(t))

    def singular(t: Tensor, x: Tensor) -> Tensor:  # x(t) = -log(1/e - t) from x(0) = 1
        return x.exp()

    two = torch.full((4, 1), 2.0)
    failing: list[tuple[str, Callable[..., Tensor], Tensor, str, tuple[str, ...]]] = [
        ("nan-at-once", nan_at_once, points(5), "non_finite_field", ("t=0 ", "weights", "5 of 5")),
        ("nan-later", nan_later, points(5), "non_finite_field", ("weights", "5 of 5")),
        ("nan-in-sample", nan_in_sample, points(5), "non_finite_field", ("2 of 5", "[3, 4]")),
        ("blow-up", square, two, "blow_up", ("bound the field", "4 of 4")),
        ("stiff", stiff, points(5), "too_many_steps", ("stiff", "loosen")),
        ("singular", singular, two / 2, "step_underflow", ("t=0.36788", "discontinuous", "smooth")),
    ]
    solvers: dict[str, cnf.Solver | cnf.TorchDiffEq] = {
        "backprop": cnf.Solver(),
        "checkpoint": cnf.Solver(gradient="checkpoint", max_steps=300),
        "adjoint": cnf.Solver(gradient="adjoint", max_steps=300),
        "tsit5": cnf.Solver("tsit5", max_steps=300),
        "rk4": cnf.Solver("rk4"),
        "euler": cnf.Solver("euler", gradient="checkpoint"),
        "torchdiffeq": cnf.TorchDiffEq(max_nfe=2000),
        "torchdiffeq-adjoint": cnf.TorchDiffEq(gradient="adjoint", max_nfe=1000),
        "torchdiffeq-rk4": cnf.TorchDiffEq("rk4"),
    }
    for (name, field, x, status, words), (kind, solver) in itertools.product(
        failing, solvers.items()
    ):
        fixed = kind in ("rk4", "euler", "torchdiffeq-rk4")
        if fixed and name in ("stiff", "singular"):
            continue  # equal steps see no stiffness: they overflow, or return something finite
        if kind == "torchdiffeq" and name == "singular":
            continue  # its first overflowing trial step counts as a NaN of the field
        if kind == "torchdiffeq-adjoint" and name in ("blow-up", "singular"):
            continue  # as without adjoint: the forward solve fails
        yield Case(
            f"{name}-{kind}",
            lambda f=field, x=x, s=solver: log_det(f, x.clone().requires_grad_(), s),
            cnf.SolverError,
            (*words, status, "Remedy"),
            status,
        )
    yield Case(
        "stiff-limit",
        lambda: log_det(stiff, None, cnf.Solver(max_steps=50)),
        cnf.SolverError,
        ("max_steps=50", "raise max_steps"),
        "too_many_steps",
    )
    yield Case(
        "stiff-limit-torchdiffeq",
        lambda: log_det(stiff, None, cnf.TorchDiffEq(max_nfe=50)),
        cnf.SolverError,
        ("max_nfe=50", "raise max_nfe"),
        "too_many_steps",
    )
    for solver in (cnf.Solver(), cnf.Solver("rk4"), cnf.Solver(gradient="adjoint")):
        yield Case(
            f"nan-weights-{solver.method}-{solver.gradient}",
            lambda s=solver: with_nan_weights(solver=s).log_prob(points(5)),
            cnf.SolverError,
            ("t=1 ", "field.network.2.weight", "weights"),
            "non_finite_field",
        )


def choices() -> Iterator[Case]:
    """Numbers out of range, and names that are not known."""
    for name in ("rtol", "atol"):
        for value in (-1e-5, NAN, float("inf")):
            for kind in (cnf.Solver, cnf.TorchDiffEq):
                yield Case(
                    f"{kind.__name__}-{name}-{value}",
                    lambda k=kind, n=name, v=value: k(**{n: v}),
                    ValueError,
                    (f"{name}={value}", "1e-5"),
                )
        yield Case(
            f"{name}-text", lambda n=name: cnf.Solver(**{n: "1e-5"}), TypeError, (name, "str")
        )
    both = ("rtol=0", "atol=0", "1e-5")
    yield Case("tolerances-zero", lambda: cnf.Solver(rtol=0, atol=0), ValueError, both)
    for name, value in itertools.product(("max_steps", "steps"), (0, -3, 2.5, True, "10")):
        yield Case(
            f"{name}-{value!r}",
            lambda n=name, v=value: cnf.Solver(**{n: v}),
            ValueError,
            (f"{name}={value!r}", "positive integer"),
        )
    yield Case("first-step", lambda: cnf.Solver(first_step=0.0), ValueError, ("first_step=0.0",))
    yield Case("probes", lambda: cnf.Hutchinson(probes=0), ValueError, ("probes=0", "positive"))
    yield Case("chunk", lambda: cnf.Exact(chunk_size=0), ValueError, ("chunk_size=0", "positive"))
    wrong = torch.ones(2, 5, 2)
    yield Case(
        "noise-shape",
        lambda: cnf.Hutchinson()(lambda t, x, c: x, torch.tensor(0.0), points(5), None, wrong),
        ValueError,
        ("noise", "(5, 1, 2)", "(2, 5, 2)", "sample_noise"),
    )
    methods = ("'dopri'", "euler", "dopri5", "Did you mean 'dopri8'")
    x, act = points(5), ("tanh", "softplus", "Did you mean 'softplus'")
    named: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
        ("method", lambda: cnf.Solver("dopri"), methods),
        ("torchdiffeq-method", lambda: cnf.TorchDiffEq("dopri"), methods),
        ("gradient", lambda: cnf.Solver(gradient="adjont"), ("backprop", "mean 'adjoint'")),
        ("error-control", lambda: cnf.Solver(error_control="stat"), ("log_det", "mean 'state'")),
        ("divergence", lambda: flow(divergence="exat"), ("hutchinson", "mean 'exact'")),
        ("call", lambda: flow().log_prob(x, divergence="huchinson"), ("mean 'hutchinson'",)),
        ("distribution", lambda: flow().distribution(divergence="exat"), ("mean 'exact'",)),
        ("noise", lambda: cnf.Hutchinson("rademaher"), ("rademaher", "'rademacher'", "gaussian")),
        ("activation", lambda: flow(activation="softpuls"), act),
    ]
    for name, call, words in named:
        yield Case(f"unknown-{name}", call, ValueError, words)
    kinds: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
        ("divergence", lambda: flow().log_prob(x, divergence=3), ("divergence", "int", "'exact'")),
        ("solver", lambda: flow().log_prob(x, solver="rk4"), ("solver", "cnf.Solver('rk4')")),
        ("generator", lambda: flow().sample(3, generator=0), ("generator", "int", "manual_seed")),
        ("choice", lambda: flow().log_prob(x, probes=3), ("probes",)),
        ("transform-choice", lambda: flow().transform.forward(x, probes=3), ("probes", "solver")),
        ("compose", lambda: cnf.Compose(nn.Tanh()), ("transforms[0]", "Tanh")),
        ("inverse", lambda: cnf.Inverse(3), ("transform", "int")),
        ("flow", lambda: cnf.Flow(cnf.StandardNormal(2), nn.Tanh()), ("transform", "Tanh")),
        ("base", lambda: flow(base="normal"), ("base", "str")),
        ("objective", lambda: cnf.MaximumLikelihood(nn.Tanh()), ("flow", "Tanh")),
    ]
    for name, call, words in kinds:
        yield Case(f"kind-{name}", call, TypeError, words)
    yield Case("compose-nothing", lambda: cnf.Compose(), ValueError, ("at least one",))


def sizes() -> Iterator[Case]:
    """Sizes and sample shapes."""
    for shape, error in (
        (-1, ValueError),
        ((3, -1), ValueError),
        (2.5, TypeError),
        (True, TypeError),
    ):
        words = ("sample shape", str(shape))
        for name in ("sample", "rsample", "sample_and_log_prob"):
            yield Case(
                f"{name}-{shape}", lambda n=name, s=shape: getattr(flow(), n)(s), error, words
            )
    for shape in ("3", None, (2, 1.0)):
        words = ("sample shape", repr(shape), "integer")
        yield Case(f"sample-{shape!r}", lambda s=shape: flow().sample(s), TypeError, words)
    for features in (0, -1, (2, 0), True):
        yield Case(
            f"features-{features}", lambda f=features: cnf.FFJORD(f), ValueError, ("features",)
        )
    yield Case("hidden", lambda: cnf.FFJORD(2, hidden=(8, 0)), ValueError, ("hidden=(8, 0)",))
    yield Case("blocks", lambda: cnf.FFJORD(2, blocks=0), ValueError, ("blocks", "positive"))
    yield Case("context-size", lambda: cnf.FFJORD(2, context=-1), ValueError, ("context=-1",))
    yield Case("event-shape", lambda: cnf.StandardNormal(2, 0), ValueError, ("event_shape=(2, 0)",))
    yield Case("event-tuple", lambda: cnf.StandardNormal((2, 3)), ValueError, ("event_shape",))
    yield Case("event-dims", lambda: cnf.CNF(cnf.MLPField(2), event_dims=-1), ValueError, ("=-1",))
    three = cnf.StandardNormal(3)
    words = ("base", "(3,)", "features=(2,)")
    yield Case("base-event", lambda: cnf.FFJORD(2, base=three), ValueError, words)
    normal = torch.distributions.Normal(torch.zeros(2), 1.0)
    words = ("base", "batch_shape (2,)", "Independent(base, 1)")
    yield Case("base-batch", lambda: cnf.FFJORD(2, base=normal), ValueError, words)


def layers() -> Iterator[Case]:
    """Discrete transforms and models: what cannot be built, or cannot be fed."""
    two = ("two dimensions or more",)
    yield Case("coupling-one-dimension", lambda: layer.Coupling(1), ValueError, two)
    yield Case("realnvp-one-dimension", lambda: cnf.RealNVP(1), ValueError, two)
    yield Case("hint-one-dimension", lambda: cnf.HINT(1), ValueError, two)
    for name, mask in (("all", torch.ones(3)), ("none", torch.zeros(3))):
        words = ("mask", "all of the 3 dimensions")
        yield Case(f"mask-{name}", lambda m=mask: layer.Coupling(3, m.bool()), ValueError, words)
    yield Case("mask-name", lambda: layer.Coupling(3, "half"), ValueError, ("'half'", "'halves'"))
    yield Case("mask-float", lambda: layer.Coupling(3, torch.ones(3)), TypeError, ("mask.bool()",))
    words = ("height 5 not divisible by 2",)
    yield Case("squeeze-odd", lambda: layer.Squeeze((1, 5, 5)), ValueError, words)
    words = ("height 10 not divisible by 4", "fewer levels")
    yield Case("glow-odd", lambda: cnf.Glow((1, 10, 10), levels=2), ValueError, words)
    yield Case("sample-context", lambda: flow(context=2).sample(points(5)), TypeError, ("(5, 2)",))
    yield Case("split-one", lambda: layer.Split(layer.Diagonal(1), 1), ValueError, ("1",))
    yield Case("permutation-width", lambda: layer.Permutation(5, [0, 1, 2, 3]), ValueError, ("5",))
    yield Case("planar-name", lambda: layer.Planar(2, activation="silu"), ValueError, ("'silu'",))
    yield Case(
        "ordering", lambda: layer.MaskedAutoregressive(3, ordering=[0, 1]), ValueError, ("[0, 1]",)
    )
    for rows in (0, 1):
        yield Case(
            f"actnorm-{rows}-rows",
            lambda n=rows: layer.ActNorm(2).inverse(torch.zeros(n, 2)),
            ValueError,
            ("ActNorm", "channel"),
        )
    yield Case(
        "actnorm-constant",
        lambda: layer.ActNorm(2).inverse(torch.ones(8, 2) * torch.tensor([1.0, 2.0])),
        ValueError,
        ("ActNorm", "channel 0", "constant"),
    )
    yield Case(
        "batchnorm-one-row",
        lambda: layer.BatchNorm(2).train().inverse(torch.ones(1, 2)),
        ValueError,
        ("BatchNorm",),
    )

    def singular() -> Tensor:
        linear = layer.Linear(2)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        return linear.forward_and_log_det(points(5))[1]

    yield Case("linear-singular", singular, ValueError, ("singular",))
    makes: dict[str, Callable[[], cnf.Flow]] = {
        "realnvp": lambda **o: cnf.RealNVP(2, 2, (8,), **o),
        "maf": lambda **o: cnf.MAF(2, 2, (8,), **o),
        "spline": lambda **o: cnf.NeuralSpline(2, 2, (8,), **o),
        "planar": lambda **o: cnf.PlanarFlow(2, 2, **o),
    }
    x, rows64 = points(5), ("x", "1 of 64 rows", "first index 3", "remove")
    for name, make in makes.items():
        for value in (NAN, float("inf")):
            yield Case(
                f"{name}-x-{value}", lambda m=make, v=value: m().log_prob(spoilt(v)),
                ValueError, rows64,
            )  # fmt: skip
        yield Case(
            f"{name}-x-int", lambda m=make: m().log_prob(x.long()), TypeError, ("int64", "float()")
        )
        both = ("torch.float32", "torch.float64", "x.to(", "module.to(")
        yield Case(f"{name}-x-f64", lambda m=make: m().log_prob(x.double()), TypeError, both)
        both = ("cuda:0", "cpu", "x.to(")
        far = elsewhere(*x.shape)
        yield Case(f"{name}-x-device", lambda m=make, far=far: m().log_prob(far), ValueError, both)
        meta = ("parameters", "meta", "to_empty")
        yield Case(
            f"{name}-module-meta", lambda m=make: m().to("meta").log_prob(x), ValueError, meta
        )
        yield Case(
            f"{name}-x-shape", lambda m=make: m().log_prob(points(5, 3)), ValueError,
            ("(5, 3)", "(..., D=2)"),
        )  # fmt: skip
        missing = ("context is missing", "context=3")
        yield Case(
            f"{name}-no-context", lambda m=make: m(context=3).log_prob(x), ValueError, missing
        )
        yield Case(
            f"{name}-extra-context", lambda m=make: m().log_prob(x, points(5, 3)), ValueError,
            ("context", "none of the"),
        )  # fmt: skip
        yield Case(
            f"{name}-nan-context",
            lambda m=make: m(context=2).log_prob(points(), spoilt(NAN)),
            ValueError,
            ("non-finite values in context",),
        )
        yield Case(
            f"{name}-nan-context-sample",
            lambda m=make: m(context=2).sample((), spoilt(NAN)),
            ValueError,
            ("non-finite values in context",),
        )


def pixel_flow(levels: Any = 256, alpha: float = 0.05, d: int = 4) -> cnf.Flow:
    """A flow of integers without parameters."""
    ends = cnf.Compose(cnf.Sigmoid(alpha), cnf.UniformDequantization(levels))
    return cnf.Flow(cnf.StandardNormal(d), ends)


def pixels() -> Iterator[Case]:
    """Pixels that are none, levels and alphas that cannot be, and dequantization out of place."""
    f, few = pixel_flow(), cnf.UniformDequantization(17).inverse
    unit = torch.linspace(0, 1, 12).reshape(3, 4)
    digits = torch.arange(12).reshape(3, 4)
    for name, own, x, error, words in (
        ("floats-to-1", f, unit, TypeError, ("0 to 255", "float32", "from 0 to 1", "255 * x")),
        ("floats-to-255", f, 255 * unit, TypeError, ("float32", "from 0 to 255", "x.round()")),
        ("complex", f, unit * 1j, TypeError, ("0 to 255", "complex64")),
        ("meta-floats", f, unit.to("meta"), TypeError, ("0 to 255", "unknown")),
        ("empty-floats", f, unit[:0], TypeError, ("0 to 255", "empty")),
        ("double", f, unit.double(), TypeError, ("float64", "from 0 to 1", "uint8")),
        ("shape", f, digits[:, :3], ValueError, ("(3, 3)", "D=4")),
        ("list", f, [1, 2, 3, 4], TypeError, ("x", "list")),
        ("meta", f, digits.to("meta"), ValueError, ("x is on meta", "cpu")),
        ("nan", f, NAN * unit, TypeError, ("float32", "NaN")),
    ):
        yield Case(f"pixels-{name}", lambda o=own, v=x: o.log_prob(v), error, words)
        yield Case(f"bits-{name}", lambda o=own, v=x: o.bits_per_dim(v), error, words)
    for name, x, seen in (
        ("uint16", (digits + 6).to(torch.uint16), "from 17 to 17"),
        ("17", digits + 6, "from 17 to 17"),
        ("uint8-17", (digits + 6).to(torch.uint8), "from 17 to 17"),
        ("minus-1", digits - 1, "from -1 to -1"),
    ):
        words = ("1 values", "levels=17", seen, "remove")
        yield Case(f"levels-of-{name}", lambda v=x: few(v), ValueError, words)
    diverged = cnf.Flow(
        cnf.StandardNormal(2), cnf.Compose(cnf.CNF(lambda t, x: x * NAN, "exact",
        cnf.Solver(on_failure="nan")), cnf.Sigmoid(), cnf.UniformDequantization()))  # fmt: skip
    words = ("6 of 6", "NaN", "diverged")
    yield Case("pixels-of-nan", lambda: diverged.sample((3,)), ValueError, words)
    yield Case(
        "pixels-too-many-levels-to-sample", lambda: pixel_flow(2**30).sample((3,)), ValueError,
        ("levels=", "double"),
    )  # fmt: skip
    half = pixel_flow().half()
    yield Case(
        "pixels-half", lambda: half.log_prob(digits), TypeError, ("the flow", "float32", "float16")
    )
    table = cnf.Flow(cnf.StandardNormal(4), cnf.UniformDequantization((3, None, 9, None)))
    real = torch.tensor([[0.0, -1.5, 8.0, 3.5]])
    for name, x, error, words in (
        ("whole", real + 0.5, ValueError, ("whole numbers", "from 0.5 to 8.5")),
        ("integers", real.long(), TypeError, ("int64", "x.float()")),
        ("nan", NAN * real, ValueError, ("non-finite",)),
        ("bits", None, TypeError, ("bits_per_dim needs integers",)),
    ):
        call = (lambda: table.bits_per_dim(real)) if x is None else lambda v=x: table.log_prob(v)
        yield Case(f"counts-{name}", call, error, words)
    for levels, error, word in (
        (1, ValueError, "2 or more"),
        (2**60, ValueError, "2^50"),
        (0, ValueError, "2 or more"),
        (True, TypeError, "integers"),
        (256.0, TypeError, "256.0"),
        ("256", TypeError, "'256'"),
        (None, TypeError, "None"),
        ((), ValueError, "names no column"),
        ((None,), ValueError, "names no column"),
        ((4, 1), ValueError, "2 or more"),
        ((4, 2.0), TypeError, "2.0"),
    ):
        yield Case(
            f"levels-{levels!r}", lambda n=levels: cnf.UniformDequantization(n), error,
            ("levels=", word),
        )  # fmt: skip
    yield Case(
        "levels-too-many", lambda: pixel_flow(2**23).log_prob(digits), ValueError,
        ("levels=8388608", "float32", "double"),
    )  # fmt: skip
    for alpha in (0, 0.5, -1.0, NAN, 1.0):
        yield Case(
            f"alpha-{alpha}", lambda a=alpha: cnf.Sigmoid(a), ValueError, ("alpha=", "0 and 0.5")
        )
    one = ("columns=2", "(0, 2)")
    yield Case("sigmoid-columns-2", lambda: cnf.Sigmoid(columns=2), TypeError, one)
    for columns in ((), (0, 0), (-1,), (0.5,)):
        yield Case(
            f"sigmoid-columns-{columns}", lambda c=columns: cnf.Sigmoid(columns=c), ValueError,
            ("columns=",),
        )  # fmt: skip
    yield Case(
        "sigmoid-columns-beyond", lambda: cnf.Sigmoid(columns=(4,)).forward(points(3, 4)),
        ValueError, ("(3, 4)", "columns=(4,)"),
    )  # fmt: skip
    yield Case("alpha-text", lambda: cnf.Sigmoid("0.05"), TypeError, ("alpha=", "str"))
    tiny = ("alpha=1e-09", "too small for float32", "1e-6")
    yield Case("alpha-1e-9", lambda: pixel_flow(alpha=1e-9).log_prob(digits), ValueError, tiny)
    yield Case("alpha-1e-9-sample", lambda: pixel_flow(alpha=1e-9).sample(), ValueError, tiny)
    logit = cnf.Sigmoid().inverse
    yield Case(
        "logit-above-1",
        lambda: logit(1.2 * unit),
        ValueError,
        ("2 values", "1.09091 to 1.2", "Sigmoid(alpha=0.05)"),
    )
    yield Case(
        "logit-below-0", lambda: logit(unit - 0.5), ValueError, ("-0.5 to", "Sigmoid(alpha=0.05)")
    )
    yield Case("logit-integers", lambda: logit(digits), TypeError, ("int64", "x.float()"))
    yield Case(
        "logit-context", lambda: logit(unit, unit), ValueError, ("context", "Sigmoid takes none")
    )
    end = cnf.UniformDequantization()
    for name, make, words in (
        ("compose", lambda: cnf.Compose(end, cnf.Sigmoid()), ("transforms[0]", "be the last")),
        ("inverse", lambda: cnf.Inverse(end), ("UniformDequantization", "no inverse")),
        ("split", lambda: layer.Split(end, 4), ("transform", "in a Compose")),
        ("multiscale", lambda: layer.Multiscale(cnf.Compose(end)), ("stages[0]", "at the end")),
    ):
        yield Case(f"dequantization-in-{name}", make, ValueError, ("integers", *words))
    q = cnf.RealNVP(4, context=4)
    variational = cnf.VariationalDequantization
    for name, make, error, words in (
        ("no-flow", lambda: variational(torch.nn.Linear(4, 4)), TypeError, ("q", "Linear")),
        ("no-context", lambda: variational(cnf.RealNVP(4)), ValueError, ("q", "context=4")),
        ("integers", lambda: variational(pixel_flow()), ValueError, ("q", "integers")),
        ("size", lambda: variational(cnf.RealNVP(4, context=3)), ValueError, ("3 features", "4")),
        ("columns", lambda: variational(q, (3, 4)), ValueError, ("q", "2 columns")),
        ("real", lambda: variational(q, (3, None, 4, 4)), ValueError, ("None", "Uniform")),
    ):
        yield Case(f"q-{name}", make, error, words)
    given = variational(cnf.RealNVP(4, context=6), context=2)
    for name, context, words in (
        ("missing", None, ("context is missing", "context=2")),
        ("size", points(3, 5), ("5 features", "context=2")),
    ):
        yield Case(
            f"q-context-{name}", lambda c=context: given.inverse(digits, c), ValueError, words
        )
    yield Case(
        "q-context-extra", lambda: variational(q).inverse(digits, points(3)), ValueError,
        ("context", "takes none"),
    )  # fmt: skip
    for name, call, words in (
        ("score", lambda: f.score(digits), ("score", "integers")),
        ("rsample", lambda: f.rsample((3,)), ("rsample", "sample")),
        ("rsample-log-prob", f.rsample_and_log_prob, ("sample_and_log_prob",)),
    ):
        yield Case(f"integers-{name}", call, TypeError, words)
    yield Case("bits-real", lambda: flow().bits_per_dim(points()), TypeError, ("needs integers",))
    for samples in (0, -1, 1.5, True):
        yield Case(
            f"bits-samples-{samples}", lambda k=samples: f.bits_per_dim(digits, samples=k),
            ValueError, ("samples=",),
        )  # fmt: skip
    yield Case(
        "bits-stderr-of-one", lambda: f.bits_per_dim(digits, return_stderr=True), ValueError,
        ("return_stderr", "samples"),
    )  # fmt: skip
    glow = cnf.Glow((1, 8, 8), levels=2, steps=1, hidden=(4,))
    yield Case(
        "glow-images-as-floats",
        lambda: cnf.Flow(glow.base, cnf.Compose(glow.transform, cnf.Sigmoid(), end)).log_prob(
            torch.rand(2, 1, 8, 8)
        ),
        TypeError,
        ("0 to 255", "float32"),
    )


def times() -> Iterator[Case]:
    """Times that are no numbers, not finite, or too close."""
    x = points(5)

    def solve(t0: Any, t1: Any) -> cnf.odeint:
        return cnf.odeint(lambda t, x: -x, x, t0, t1)

    for name, t0, t1, error, words in (
        ("nan", 0.0, NAN, ValueError, ("t1", "nan", "finite")),
        ("inf", -float("inf"), 0.0, ValueError, ("t0", "inf", "finite")),
        ("list", [0.0], 1.0, TypeError, ("t0", "list", "number")),
        ("text", 0.0, "1", TypeError, ("t1", "str", "number")),
        ("vector", 0.0, torch.tensor([0.5, 1.0]), ValueError, ("t1", "(2,)", "number")),
        ("close", 1e4, 1e4 + 1e-3, ValueError, ("t0", "t1", "resolution", "float64")),
    ):
        yield Case(f"time-{name}", lambda a=t0, b=t1: solve(a, b), error, words)
    cnf_nan = cnf.CNF(lambda t, x: -x, times=(0.0, NAN))
    yield Case("times-nan", lambda: cnf_nan.forward(x), ValueError, ("nan", "finite"))


def penalties() -> Iterator[Case]:
    """Regularisers of wrong weights, or for a flow that has no use for them."""
    f, energy = flow(), cnf.KineticEnergy(0.1)

    def loss(flow: Any = f, **options: Any) -> cnf.MaximumLikelihood:
        return cnf.MaximumLikelihood(flow, **options)

    for name, call, error, words in (
        ("weight", lambda: cnf.KineticEnergy(-1.0), ValueError, ("weight=-1.0", "0.01")),
        ("weight-nan", lambda: cnf.HJBResidual(NAN), ValueError, ("weight=nan", "finite")),
        ("weight-text", lambda: cnf.JacobianFrobenius("1"), TypeError, ("weight='1'", "number")),
        ("order", lambda: cnf.TaylorDerivative(1, 0.1), ValueError, ("order=1", "KineticEnergy")),
        ("kind", lambda: loss(regularizers=["kinetic"]), TypeError, ("regularizers[0]", "str")),
        ("no-list", lambda: loss(regularizers=energy), TypeError, ("list", "got KineticEnergy")),
        ("twice", lambda: loss(regularizers=[energy] * 2), ValueError, ("two", "keep one")),
        (
            "discrete",
            lambda: loss(cnf.RealNVP(2), regularizers=[energy]),
            ValueError,
            ("kinetic_energy", "CNF", "FFJORD"),
        ),
        (
            "potential",
            lambda: loss(regularizers=[cnf.HJBResidual(0.1)]),
            TypeError,
            ("HJBResidual", "MLPField", "PotentialField"),
        ),
        ("steer", lambda: loss(steer=1.5), ValueError, ("steer=1.5", "below the span", "smaller")),
        ("steer-sign", lambda: loss(steer=-0.1), ValueError, ("steer=-0.1", "not negative")),
    ):
        yield Case(f"penalty-{name}", call, error, words)


def autoencoders() -> Iterator[Case]:
    """Variational autoencoders of wrong parts, and data that their decoders refuse."""
    encoder, decoder = nn.Linear(3, 4), variational.Bernoulli(nn.Linear(2, 3))
    q, x = variational.posterior("planar", 2, 4, layers=1), torch.ones(5, 3)
    vae = variational.VAE(encoder, q, decoder)
    for name, call, error, words in (
        (
            "posterior-kind",
            lambda: variational.posterior("planer", 2, 4),
            ValueError,
            ("kind='planer'", "Did you mean 'planar'"),
        ),
        (
            "posterior-without-context",
            lambda: variational.VAE(encoder, cnf.RealNVP(2), decoder),
            ValueError,
            ("posterior", "takes no context", "context=C"),
        ),
        (
            "prior-dimensions",
            lambda: variational.VAE(encoder, q, decoder, cnf.StandardNormal(3)),
            ValueError,
            ("prior", "(3,)", "(2,)"),
        ),
        (
            "decoder-network",
            lambda: variational.Bernoulli(torch.sigmoid),
            TypeError,
            ("network", "nn.Module", "got builtin_function_or_method"),
        ),
        ("grey", lambda: vae.elbo(0.5 * x), ValueError, ("0 to 1", "0.5 to 0.5", "binarise")),
        ("nan", lambda: vae.elbo(NAN * x), ValueError, ("context", "non-finite", "5 of 5")),
        ("pixels", lambda: vae.iwae(x[:, :2]), RuntimeError, ("shapes",)),
        ("samples", lambda: vae.iwae(x, 0), ValueError, ("samples=0", "positive integer")),
        ("beta", lambda: vae.elbo(x, beta=None), TypeError, ("beta=None", "number")),
        ("no-vae", lambda: variational.ELBO(q), TypeError, ("vae", "got Flow")),
    ):
        yield Case(f"vae-{name}", call, error, words)


def targets() -> Iterator[Case]:
    """Targets of reverse KL and importance sampling that are none, and what is asked of them."""
    f = flow(solver=cnf.Solver("euler", steps=1))

    def density(x: Tensor) -> Tensor:
        return -x.square().sum(-1)

    def loss(log_density: Any = density, **options: Any) -> cnf.ReverseKL:
        return cnf.ReverseKL(f, log_density, **options)

    def estimate(log_density: Any = density, samples: Any = 10, **options: Any) -> Any:
        return cnf.importance_sampling(f, log_density, samples, **options)

    interval = layer.Interval
    for name, call, error, words in (
        ("flow", lambda: cnf.ReverseKL(f.transform, density), TypeError, ("flow", "got CNF")),
        ("values", lambda: loss(points()), TypeError, ("log_density", "function", "Tensor")),
        ("samples", lambda: loss(samples=0), ValueError, ("samples=0", "positive integer")),
        ("gradient", lambda: loss(gradient="pth"), ValueError, ("gradient='pth'", "'path'")),
        ("beta", lambda: loss()(beta=-1), ValueError, ("beta=-1", "0 or more")),
        ("beta-text", lambda: loss()(beta="1"), TypeError, ("beta='1'", "number")),
        ("generator", lambda: loss()(generator=0), TypeError, ("generator", "int", "manual_seed")),
        (
            "shape",
            lambda: loss(lambda x: -x.square())(),
            ValueError,
            ("log_density", "(256, 2)", "(256,)", "sum"),
        ),
        ("number", lambda: loss(lambda x: 0.0)(), TypeError, ("log_density", "float", "(256,)")),
        (
            "support",
            lambda: loss(lambda x: (x - 9).log().sum(-1))(),
            ValueError,
            ("log_density", "256 of 256", "Interval"),
        ),
        ("weights", lambda: estimate(lambda x: NAN * x[:, 0]), ValueError, ("10 of 10", "NaN")),
        ("one", lambda: estimate(samples=1), ValueError, ("samples=1", "2 or more")),
        ("batch", lambda: estimate(batch_size=0), ValueError, ("batch_size=0", "positive")),
        ("interval-order", lambda: interval(1, 0), ValueError, ("low=1", "high=0", "swap")),
        ("interval-nan", lambda: interval(0, NAN), ValueError, ("high=nan", "must be a number")),
        (
            "interval-outside",
            lambda: interval(0, 1).inverse(points()),
            ValueError,
            ("64 values", "Interval(0.0, 1.0)", "from -1 to", "remove"),
        ),
    ):
        yield Case(f"target-{name}", call, error, words)


def simulations() -> Iterator[Case]:
    """Simulators and judges of conditional flows, given what they cannot use."""
    moons, x, c = data.TwoMoons(), points(20), points(20)
    judge = calibration.simulation_based_calibration
    for name, call, error, words in (
        ("n", lambda: moons.sample(-1), ValueError, ("n must be 0 or more", "-1")),
        (
            "impossible",
            lambda: moons.posterior_sample(c + 5, 1),
            ValueError,
            ("c has 20 of 20 rows", "first index 0", "sample()"),
        ),
        (
            "broadcast",
            lambda: moons.posterior_log_prob(x[:3], c),
            ValueError,
            ("x of shape (3, 2)", "c of shape (20, 2)", "broadcast"),
        ),
        (
            "matrix",
            lambda: data.LinearGaussian(torch.ones(2)),
            ValueError,
            ("matrix", "(2,)", "(C, D)"),
        ),
        ("posterior", lambda: judge(None, x, c), TypeError, ("posterior", "lacks sample")),
        ("pairs", lambda: judge(flow(), x, c[:3]), ValueError, ("20 rows", "context 3")),
        (
            "context",
            lambda: judge(flow(), x, c),
            ValueError,
            ("context of shape", "takes none"),
        ),
        ("c2st", lambda: calibration.c2st(x, c[:9]), ValueError, ("b has 9 rows", "at least 10")),
        ("c2st-nan", lambda: calibration.c2st(NAN * x, c), ValueError, ("a has non-finite", "20")),
    ):
        yield Case(f"simulation-{name}", call, error, words)


CASES = [
    case
    for group in (
        inputs,
        contexts,
        fields,
        solves,
        choices,
        sizes,
        layers,
        pixels,
        times,
        penalties,
        autoencoders,
        targets,
        simulations,
    )
    for case in group()
]


def main() -> int:
    """Check every case; the number of complaints."""
    torch.set_num_threads(1)
    complaints = [(case.name, complaint(case)) for case in CASES]
    failed = [f"{name}: {text}" for name, text in complaints if text is not None]
    sys.stdout.write("\n".join([*failed, f"{len(CASES)} cases, {len(failed)} complaints\n"]))
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
