"""Outside the support of a flow log_prob is -inf, and the other rows keep their values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Exponential,
    Gamma,
    Independent,
    Normal,
    Uniform,
)

import cnf
from cnf.transforms import Diagonal, Interval, Multiscale

from .table import Case, Sample, standard_normal

INF = math.inf
ONES = torch.ones(2)
STEPS = cnf.Solver("rk4", steps=10)
DISCRETE = ("eager", "torch.func", "torch.compile")
QUICK = ("eager", "torch.func")  # what others compile
TRACED = ("torch.func", "torch.compile")

LOW, HIGH = torch.tensor([0.0, -1.0, -INF, -INF]), torch.tensor([INF, 1.0, 3.0, INF])
UNIT = Independent(Uniform(0 * ONES, ONES), 1)


def behind(*transforms: cnf.Transform, base: cnf.StandardNormal | Distribution) -> cnf.Flow:
    return cnf.Flow(base, cnf.Compose(*transforms))


def normal(end: cnf.Transform, rows: list[list[float]]) -> Callable[[], Sample]:
    """A flow whose z is standard normal, by the identity and an end; and its data."""
    x = torch.tensor(rows)
    base = cnf.StandardNormal(x.shape[-1])
    return lambda: Sample(behind(Diagonal(x.shape[-1]), end, base=base), x)


def elementwise(z_of: Callable[[Tensor], Tensor], low: float, high: float) -> Callable[..., Tensor]:
    """The density of x whose z(x) is standard normal, from autograd in float64."""

    def truth(x: Tensor, context: Tensor | None) -> Tensor:
        inside = (x >= low) & (x <= high)
        safe = torch.where(inside, x, z_of(torch.zeros(())) * 0 + 0.5).double().requires_grad_()
        z = z_of(safe)
        (slope,) = torch.autograd.grad(z.sum(), safe)
        each = Normal(0.0, 1.0).log_prob(z) + slope.log()
        return torch.where(inside, each, -INF).sum(1).detach()

    return truth


def mixed(x: Tensor, context: Tensor | None) -> Tensor:
    """The four kinds of ends of `LOW` and `HIGH`."""
    maps = (
        elementwise(lambda v: v.expm1().log(), 0, INF),
        elementwise(lambda v: (1 + v).log() - (1 - v).log(), -1, 1),
        elementwise(lambda v: -(3 - v).expm1().log(), -INF, 3),
        elementwise(lambda v: v, -INF, INF),
    )
    return torch.stack([f(x[:, i : i + 1], None) for i, f in enumerate(maps)]).sum(0)


def scaling(rate: float, solver: cnf.Solver) -> cnf.CNF:
    """dx/dt = rate x: x = z exp(rate)."""
    field = cnf.LinearField(2)
    with torch.no_grad():
        field.linear.weight.copy_(rate * torch.eye(2))
        field.linear.bias.zero_()
    return cnf.CNF(field.requires_grad_(False), "exact", solver)


def cnf_of(rows: list[list[float]], base: Distribution, solver: cnf.Solver) -> Sample:
    """x = z sqrt(e)."""
    return Sample(cnf.Flow(base, scaling(0.5, solver)), torch.tensor(rows))


def stretched(log_density: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The density of x = z sqrt(e), from that of one z >= 0."""

    def truth(x: Tensor, context: Tensor | None) -> Tensor:
        z = x.double() * math.exp(-0.5)
        return torch.where(z >= 0, log_density(z.abs()), -INF).sum(1) - 0.5 * x.shape[1]

    return truth


def interval_behind_cnf() -> Sample:
    flow = behind(scaling(-0.5, STEPS), Interval(-1, 1), base=cnf.StandardNormal(2))
    return Sample(flow, torch.tensor([[0.3, -0.2], [1.5, 0.1], [-0.9, 0.99], [0.0, -40.0]]))


