"""Outside the support of a flow: -inf there, and nothing changes for the other rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Pareto,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
    biject_to,
)

import cnf
from cnf.base import DistributionBase
from cnf.transforms import Coupling, Diagonal, Interval, Multiscale, Permutation, Split

INF = math.inf
ONES = torch.ones(2)
CORNERS = torch.tensor([[0.0, 0.0], [2.0, 2.0]])


def drawn(transform: cnf.Transform, std: float = 0.5) -> cnf.Transform:
    """Every parameter drawn anew."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(0.0, std)
    return transform


def flow_to(*ends: cnf.Transform) -> cnf.Flow:
    start = drawn(cnf.Compose(Coupling(2, hidden=(8,)), Permutation(2), Diagonal(2)))
    return cnf.Flow(cnf.StandardNormal(2), cnf.Compose(start, *ends))


# Bases: (distribution, a point outside, a point inside)
BASES: dict[str, tuple[Distribution, list[float], list[float]]] = {
    "exponential": (Independent(Exponential(ONES), 1), [0.5, -1.0], [0.5, 1.0]),
    "uniform": (Independent(Uniform(-ONES, ONES), 1), [0.0, 1.5], [0.3, -0.4]),
    "gamma": (Independent(Gamma(0.5 * ONES, ONES), 1), [-2.0, 1.0], [2.0, 1.0]),
    "beta": (Independent(Beta(2 * ONES, 3 * ONES), 1), [0.5, 1.1], [0.5, 0.1]),
    "log-normal": (Independent(LogNormal(0 * ONES, ONES), 1), [0.0, 1.0], [0.1, 1.0]),
    "half-normal": (Independent(HalfNormal(ONES), 1), [-0.5, 1.0], [0.5, 1.0]),
    "pareto": (Independent(Pareto(ONES, 2 * ONES), 1), [0.5, 2.0], [1.5, 2.0]),
    "dirichlet": (Dirichlet(2 * ONES), [0.5, 0.6], [0.5, 0.5]),
    "stretched": (
        TransformedDistribution(Independent(Exponential(ONES), 1), [AffineTransform(1.0, -2.0)]),
        [1.5, 0.0],
        [0.5, 0.0],
    ),
    "squashed": (
        TransformedDistribution(Independent(Normal(0 * ONES, ONES), 1), [SigmoidTransform()]),
        [0.5, -0.1],
        [0.5, 0.1],
    ),
    "two boxes": (
        MixtureSameFamily(
            Categorical(ONES),
            Independent(
                Uniform(torch.tensor([[0.0, 0], [2, 2]]), torch.tensor([[1.0, 1], [3, 3]])), 1
            ),
        ),
        [0.5, 2.5],
        [2.5, 2.5],
    ),
}
each_base = pytest.mark.parametrize("name", BASES)


