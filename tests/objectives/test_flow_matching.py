"""Flow matching against closed forms: the velocity of Gaussian paths, its least loss, couplings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Laplace

import cnf
from cnf.objectives.couplings import OptimalTransport
from cnf.objectives.paths import PATHS, Linear, Path, as_path
from cnf.objectives.terms import record_terms
from cnf.objectives.time_sampling import TIME_SAMPLING, LogitNormal, LogUniform, Stratified
from cnf.transforms import Diagonal

MEAN, STD = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.5]).double()


def normal_velocity(path: Path, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """E[dx_t/dt | x_t = x] and its mean square error, from N(0, 1) to N(MEAN, STD^2), t (B,)."""
    alpha, sigma, d_alpha, d_sigma = (c.unsqueeze(-1) for c in path.coefficients(t))
    variance = alpha**2 * STD**2 + sigma**2
    covariance = alpha * d_alpha * STD**2 + sigma * d_sigma
    velocity = d_alpha * MEAN + covariance / variance * (x - alpha * MEAN)
    rest = d_alpha**2 * STD**2 + d_sigma**2 - covariance**2 / variance
    return velocity, rest


class Exact(nn.Module):
    """The closed form, off by w g(t, x), from time 0 to `span`."""

    batched_time = True

    def __init__(self, path: Path, span: float = 1.0) -> None:
        super().__init__()
        self.path, self.span = path, span
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        s = (t / self.span).expand(len(x))
        velocity, _ = normal_velocity(self.path, s, x)
        other = torch.stack((torch.ones_like(x), x, torch.sin(3 * x + s.unsqueeze(-1))), -1)
        return (velocity + other @ self.w) / self.span


def batch(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return MEAN + STD * torch.randn(n, 2, dtype=torch.float64, generator=generator)


def normal_flow(field: nn.Module, times: tuple[float, float] = (0.0, 1.0)) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(2).double(), cnf.CNF(field, "exact", times=times))


@pytest.mark.parametrize("span", [1.0, 2.0])
@pytest.mark.parametrize("name", PATHS)
def test_the_closed_form_of_gaussians_has_the_least_loss(name: str, span: float) -> None:
    torch.manual_seed(0)
    path, n = as_path(name), 80_000
    field = Exact(path, span)
    objective = cnf.FlowMatching(normal_flow(field, (0.0, span)), path=path)
    losses, slopes = [], []
    for seed in range(8):
        loss = objective(batch(n // 8, seed))
        (slope,) = torch.autograd.grad(loss, field.w)
        losses.append(loss.detach())
        slopes.append(slope)
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    least = normal_velocity(path, t, torch.zeros(1, 2).double())[1].mean()
    error = torch.stack(losses).std() / math.sqrt(8)
    assert abs(torch.stack(losses).mean() - least) < 5 * error
    noise = torch.stack(slopes).std(0) / math.sqrt(8)
    assert (torch.stack(slopes).mean(0).abs() < 6 * noise).all()
    assert (noise < 0.1).all()


def test_the_closed_form_carries_the_base_to_the_data() -> None:
    flow = normal_flow(Exact(Linear()))
    x = batch(50)
    tight = cnf.Solver("dopri5", rtol=1e-9, atol=1e-9)
    truth = Independent(torch.distributions.Normal(MEAN, STD), 1).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x, solver=tight), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_regression_at_one_time_finds_the_velocity_of_gaussians(name: str, time: float) -> None:
    """The least-squares field affine in x is the closed form, since all is Gaussian."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.b = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.a * x + self.b

    def at_one_time(n: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.full((n,), time, dtype=like.dtype)

    field, path = Affine(), as_path(name)
    objective = cnf.FlowMatching(normal_flow(field), path=path, time_sampling=at_one_time)
    x, generator = batch(50_000), torch.Generator()
    optimizer = torch.optim.LBFGS(field.parameters(), line_search_fn="strong_wolfe", max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(x, generator=generator.manual_seed(77))  # another than that of x
        loss.backward()
        return loss

    optimizer.step(closure)
    points = torch.randn(5, 2, dtype=torch.float64)
    truth, _ = normal_velocity(path, torch.full((5,), time, dtype=torch.float64), points)
    torch.testing.assert_close(field(torch.tensor(time), points), truth, atol=0.1, rtol=0)


def test_a_network_learns_the_density() -> None:
    torch.manual_seed(0)
    flow = cnf.FFJORD(2, (32, 32))
    objective = cnf.FlowMatching(flow)
    cnf_training = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(600):
        for group in cnf_training.param_groups:
            group["lr"] = 1e-2 * (1 - step / 600)
        cnf_training.zero_grad()
        objective(batch(512, step).float()).backward()
        cnf_training.step()
    x = batch(2000, 9999)
    truth = Independent(torch.distributions.Normal(MEAN, STD), 1).log_prob(x)
    gap = (truth - flow.log_prob(x.float()).double()).mean()
    assert -0.005 < gap < 0.03


@pytest.mark.parametrize("path", [*map(as_path, PATHS)])
def test_velocities_are_derivatives_of_paths_and_ends_are_right(path: Path) -> None:
    t = torch.linspace(0.01, 0.99, 20, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    for value, slope in ((alpha, d_alpha), (sigma, d_sigma)):
        (truth,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, truth)
    x0, x1 = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t_end, end in zip(ends, (x0, x1), strict=True):
        x, velocity = path(t_end.expand(5), x0, x1)
        torch.testing.assert_close(x, end, atol=0.03, rtol=0)
        assert velocity.isfinite().all()


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_optimal_transport_is_the_best_permutation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 6, *shape)
    cost = torch.cdist(x1.flatten(1), x0.flatten(1)).square()
    best = min(itertools.permutations(range(6)), key=lambda p: cost[range(6), p].sum().item())
    assert tuple(OptimalTransport()(x0, x1, None).tolist()) == best


def test_optimal_transport_exchanges_among_equal_conditions_alone() -> None:
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 12, 2)
    context = torch.arange(12).remainder(3).float().unsqueeze(1).expand(12, 4)
    index = OptimalTransport()(x0, x1, context)
    assert index.sort().values.tolist() == list(range(12))
    assert context[index].equal(context)
    for k in range(3):
        rows = torch.arange(k, 12, 3)
        assert index[rows].equal(rows[OptimalTransport()(x0[rows], x1[rows], None)])
    heavy = OptimalTransport(context_weight=1e6)(x0, x1, context)
    assert heavy.equal(index)
    assert OptimalTransport(context_weight=0.0)(x0, x1, context).equal(
        OptimalTransport()(x0, x1, None)
    )


def test_groups_are_paired_among_themselves() -> None:
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 10, 2)
    index = OptimalTransport(group=4)(x0, x1, None)
    whole = OptimalTransport()
    parts = [
        start + whole(x0[start : start + 4], x1[start : start + 4], None) for start in (0, 4, 8)
    ]
    assert index.equal(torch.cat(parts))
    assert OptimalTransport(group=4)(x0[:0], x1[:0], None).tolist() == []