def scaled_in_interval(x: Tensor, context: Tensor | None) -> Tensor:
    """z = e^(1/2) logit((1 + x) / 2) is standard normal."""
    of_logit = elementwise(lambda v: math.exp(0.5) * ((1 + v).log() - (1 - v).log()), -1, 1)
    return of_logit(x, None)


def levels(x: Tensor, context: Tensor | None) -> Tensor:
    """Uniform on 16 levels in each of two dimensions."""
    inside = (x >= 0) & (x < 16) & (x == x.floor())
    return torch.where(inside, -math.log(16), -INF).sum(1)


def table_row(x: Tensor, context: Tensor | None) -> Tensor:
    """Uniform on 3 levels, and on the unit interval."""
    first = (x[:, 0] >= 0) & (x[:, 0] < 3) & (x[:, 0] == x[:, 0].floor())
    return torch.where(first & (x[:, 1] >= 0) & (x[:, 1] < 1), -math.log(3), -INF)


def halves(x: Tensor, context: Tensor | None) -> Tensor:
    """`Multiscale`: an interval for the first of two numbers, nothing for the second."""
    of_logit = elementwise(lambda v: (1 + v).log() - (1 - v).log(), -1, 1)
    return of_logit(x[:, :1], None) + standard_normal(x[:, 1:])


def far_out(make: Callable[[], cnf.Flow], number: float, dtype: torch.dtype) -> Sample:
    """A flow with parameters of its own, and a row that overflows in it."""
    torch.manual_seed(0)
    flow = make()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0.0, 0.5)
    x = torch.randn(4, *flow.event_shape).to(dtype)
    x[1] = torch.tensor([number, -number, number], dtype=dtype)
    return Sample(flow.to(dtype), x)


def near_alone(make: Callable[[], cnf.Flow]) -> Callable[..., Tensor]:
    """-inf for the row far out; for the others what they have without it, in float64."""

    def truth(x: Tensor, context: Tensor | None) -> Tensor:
        flow = far_out(make, 1.0, torch.float64).flow
        log_prob = torch.full((4,), -INF, dtype=torch.float64)
        log_prob[[0, 2, 3]] = flow.log_prob(x[[0, 2, 3]].double()).detach()
        return log_prob

    return truth


SMALL = {"hidden": (8,), "layers": 2}
MODELS: dict[str, Callable[[], cnf.Flow]] = {
    "RealNVP": lambda: cnf.RealNVP(3, **SMALL),
    "NICE": lambda: cnf.NICE(3, **SMALL),
    "MAF": lambda: cnf.MAF(3, **SMALL),
    "IAF": lambda: cnf.IAF(3, **SMALL),
    "HINT": lambda: cnf.HINT(3, **SMALL),
    "NeuralSpline": lambda: cnf.NeuralSpline(3, **SMALL),
    "PlanarFlow": lambda: cnf.PlanarFlow(3, layers=2),
    "RadialFlow": lambda: cnf.RadialFlow(3, layers=2),
    "SylvesterFlow": lambda: cnf.SylvesterFlow(3, layers=2),
}

exponential = Independent(Exponential(ONES), 1)
gamma = Independent(Gamma(3 * ONES, ONES), 1)
POSITIVE = [[0.5, 2.0], [-0.3, 1.0], [1e-3, 0.1], [3.0, -7.0]]

