"""Flow: densities that integrate to one, samples that follow them, and choices that reach down."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cnf

TIGHT = cnf.Solver(rtol=1e-8, atol=1e-8)
FIELDS = {
    "mlp": lambda **options: cnf.FFJORD(2, hidden=(12,), frequencies=1, **options),
    "concatsquash": lambda **options: cnf.FFJORD(
        2, hidden=(12,), field=cnf.ConcatSquashField, **options
    ),
    "blocks": lambda **options: cnf.FFJORD(2, hidden=(12,), frequencies=1, blocks=2, **options),
}
each_field = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(flow: cnf.Flow, std: float = 0.5) -> cnf.Flow:
    """The flow with every parameter drawn anew, and a proof that it is not the identity."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0.0, std)
        z = torch.zeros(4, *flow.event_shape).to(next(flow.parameters())) + 0.5
        context = [torch.ones(1, 3).to(z)] if takes_context(flow) else []
        _, log_det = flow.transform.forward_and_log_det(z, *context, divergence="exact")
    assert log_det.abs().mean() > 0.1, "these parameters test nothing"
    return flow


def takes_context(flow: cnf.Flow) -> bool:
    return any(getattr(module, "context", 0) for module in flow.modules())


def grid(limit: float, n: int) -> tuple[Tensor, float]:
    """Points (n, n, 2) of a square grid about the origin, and the area of its cells."""
    axis = torch.linspace(-limit, limit, n, dtype=torch.float64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    return x, (axis[1] - axis[0]).item() ** 2


@each_field
def test_the_density_integrates_to_one(make) -> None:
    """The trapezium rule converges beyond any order for a density that vanishes at the edge."""
    flow = randomised(make(divergence="exact", solver=TIGHT).double(), std=0.4)
    x, cell = grid(12.0, 141)
    with torch.no_grad():
        density = flow.log_prob(x).exp()
    assert density[0].max() < 1e-9
    assert abs(density.sum().item() * cell - 1) <= 1e-5


@each_field
def test_samples_follow_the_density(make) -> None:
    """Kolmogorov-Smirnov on both axes and a diagonal, against marginals integrated on a grid."""
    n = 4000
    flow = randomised(make(divergence="exact").double(), std=0.4)
    samples = flow.sample(n, generator=seeded())
    x, cell = grid(12.0, 161)
    with torch.no_grad():
        density = flow.log_prob(x).exp() * cell
    for direction in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8]):
        direction = torch.tensor(direction, dtype=torch.float64)
        levels = torch.linspace(-5, 5, 80, dtype=torch.float64)
        # A cell of width w spreads its mass: smooth both sides with the same ramp of width w.
        width = 0.3

        def below(projection: Tensor, levels=levels, width=width) -> Tensor:
            return ((levels - projection.unsqueeze(-1)) / width + 0.5).clamp(0, 1)

        model = (below(x @ direction) * density.unsqueeze(-1)).sum((0, 1))
        data = below(samples @ direction).mean(0)
        assert model[0] < 0.3 < 0.7 < model[-1]
        assert (model - data).abs().max() * math.sqrt(n) < 2.0  # p about 0.0007


@each_field
def test_log_prob_is_the_change_of_variables(make) -> None:
    flow = randomised(make(divergence="exact", solver=TIGHT).double())
    x = torch.randn(4, 2, dtype=torch.float64)
    z = flow.transform.inverse(x)
    jacobians = [
        torch.autograd.functional.jacobian(flow.transform.inverse, one.unsqueeze(0)).reshape(2, 2)
        for one in x
    ]
    log_det = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    base = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    assert torch.allclose(flow.log_prob(x), base.log_prob(z) + log_det, atol=1e-7)


def test_a_linear_flow_is_a_gaussian() -> None:
    a = torch.tensor([[0.3, -0.8], [0.5, -0.2]], dtype=torch.float64)
    flow = cnf.Flow(cnf.StandardNormal(2).double(), cnf.CNF(lambda t, x: x @ a.T, "exact", TIGHT))
    m = torch.linalg.matrix_exp(a)
    truth = torch.distributions.MultivariateNormal(torch.zeros(2).double(), m @ m.T)
    x = 2 * torch.randn(50, 2, dtype=torch.float64)
    assert torch.allclose(flow.log_prob(x), truth.log_prob(x), atol=1e-7)
    samples = flow.sample(20_000, generator=seeded())
    assert torch.allclose(samples.T.cov(), m @ m.T, atol=0.06)