def test_no_equal_conditions_are_told_of() -> None:
    with pytest.warns(RuntimeWarning, match="no two of the 5 rows of context"):
        index = OptimalTransport()(torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 1))
    assert index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
def test_a_weakly_regularised_plan_is_the_assignment() -> None:
    pytest.importorskip("ot", reason="POT is not installed")
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 30, 2)
    exact = OptimalTransport()(x0, x1, None)
    near = OptimalTransport(regularization=1e-2)(x0, x1, None)
    assert (near == exact).float().mean() > 0.5
    far = [OptimalTransport(regularization=1e3)(x0, x1, None) for _ in range(50)]
    counts = torch.stack(far).flatten().bincount(minlength=30)
    assert (counts > 0).all()  # all but independent
    seeded = [
        OptimalTransport(1.0)(x0, x1, None, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert seeded[0].equal(seeded[1])


def test_stratified_times_are_one_in_each_part_in_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros((), dtype=torch.float64)
    rows = torch.stack([Stratified()(10, like=like, generator=generator) for _ in range(2000)])
    assert (10 * rows).floor().sort(1).values.equal(torch.arange(10.0).double().expand(2000, 10))
    assert (rows.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 2000)  # of each place
    assert abs((rows - (10 * rows).floor() / 10).mean() * 10 - 0.5) < 0.02


def test_logit_normal_times() -> None:
    t = LogitNormal(0.5, 2.0)(100_000, like=torch.zeros(()).double(), generator=None)
    assert abs(t.logit().mean() - 0.5) < 0.05
    assert abs(t.logit().std() - 2.0) < 0.05


def test_log_uniform_times_have_their_density() -> None:
    epsilon = 0.05
    t = LogUniform(epsilon)(200_000, like=torch.zeros(()).double(), generator=None)
    assert 0 <= t.min() <= t.max() <= 1
    edges = torch.tensor([0.0, 0.3, 0.6, 0.9, 0.97, 1.0]).double()
    far = ((1 - edges + epsilon) / epsilon).log()  # the distribution function, from the other end
    expected = (far[:-1] - far[1:]) / far[0]
    found = torch.histogram(t, edges).hist / len(t)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_optimal_transport_pairs_reach_the_loss() -> None:
    """With one data point for each base point the straight paths of the best pairs are all."""
    torch.manual_seed(0)
    seen: list[Tensor] = []

    def coupling(x0: Tensor, x1: Tensor, context: Any, *, generator: Any) -> Tensor:
        index = OptimalTransport()(x0, x1, context)
        seen.append((x1 - x0[index]).square().mean())
        return index

    zero = cnf.CNF(lambda t, x: 0 * x, "exact")
    flow = cnf.Flow(cnf.StandardNormal(2), zero)
    loss = cnf.FlowMatching(flow, coupling=coupling)(torch.randn(50, 2))
    torch.testing.assert_close(loss, seen[0])


def test_other_transforms_are_passed() -> None:
    """The field of a flow that ends in an affine map learns from the data before that map."""
    torch.manual_seed(0)
    field = cnf.MLPField(2, (8,)).double()
    ends = Diagonal(2).double().requires_grad_(False), Diagonal(2).double().requires_grad_(False)
    for end in ends:
        for parameter in end.parameters():
            nn.init.normal_(parameter)
    base = cnf.StandardNormal(2).double()
    inner = cnf.Compose(ends[0], cnf.CNF(field))
    whole = cnf.FlowMatching(cnf.Flow(base, cnf.Compose(inner, ends[1])))
    bare = cnf.FlowMatching(cnf.Flow(base, inner))
    x = torch.randn(100, 2, dtype=torch.float64)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    a = whole(ends[1].forward(x), generator=seeds[0])
    torch.testing.assert_close(a, bare(x, generator=seeds[1]))
    alone = cnf.FlowMatching(cnf.Flow(base, cnf.CNF(field)))
    assert abs(alone(x, generator=seeds[0].manual_seed(1)) - a) > 1e-3  # the first map counts


def test_integers_and_other_bases() -> None:
    torch.manual_seed(0)
    base = Independent(Laplace(torch.zeros(2), torch.ones(2)), 1)
    ends = cnf.Sigmoid(), cnf.UniformDequantization(4)
    flow = cnf.Flow(base, cnf.Compose(cnf.CNF(cnf.MLPField(2, (8,))), *ends))
    loss = cnf.FlowMatching(flow)(torch.randint(4, (20, 2)))
    loss.backward()
    assert loss.isfinite()
    assert flow.sample((5,)).dtype == torch.uint8


def test_images_and_any_field_with_context() -> None:
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.of_context = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(3, 2)

        def forward(self, t: Tensor, x: Tensor, context: Tensor) -> Tensor:
            assert t.shape == ()
            return self.conv(torch.sin(t + x)) + self.of_context(context)[..., None, None]

    field = Own()
    flow = cnf.Flow(cnf.StandardNormal(2, 4, 4), cnf.CNF(field, event_dims=3))
    x, context = torch.randn(6, 2, 4, 4), torch.randn(6, 3)
    objective = cnf.FlowMatching(flow)
    loss = objective(x, context, generator=torch.Generator().manual_seed(5))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in field.parameters())
    generator = torch.Generator().manual_seed(5)  # the same by hand
    x0 = torch.randn(6, 2, 4, 4, generator=generator)
    t = Stratified()(6, like=x, generator=generator)
    x_t = x0 + t.reshape(6, 1, 1, 1) * (x - x0)
    dx = torch.cat([field(t[i], x_t[i : i + 1], context[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss, (dx - (x - x0)).square().mean())


def test_batch_dimensions_and_broadcast_context() -> None:
    flow = cnf.FFJORD(2, (8,), context=3)
    objective = cnf.FlowMatching(flow)
    x, context = torch.randn(4, 5, 2), torch.randn(5, 3)
    generator = torch.Generator()
    a = objective(x, context, generator=generator.manual_seed(0))
    flat = x.reshape(20, 2), context.expand(4, 5, 3).reshape(20, 3)
    assert a.equal(objective(*flat, generator=generator.manual_seed(0)))


def test_parameters_outside_the_field_are_told_of_and_get_zeros() -> None:
    transform = cnf.Compose(cnf.CNF(cnf.MLPField(2, (8,))), Diagonal(2))
    with pytest.warns(RuntimeWarning, match="other parameters of the flow"):
        objective = cnf.FlowMatching(cnf.Flow(cnf.StandardNormal(2), transform))
    objective(torch.randn(10, 2)).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().sum() > 0) == ("field" in name)


def test_learned_end_times_get_zeros() -> None:
    end = nn.Parameter(torch.tensor(2.0))
    with pytest.warns(RuntimeWarning, match="other parameters"):
        objective = cnf.FlowMatching(cnf.FFJORD(2, (8,), times=(0.0, end)))
    objective(torch.randn(10, 2)).backward()
    assert all(p.grad is not None for p in objective.parameters())


@pytest.mark.parametrize("time_sampling", TIME_SAMPLING)
@pytest.mark.parametrize("coupling", ["independent", "optimal-transport"])
@pytest.mark.parametrize("path", PATHS)
def test_every_choice_has_a_loss_by_name(path: str, coupling: str, time_sampling: str) -> None:
    flow = cnf.FFJORD(2, (8,), solver=cnf.Solver(compile=True)).double()
    choices: dict[str, Any] = {"path": path, "coupling": coupling, "time_sampling": time_sampling}
    objective = cnf.FlowMatching(flow, **choices)
    x, generator = batch(32), torch.Generator()
    with record_terms() as terms:
        loss = objective(x, generator=generator.manual_seed(0))
    assert loss.dtype == torch.float64
    assert terms == {"flow_matching": loss.item()}
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    torch.manual_seed(123)
    assert objective(x, generator=generator.manual_seed(0)).equal(loss)
    assert not objective(x, generator=generator.manual_seed(1)).equal(loss)


def nothing(*args: Any, **choices: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cnf.FlowMatching(nn.Linear(2, 2)), TypeError, "must be a cnf.Flow"),
        (lambda: cnf.FlowMatching(cnf.RealNVP(2)), TypeError, "the flow has none"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2, blocks=2)), TypeError, "the flow has 2 of"),
        (lambda: cnf.FlowMatching(cnf.MultiscaleFFJORD((1, 4, 4))), TypeError, "has . of them"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), path="lineal"), ValueError, "Did you mean 'li"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), path=Linear), TypeError, "path must be"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), coupling="ot"), ValueError, "coupling='ot'"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), coupling=3), TypeError, "coupling must be"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), time_sampling="x"), ValueError, "time_sampling"),
        (lambda: cnf.FlowMatching(cnf.FFJORD(2), time_sampling=3), TypeError, "time_sampling"),
        (lambda: OptimalTransport(regularization=-1.0), ValueError, "regularization=-1.0"),
        (lambda: OptimalTransport(group=0), ValueError, "group=0"),
        (lambda: LogitNormal(std=0.0), ValueError, "std=0.0"),
        (lambda: LogUniform(0.0), ValueError, "epsilon=0.0"),
        (lambda: PATHS["variance-preserving"](2.0, 1.0), ValueError, "beta_min <= beta_max"),
    ],
)
def test_bad_choices(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("flow", "arguments", "error", "message"),
    [
        ({}, (torch.randn(5, 3),), ValueError, r"expected \(..., D=2\)"),
        ({}, (torch.randn(5, 2).double(),), TypeError, "float64"),
        ({}, (torch.randint(5, (5, 2)),), TypeError, "float"),
        ({}, (torch.full((5, 2), torch.nan),), ValueError, "finite"),
        ({}, (torch.randn(5, 2), torch.randn(5, 3)), ValueError, "takes none|takes no"),
        ({"context": 3}, (torch.randn(5, 2),), ValueError, "context is missing"),
        ({"context": 3}, (torch.randn(5, 2), torch.randn(4, 3)), ValueError, "broadcast"),
        ({"context": 3}, (torch.randn(5, 2), torch.randn(5, 4)), ValueError, "context has 4"),
        ({"context": 3}, (torch.randn(5, 2), torch.full((5, 3), torch.inf)), ValueError, "finite"),
    ],
)
def test_bad_batches(
    flow: dict[str, int], arguments: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cnf.FlowMatching(cnf.FFJORD(2, (8,), **flow))(*arguments)


@pytest.mark.parametrize("name", ["coupling", "time_sampling"])
def test_choices_of_ones_own_that_give_something_else_are_told_of(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        cnf.FlowMatching(cnf.FFJORD(2, (8,)), **{name: nothing})(torch.randn(5, 2))