CASES = [
    Case(
        "outside an interval",
        normal(Interval(-1, 1), [[0.5, -0.5], [1.5, 0.0], [-0.999, 0.1], [0.2, -1e30]]),
        elementwise(lambda v: (1 + v).log() - (1 - v).log(), -1, 1),
        modes=DISCRETE,
    ),
    Case(
        "outside the interval of one column",
        normal(Interval(-1, 1, columns=(0,)), [[0.5, -5.0], [1.5, 0.0], [-0.9, 2.0]]),
        halves,
        modes=QUICK,
    ),
    Case(
        "outside half of a multiscale flow",
        lambda: Sample(
            cnf.Flow(cnf.StandardNormal(2), Multiscale(Interval(-1, 1), Diagonal(2))),
            torch.tensor([[0.5, -5.0], [1.5, 0.0], [-0.9, 2.0]]),
        ),
        halves,
        modes=QUICK,
    ),
    Case(
        "outside intervals, half-lines and none at once",
        normal(
            Interval(LOW, HIGH),
            [
                [0.5, -0.5, 2.0, -7.0],
                [-0.1, 0.0, 0.0, 0.0],
                [1e-6, 0.9, -50.0, 2.0],
                [80.0, 0.1, 3.1, 0.0],
                [0.5, 1.1, -1.0, 0.0],
            ],
        ),
        mixed,
        modes=DISCRETE,
    ),
    Case(
        "outside the range of a sigmoid",
        normal(cnf.Sigmoid(0.05), [[0.5, 0.1], [1.2, 0.5], [0.0, 1.0], [-0.06, 0.3]]),
        elementwise(
            lambda v: (0.05 + 0.9 * v).log() - (0.95 - 0.9 * v).log(), -0.05 / 0.9, 1 + 0.05 / 0.9
        ),
        modes=QUICK,
    ),
    Case(
        "outside an interval behind a CNF",
        interval_behind_cnf,
        scaled_in_interval,
        modes=("eager", "torch.func", "compiled steps"),
    ),
    Case(
        "no level",
        lambda: Sample(
            cnf.Flow(UNIT, cnf.UniformDequantization(16)),
            torch.tensor([[0, 15], [16, 3], [7, -1], [15, 15]]),
        ),
        levels,
        modes=QUICK,
    ),
    Case(
        "no level in a table",
        lambda: Sample(
            cnf.Flow(UNIT, cnf.UniformDequantization((3, None))),
            torch.tensor([[0.0, 0.5], [3.0, 0.5], [2.0, 1.5], [-1.0, 0.1], [2.0, 0.9]]),
        ),
        table_row,
        modes=DISCRETE,
    ),
    Case(
        "a fraction where a level is due, traced",
        lambda: Sample(
            cnf.Flow(UNIT, cnf.UniformDequantization((3, None))),
            torch.tensor([[0.0, 0.5], [0.5, 0.5]]),
        ),
        table_row,
        modes=TRACED,
    ),
    Case(
        "a fraction where a level is due",
        lambda: Sample(
            cnf.Flow(UNIT, cnf.UniformDequantization((3, None))),
            torch.tensor([[0.0, 0.5], [0.5, 0.5]]),
        ),
        refused=(ValueError, "whole numbers.*with fractions"),
        modes=("eager",),
    ),
    Case(
        "floats where levels are due",
        lambda: Sample(cnf.Flow(UNIT, cnf.UniformDequantization(16)), torch.rand(2, 2)),
        refused=(TypeError, "integers from 0 to 15"),
        modes=QUICK,
    ),
    Case(
        "outside an exponential base",
        lambda: cnf_of(POSITIVE, exponential, STEPS),
        stretched(lambda z: -z),
    ),
    Case(
        "outside a gamma base",
        lambda: cnf_of(POSITIVE, gamma, cnf.Solver(rtol=1e-6, atol=1e-6)),
        stretched(lambda z: 2 * z.log() - z - math.log(2)),
        modes=("eager",),
    ),
    Case(
        "outside a uniform base",
        lambda: cnf_of([[0.5, 1.5], [1.7, 0.1], [-0.3, 1.0], [1.6, 1.64]], UNIT, STEPS),
        stretched(lambda z: torch.where(z < 1, 0.0, -INF)),
        modes=("eager", "torch.func", "compiled steps"),
    ),
    *(
        Case(
            f"{name} far out in {dtype}",
            lambda make=make, number=number, dtype=dtype: far_out(make, number, dtype),
            near_alone(make),
            modes=DISCRETE if name == "NICE" else QUICK,
        )
        for name, make in MODELS.items()
        for number, dtype in ((3e38, torch.float32), (1.7e308, torch.float64))
        if dtype == torch.float32 or name in ("RealNVP", "RadialFlow")
    ),
]