def test_sampling_with_density_is_one_solve_and_agrees_with_log_prob() -> None:
    flow = randomised(cnf.FFJORD(2, hidden=(12,), divergence="exact", solver=TIGHT).double())
    with cnf.record_solves() as solves:
        x, log_prob = flow.sample_and_log_prob((3, 5))
    assert len(solves) == 1
    assert x.shape == (3, 5, 2)
    assert log_prob.shape == (3, 5)
    assert not x.requires_grad
    assert not log_prob.requires_grad
    assert torch.allclose(log_prob, flow.log_prob(x), atol=1e-6)


def test_every_way_of_sampling_draws_the_same() -> None:
    flow = randomised(cnf.FFJORD(2, hidden=(12,), solver=cnf.Solver("rk4", steps=5)))
    x = flow.sample(7, generator=seeded())
    assert torch.equal(flow.rsample((7,), generator=seeded()), x)
    assert torch.allclose(flow.sample_and_log_prob(7, generator=seeded())[0], x, atol=1e-6)
    assert torch.allclose(flow.rsample_and_log_prob(7, generator=seeded())[0], x, atol=1e-6)
    assert flow.sample().shape == (2,)
    assert flow.sample(torch.Size((2, 3))).shape == (2, 3, 2)


def test_reparameterised_samples_carry_gradients() -> None:
    flow = randomised(cnf.FFJORD(2, hidden=(12,), context=3))
    context = torch.randn(4, 3, requires_grad=True)
    x, log_prob = flow.rsample_and_log_prob((5,), context)
    (x.square().sum() + log_prob.sum()).backward()
    assert context.grad.abs().min() > 0
    assert all(p.grad.abs().sum() > 0 for p in flow.parameters())


def test_forward_is_log_prob() -> None:
    flow, x = cnf.FFJORD(2, context=3), torch.randn(5, 2)
    context = torch.randn(5, 3)
    log_prob = flow.log_prob(x, context, divergence="exact")
    assert torch.equal(flow(x, context, divergence="exact"), log_prob)