@pytest.fixture(params=[True, False], ids=["validated", "not validated"])
def _validation(request) -> None:
    """torch's global flag, which an import of its compiler switches off."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(request.param)
    yield
    Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("_validation")
@each_base
def test_a_base_is_minus_infinity_outside_whatever_torch_validates(name: str) -> None:
    distribution, outside, inside = BASES[name]
    base = DistributionBase(distribution)
    assert base.bounded
    z = torch.tensor([inside, outside, [math.nan, 0.5], inside], requires_grad=True)
    log_prob = base.log_prob(z)
    alone = base.log_prob(z[:1].detach())
    assert log_prob[1] == -INF
    assert log_prob[2].isnan()
    assert torch.equal(log_prob[::3].detach(), alone.expand(2))
    if name != "two boxes":  # torch refuses what not all of its components hold
        torch.testing.assert_close(alone, distribution.log_prob(z[:1].detach()))
    (gradient,) = torch.autograd.grad(log_prob[:2].clamp(min=-9).sum() + 0 * z[:2].sum(), z)
    assert gradient[:2].isfinite().all()
    assert not gradient[1].any()
    mapped = torch.func.vmap(base.log_prob)(z.detach())
    torch.testing.assert_close(mapped, log_prob.detach(), equal_nan=True)


def test_two_boxes_are_half_full_each() -> None:
    base = DistributionBase(BASES["two boxes"][0])
    torch.testing.assert_close(
        base.log_prob(torch.tensor([[2.5, 2.5]])), torch.tensor([-math.log(2)])
    )


def test_a_base_on_all_of_space_is_asked_as_it_is() -> None:
    for distribution in (
        Independent(Laplace(0 * ONES, ONES), 1),
        MixtureSameFamily(Categorical(ONES), Independent(Normal(torch.zeros(2, 2), 1.0), 1)),
    ):
        base = DistributionBase(distribution)
        assert not base.bounded
        z = torch.randn(5, 2)
        assert torch.equal(base.log_prob(z), distribution.log_prob(z))


@pytest.mark.parametrize("shape", [(5, 0), (5, 3), (5,)], ids=str)
def test_samples_of_another_shape_are_refused_by_the_base(shape) -> None:
    for base in (cnf.StandardNormal(2), DistributionBase(BASES["uniform"][0])):
        with pytest.raises(ValueError, match=r"z has shape .*expected \(\.\.\., D=2\)"):
            base.log_prob(torch.zeros(shape))


def test_samples_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(5, 0\).*features must be 1 or more"):
        cnf.CNF(lambda t, x: -x, "exact").inverse_and_log_det(torch.zeros(5, 0))
    with pytest.raises(ValueError, match=r"features must be 1"):
        cnf.CNF(lambda t, x: -x, event_dims=2).forward(torch.zeros(5, 3, 0))
    with pytest.raises(ValueError, match=r"event_shape \(0,\)"):
        DistributionBase(Independent(Normal(torch.zeros(0), torch.ones(0)), 1))
    scalars = cnf.CNF(lambda t, x: -x, "exact", event_dims=0)
    assert scalars.forward(torch.zeros(5, 0)).shape == (5, 0)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_a_continuous_flow_knows_its_own_samples(gradient: str) -> None:
    """The solve back to the base misses an end by up to 30 times the tolerance."""
    uniform = BASES["uniform"][0]
    flow = cnf.FFJORD(2, hidden=(16,), base=uniform, divergence="exact")
    drawn(flow.transform, 0.4)
    along = torch.linspace(-0.99, 0.99, 100)
    z = torch.stack((torch.full((100,), 1 - 1e-6), along), 1)
    z = torch.cat((z, -z, z.flip(1)))  # what the base may draw, near its ends
    x, log_det = flow.transform.forward_and_log_det(z)
    strict = DistributionBase(uniform).log_prob(flow.transform.inverse(x))
    assert not strict.isfinite().all(), "tests nothing"
    again = flow.log_prob(x.detach(), solver=cnf.Solver(gradient=gradient))
    torch.testing.assert_close(again, -math.log(4) - log_det, rtol=0, atol=5e-3)
    again.mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    far = flow.log_prob(flow.transform.forward(torch.tensor([[-1.1, 0.5], [0.5, 0.5]])))
    assert far.isfinite().tolist() == [False, True]


ENDS: dict[str, tuple[Callable[[], cnf.Transform], list[float]]] = {
    "interval": (lambda: Interval(-1, 1), [0.5, 1.5]),
    "one column": (lambda: Interval(-1, 1, columns=(1,)), [0.5, 1.5]),
    "half-line": (lambda: Interval(-1, INF), [0.5, -1.5]),
    "half-line below": (lambda: Interval(-INF, 1), [0.5, 1.5]),
    "tensors": (lambda: Interval(torch.tensor([-INF, -1.0]), torch.tensor([1.0, INF])), [1.5, 0.0]),
    "sigmoid": (lambda: cnf.Sigmoid(0.05), [0.5, 1.2]),
    "split": (lambda: Split(Interval(-1, 1), 2), [1.5, 0.5]),
    "multiscale": (lambda: Multiscale(Interval(-1, 1), Diagonal(2)), [1.5, 0.5]),
    "nested": (lambda: cnf.Compose(Interval(-1, 1), Permutation(2)), [0.5, 1.5]),
}
each_end = pytest.mark.parametrize("end", ENDS)


@each_end
def test_one_row_outside_does_not_change_the_others(end: str) -> None:
    """Neither values, nor scores, nor the gradient of the parameters."""
    make, outside = ENDS[end]
    flow = flow_to(make())
    x = torch.cat([flow.sample((5,)), torch.tensor([outside])])
    log_prob = flow.log_prob(x)
    alone = flow.log_prob(x[:5])
    assert log_prob[5] == -INF
    torch.testing.assert_close(log_prob[:5], alone)
    own = list(flow.parameters())
    gradients = torch.autograd.grad(log_prob.clamp(min=-1e3).sum(), own)
    for found, truth in zip(gradients, torch.autograd.grad(alone.sum(), own), strict=True):
        torch.testing.assert_close(found, truth)
    score = flow.score(x)
    torch.testing.assert_close(score[:5], flow.score(x[:5]))
    assert score[5].isnan().all(), "a density of zero has no score"
    each = torch.func.vmap(torch.func.grad(lambda v: flow.log_prob(v[None])[0]))(x)
    torch.testing.assert_close(each[:5], score[:5])


@each_end
def test_a_distribution_has_the_support_of_its_flow(end: str) -> None:
    make, outside = ENDS[end]
    d = flow_to(make()).distribution()
    x = torch.cat([d.sample((20,)), torch.tensor([outside])])
    assert d.support.event_dim == 1
    assert d.support.check(x).tolist() == [True] * 20 + [False]
    if end not in ("split", "multiscale", "nested"):  # whose support has no name in torch
        mapped = biject_to(d.support)(torch.randn(100, 2))
        assert d.log_prob(mapped).isfinite().all()


@each_base
def test_the_support_of_a_flow_with_a_bounded_base(name: str) -> None:
    distribution, outside, inside = BASES[name]
    flow = cnf.Flow(distribution, Diagonal(2))
    drawn(flow.transform)
    x = flow.transform.forward(torch.tensor([outside, inside]))
    support = flow.distribution().support
    if name != "dirichlet":  # a Diagonal leaves the simplex
        assert support.check(x).tolist() == [False, True]
    assert not support.check(x * math.nan).any()


def test_the_support_of_integers_behind_an_interval_is_its_levels() -> None:
    d = flow_to(cnf.Sigmoid(), cnf.UniformDequantization(4)).distribution()
    assert d.support.check(torch.tensor([[0, 3], [4, 0], [-1, 0]])).tolist() == [True, False, False]


def test_integers_beyond_the_levels_have_no_probability() -> None:
    flow = flow_to(cnf.Sigmoid(), cnf.UniformDequantization(16))
    for dtype in (torch.uint8, torch.int64, torch.uint16):
        x = torch.tensor([[3, 15], [3, 16]]).to(dtype)
        log_prob = flow.log_prob(x)
        assert log_prob.isfinite().tolist() == [True, False]
        assert flow.bits_per_dim(x, samples=3)[1] == INF
    with pytest.raises(ValueError, match=r"1 values outside of what UniformDequantization"):
        flow.transform.inverse(x)


@pytest.mark.parametrize("end", ["interval", "half-line", "sigmoid", "split"])
def test_values_alone_are_refused_outside(end: str) -> None:
    """There `inverse` has no log-determinant by which to say so."""
    make, outside = ENDS[end]
    transform, x = make(), torch.tensor([[0.5, 0.5], outside])
    z, log_det = transform.inverse_and_log_det(x)
    assert z.isfinite().all()
    assert (log_det == -INF).any()
    for call in (transform.inverse, cnf.Inverse(transform).forward_and_log_det):
        with pytest.raises(ValueError, match=r"outside of what (Interval|Sigmoid|Split)"):
            call(x)
        found = torch.func.vmap(call)(x)
        found = found if isinstance(found, Tensor) else found[0]
        assert found.isnan().any(-1).tolist() == [False, True]


@pytest.mark.parametrize("columns", [None, (0,)], ids=["all", "one"])
def test_a_layer_before_the_end_meets_finite_numbers(columns) -> None:
    """A CNF would refuse others, or try to follow them."""
    field = cnf.CNF(cnf.MLPField(2, (8,)), "exact")
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(field, Interval(-1, 1, columns=columns)))
    x = torch.tensor([[0.5, 0.5], [3e38, 0.0], [-1e9, 0.5]])
    assert flow.log_prob(x).isfinite().tolist() == [True, False, False]


def test_an_infinite_density_of_the_base_does_not_hide_the_outside() -> None:
    flow = cnf.Flow(BASES["gamma"][0], Interval(-1, 1))
    assert flow.log_prob(torch.tensor([[0.5, 1.5]])) == -INF


def test_far_out_only_what_overflows_is_lost() -> None:
    """Numbers that a flow brings near keep their density, and NaN parameters stay NaN."""
    big = 1e30
    flow = cnf.Flow(cnf.StandardNormal(2), Diagonal(2))
    with torch.no_grad():
        log_scale = next(p for n, p in flow.named_parameters() if n.endswith("log_scale"))
        log_scale.fill_(math.log(big))
    x = torch.tensor([[big, -big], [1.0, 0.0], [3e38, 0.0]])
    truth = Normal(0.0, 1.0).log_prob(x.double() / big).sum(1) - 2 * math.log(big)
    torch.testing.assert_close(flow.log_prob(x).double(), truth, rtol=1e-4, atol=1e-3)
    model = cnf.RealNVP(2, hidden=(8,), layers=2)
    drawn(model.transform)
    x = torch.tensor([[0.3, -0.2], [3e38, -3e38]])
    log_prob = model.log_prob(x)
    assert log_prob[0].isfinite()
    assert log_prob[1] == -INF
    log_prob.clamp(min=-9).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    assert model.log_prob(x).isnan().all()


@pytest.mark.parametrize(
    ("shape", "bad"), [((6, 3), [1]), ((3,), range(6)), ((1, 3), range(6))], ids=str
)
def test_context_that_is_not_finite_costs_its_rows_alone(shape, bad) -> None:
    flow = cnf.RealNVP(2, hidden=(8,), layers=2, context=3)
    drawn(flow.transform)
    x, context = torch.randn(6, 2), torch.randn(shape)
    x[4, 0] = INF
    context.view(-1, 3)[1 if len(context.view(-1, 3)) > 1 else 0, 2] = math.nan
    good = torch.tensor([i not in (4, *bad) for i in range(6)])
    log_prob = flow.log_prob(x, context, on_nonfinite="nan")
    assert torch.equal(~log_prob.isnan(), good)
    kept = context.expand(6, 3)[good]
    assert torch.equal(log_prob[good], flow.log_prob(x[good], kept))
    with pytest.raises(ValueError, match="non-finite values in context"):
        flow.log_prob(x[:4], context[:4])


def test_context_that_is_not_finite_of_integers() -> None:
    start = cnf.RealNVP(2, hidden=(8,), layers=2, context=3).transform
    ends = cnf.Sigmoid(), cnf.UniformDequantization(4)
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(start, *ends))
    context = torch.randn(3, 3)
    context[1] = math.nan
    log_prob = flow.log_prob(torch.ones(3, 2, dtype=int), context, on_nonfinite="nan")
    assert log_prob.isnan().tolist() == [False, True, False]


def test_the_end_of_a_half_line_belongs_to_the_support() -> None:
    flow = cnf.Flow(cnf.StandardNormal(1), Interval(-math.inf, 5.0))
    x = flow.transform.forward(20 * torch.randn(5000, 1))
    support = flow.distribution().support
    assert (x == 5).any()
    assert support.check(x).all()
    assert not support.check(torch.tensor([5.1]))


def test_the_ends_of_a_squashed_base_have_no_density() -> None:
    """There torch computes inf - inf."""
    normal = Independent(torch.distributions.Normal(torch.zeros(1), torch.ones(1)), 1)
    base = DistributionBase(
        torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    )
    found = base.log_prob(torch.tensor([[1.0], [-1.0], [2.0], [0.5]]))
    assert found.isinf().tolist() == [True, True, True, False]
    assert (found < 0).all()


@pytest.mark.parametrize("mode", ["autograd", "torch.func"])
def test_a_row_outside_has_no_gradient(mode: str) -> None:
    flow = cnf.Flow(cnf.StandardNormal(2), Interval(0.0, 1.0))
    x = torch.tensor([[1.5, 0.3], [0.4, 0.3]])
    if mode == "autograd":
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)
    else:
        found = torch.func.vmap(torch.func.grad(flow.log_prob))(x)
    assert torch.equal(found[0], torch.zeros(2))
    torch.testing.assert_close(found[1], flow.score(x)[1])