@pytest.mark.parametrize("sample", [(), (6,), (6, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (1, 4)], ids=str)
def test_context_batches_stand_after_the_sample_shape(sample: tuple, batch: tuple) -> None:
    flow = randomised(cnf.FFJORD(2, hidden=(12,), context=3, divergence="exact"))
    context = torch.randn(*batch, 3)
    x, log_prob = flow.sample_and_log_prob(sample, context)
    assert x.shape == (*sample, *batch, 2)
    assert log_prob.shape == (*sample, *batch)
    full = context.expand(*sample, *batch, 3)
    assert torch.equal(flow.log_prob(x, context), flow.log_prob(x, full))
    assert torch.allclose(flow.log_prob(x, context), log_prob, atol=1e-3)


def test_context_conditions_each_sample_alone() -> None:
    flow = randomised(cnf.FFJORD(2, hidden=(12,), context=3, divergence="exact"))
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    together = flow.log_prob(x, context)
    alone = torch.stack([flow.log_prob(x[i], context[i]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together, flow.log_prob(x, context.roll(1, 0)), atol=1e-2)


def nested() -> cnf.Flow:
    def block() -> cnf.CNF:
        return cnf.CNF(cnf.MLPField(2, (8,)), "hutchinson")

    inner = cnf.Compose(block(), cnf.Inverse(block()))
    return cnf.Flow(cnf.StandardNormal(2), cnf.Compose(block(), cnf.Inverse(inner)))


def test_a_solver_reaches_every_cnf_and_stays_there_for_one_call() -> None:
    flow, x = nested(), torch.randn(5, 2)
    solver = cnf.Solver("rk4", steps=3)
    for call in (
        lambda **o: flow.log_prob(x, **o),
        lambda **o: flow.sample(5, **o),
        lambda **o: flow.sample_and_log_prob(5, **o),
        lambda **o: flow.distribution(**o).rsample((5,)),
        lambda **o: flow.distribution(**o).log_prob(x),
    ):
        with cnf.record_solves() as solves:
            call(solver=solver)
            call()
        assert [(s.method, s.accepted) for s in solves[:3]] == [("rk4", 3)] * 3
        assert [s.method for s in solves[3:]] == ["dopri5"] * 3


def test_a_divergence_reaches_every_cnf() -> None:
    flow, x = nested(), torch.randn(5, 2)
    called: list[int] = []

    class Spy(cnf.Exact):
        def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> None:
            called.append(len(x))

    flow.log_prob(x, divergence=Spy())
    flow.sample_and_log_prob(4, divergence=Spy())
    assert called == [5, 5, 5, 4, 4, 4]
    assert torch.equal(flow.log_prob(x, divergence="exact"), flow.log_prob(x, divergence="exact"))


def test_a_generator_reaches_every_cnf_and_the_base() -> None:
    flow, x = nested(), torch.randn(5, 2)
    state = torch.get_rng_state()
    for call in (
        lambda seed: flow.log_prob(x, generator=seeded(seed)),
        lambda seed: flow.sample(5, generator=seeded(seed)),
        lambda seed: flow.sample_and_log_prob(5, generator=seeded(seed))[1],
        lambda seed: flow.distribution(generator=seeded(seed)).rsample((5,)),
        lambda seed: flow.distribution(generator=seeded(seed)).log_prob(x),
    ):
        assert torch.equal(call(1), call(1))
        assert not torch.allclose(call(1), call(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_same_seed_gives_the_same_bits_forwards_and_backwards(gradient: str) -> None:
    flow, x = (
        cnf.FFJORD(2, divergence="hutchinson", solver=cnf.Solver(gradient=gradient)),
        torch.randn(16, 2),
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        loss = -flow.log_prob(x).mean()
        runs.append([loss, *torch.autograd.grad(loss, list(flow.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5], ids=str)
def test_a_far_sample_does_not_change_the_others(tolerance: float) -> None:
    solver = cnf.Solver(rtol=tolerance, atol=tolerance)
    flow = randomised(FIELDS["mlp"](divergence="exact", solver=solver).double(), std=0.4)
    x = torch.randn(256, 2, dtype=torch.float64)
    x[-1] = 30.0
    together = flow.log_prob(x)
    for i in range(20):
        alone = flow.log_prob(x[i : i + 1])
        assert (together[i] - alone).abs().item() <= 10 * tolerance


@pytest.mark.parametrize("on_nonfinite", ["raise", "nan"])
def test_finite_samples_are_not_changed_by_the_guard(on_nonfinite: str) -> None:
    flow, x = cnf.FFJORD(2), torch.randn(5, 2)
    guarded = flow.log_prob(x, generator=seeded(), on_nonfinite=on_nonfinite)
    assert torch.equal(guarded, flow.log_prob(x, generator=seeded()))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5], ids=str)
def test_easy_samples_do_not_dilute_the_error_of_a_hard_one(tolerance: float) -> None:
    """Samples at rest have no error at all, and must not hide that of the one that moves."""
    solver = cnf.Solver(rtol=tolerance, atol=tolerance)
    field = cnf.CNF(lambda t, x: torch.sin(3 * x), "exact", solver)
    x = torch.zeros(2001, 2, dtype=torch.float64)
    x[0] = torch.tensor([0.3, -0.2])
    _, log_det = field.forward_and_log_det(x)
    _, alone = field.forward_and_log_det(x[:1])
    _, true = field.forward_and_log_det(x[:1], solver=TIGHT)
    assert (alone[0] - true[0]).abs() <= 10 * tolerance
    assert (log_det[0] - true[0]).abs() <= 10 * tolerance


@pytest.mark.parametrize(
    "part",
    [cnf.CNF(lambda t, x: -x), cnf.CNF(cnf.MLPField(3)), cnf.CNF(lambda t, x: -x, event_dims=0)],
    ids=["default event_dims", "field of another shape", "scalars"],
)
def test_a_base_and_a_cnf_of_different_events_are_refused(part) -> None:
    with pytest.raises(ValueError, match="base has event_shape"):
        cnf.Flow(cnf.StandardNormal(1, 8, 8), part)


@pytest.mark.parametrize("field", [cnf.MLPField(2), "mlp"], ids=["a field", "a name"])
def test_ffjord_wants_what_makes_a_field(field) -> None:
    with pytest.raises(TypeError, match=r"field must make fields.*cnf\.CNF\(field\)"):
        cnf.FFJORD(2, field=field)
