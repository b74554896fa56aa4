"""Maximum likelihood: its value, its gradient, and the density that it finds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import cnf
from cnf.data import toy
from cnf.objectives.terms import record_terms
from cnf.regularizers import Point


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no-context"])
def test_the_loss_is_the_mean_negative_log_likelihood(conditional: bool) -> None:
    flow = cnf.FFJORD(2, context=3 if conditional else 0, divergence="hutchinson")
    batch = (torch.randn(16, 2), torch.randn(16, 3)) if conditional else (torch.randn(16, 2),)
    loss = cnf.MaximumLikelihood(flow)(*batch, generator=seeded())
    assert loss.shape == ()
    assert torch.equal(loss, -flow.log_prob(*batch, generator=seeded()).mean())


@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no-context"])
def test_the_loss_in_bits_for_each_dimension(conditional: bool) -> None:
    flow = cnf.RealNVP((2, 4, 4), hidden=(4,), context=3 if conditional else 0)
    batch = (torch.randn(16, 2, 4, 4), *([torch.randn(16, 3)] if conditional else []))
    loss = cnf.MaximumLikelihood(flow, unit="bits_per_dim")(*batch)
    torch.testing.assert_close(loss, -flow.log_prob(*batch).mean() / 32 / math.log(2))


def test_the_loss_of_integers_is_their_codelength() -> None:
    """Of uniform integers, that of their number of levels."""
    ends = cnf.Sigmoid(), cnf.UniformDequantization(8)
    flow = cnf.Flow(cnf.StandardNormal(3, 5), cnf.Compose(*ends))
    objective = cnf.MaximumLikelihood(flow, unit="bits_per_dim")
    x = torch.randint(8, (1000, 3, 5))
    loss = objective(x, generator=seeded())
    assert torch.equal(loss, flow.bits_per_dim(x, generator=seeded()).mean())
    assert 3 < loss < 4


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unit='bits' is not known; .*bits_per_dim"):
        cnf.MaximumLikelihood(cnf.FFJORD(2), unit="bits")


def test_choices_reach_the_flow() -> None:
    flow = cnf.FFJORD(2, divergence="hutchinson")
    objective, x = cnf.MaximumLikelihood(flow), torch.randn(16, 2)
    with cnf.record_solves() as solves:
        losses = [objective(x, divergence="exact", solver=cnf.Solver("rk4")) for _ in range(2)]
    assert torch.equal(*losses)
    assert {s.method for s in solves} == {"rk4"}


def test_its_parameters_are_the_flows() -> None:
    flow = cnf.FFJORD(2)
    objective = cnf.MaximumLikelihood(flow)
    assert [id(p) for p in objective.parameters()] == [id(p) for p in flow.parameters()]
    objective(torch.randn(16, 2)).backward()
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_training_finds_a_gaussian(divergence: str) -> None:
    """The loss falls to the entropy of the data, which no density can beat on average."""
    torch.manual_seed(0)
    data = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.3], [0.3, 0.6]])
    )
    solver = cnf.Solver("rk4", steps=4)
    flow = cnf.FFJORD(2, hidden=(32,), divergence=divergence, solver=solver)
    objective = cnf.MaximumLikelihood(flow)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        objective(data.sample((256,))).backward()
        optimiser.step()
    test = data.sample((4000,))
    with torch.no_grad():
        gap = data.log_prob(test) - flow.log_prob(test, divergence="exact", solver=cnf.Solver())
    assert -4.5 * gap.std().item() / math.sqrt(4000) <= gap.mean().item() < 0.05


def test_ddp_wraps_it_as_any_module(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    objective, x = cnf.MaximumLikelihood(cnf.FFJORD(2, divergence="exact")), torch.randn(16, 2)
    objective(x).backward()
    expected = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(objective)(x).backward()
    finally:
        torch.distributed.destroy_process_group()
    found = [p.grad for p in objective.parameters()]
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_integers_more_probable_than_certain_are_the_solvers_error() -> None:
    """One Euler step back takes x to 51 x, with a log-determinant of 50 for each dimension."""
    coarse = cnf.CNF(lambda t, x: -50 * x, "exact", cnf.Solver("euler", steps=1))
    ends = cnf.Sigmoid(), cnf.UniformDequantization(17)
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(coarse, *ends))
    x = torch.full((50, 2), 8)
    objective = cnf.MaximumLikelihood(flow)
    with pytest.warns(RuntimeWarning, match="none is above 0"):
        objective(x)
    objective(x)  # told once, and a second warning would be an error here
    flow.transform[0].solver = cnf.Solver("dopri5", rtol=1e-6, atol=1e-6)
    assert cnf.MaximumLikelihood(flow)(x) > 0  # and no warning, which would be an error here


@pytest.mark.parametrize("solved", [True, False])
def test_densities_above_one_are_right_beside_integers(solved: bool) -> None:
    """Real columns, or no solver: no warning, which would be an error here."""
    steep = cnf.CNF(cnf.LinearField(3), "exact") if solved else cnf.transforms.Diagonal(3)
    ends = cnf.transforms.Sigmoid(columns=[0, 2]), cnf.UniformDequantization((3, None, 100))
    flow = cnf.Flow(cnf.StandardNormal(3), cnf.Compose(steep, *ends))
    if solved:
        with torch.no_grad():
            steep.field.linear.bias.zero_()
            steep.field.linear.weight.copy_(torch.diag(torch.tensor([0.0, -9.0, 0.0])))
    else:
        steep.initialize(torch.randn(50, 3) * torch.tensor([1.0, 1e-4, 1.0]))
    x = torch.stack((torch.randint(3, (50,)), torch.zeros(50), torch.randint(100, (50,))), -1)
    assert cnf.MaximumLikelihood(flow)(x.float()) < 0


def test_integers_above_one_without_a_solver_have_no_solver_to_blame() -> None:
    """One draw of the noise may fall where the density of a narrow cell is high."""
    narrow, end = cnf.transforms.Diagonal(1), cnf.Sigmoid()
    narrow.amortized.set(
        log_scale=torch.full((1,), -3.0), shift=end.inverse(torch.full((1,), 0.25))
    )
    ends = cnf.Compose(narrow, end, cnf.UniformDequantization(2))
    objective = cnf.MaximumLikelihood(cnf.Flow(cnf.StandardNormal(1), ends))
    x = torch.zeros(1, 1, dtype=torch.long)
    best = max(-objective(x, generator=seeded(seed)).item() for seed in range(200))
    assert best > 0


# ---------------------------------------------------------------- regularised


RNODE = [cnf.KineticEnergy(0.1), cnf.JacobianFrobenius(0.3)]


@pytest.mark.parametrize("unit", ["nats", "bits_per_dim"])
@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no-context"])
def test_the_loss_with_regularisers_is_the_weighted_sum(conditional: bool, unit: str) -> None:
    """In the unit as a whole; each part is told by name, the integrals without their weights."""
    flow = cnf.FFJORD(2, context=3 if conditional else 0, divergence="hutchinson", blocks=2)
    x, context = torch.randn(16, 2), torch.randn(16, 3) if conditional else None
    objective = cnf.MaximumLikelihood(flow, unit=unit, regularizers=RNODE)
    with record_terms() as terms:
        loss = objective(x, context, generator=seeded())
    log_prob, integrals = flow.log_prob_and_integrals(
        x, context, regularizers=RNODE, generator=seeded()
    )
    assert torch.equal(log_prob, flow.log_prob(x, context, generator=seeded()))
    energy, norm = integrals.mean(0)
    scale = 1 if unit == "nats" else 2 * math.log(2)
    torch.testing.assert_close(loss, (-log_prob.mean() + 0.1 * energy + 0.3 * norm) / scale)
    assert terms == {
        "negative_log_likelihood": pytest.approx(-log_prob.mean().item() / scale),
        "kinetic_energy": pytest.approx(energy.item()),
        "jacobian_frobenius": pytest.approx(norm.item()),
    }


def test_without_regularisers_the_likelihood_is_told_alone() -> None:
    objective, x = cnf.MaximumLikelihood(cnf.FFJORD(2)), torch.randn(16, 2)
    with record_terms() as terms:
        loss = objective(x)
    assert terms == {"negative_log_likelihood": pytest.approx(loss.item())}


def test_a_weight_of_zero_only_reports() -> None:
    flow, x = cnf.FFJORD(2), torch.randn(16, 2)
    objective = cnf.MaximumLikelihood(flow, regularizers=[cnf.KineticEnergy(0)])
    with record_terms() as terms:
        loss = objective(x)
    assert torch.equal(loss, -flow.log_prob(x).mean())
    assert terms["kinetic_energy"] > 0


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_every_parameter_gets_a_gradient(divergence: str, gradient: str) -> None:
    """DDP's rule; learned times among them."""
    times = torch.nn.Parameter(torch.tensor(0.0)), torch.nn.Parameter(torch.tensor(1.0))
    solver = cnf.Solver("rk4", steps=3, gradient=gradient)
    flow = cnf.FFJORD(
        2, (8, 8), field=cnf.PotentialField, times=times, divergence=divergence, solver=solver
    )
    penalties = [*RNODE, cnf.TaylorDerivative(2, 0.1), cnf.HJBResidual(0.1)]
    objective = cnf.MaximumLikelihood(flow, regularizers=penalties, steer=0.25)
    objective(torch.randn(16, 2)).backward()
    assert {name for name, p in objective.named_parameters() if p.grad is None} == set()


def test_a_heavy_weight_makes_the_term_small() -> None:
    torch.manual_seed(0)
    density, found = toy("8gaussians"), []
    for weight in (0.0, 1.0):
        flow = cnf.FFJORD(2, (16,), solver=cnf.Solver("rk4", steps=4))
        energy = cnf.KineticEnergy(weight)
        objective = cnf.MaximumLikelihood(flow, regularizers=[energy])
        optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            objective(density.sample(128)).backward()
            optimiser.step()
        _, integrals = flow.log_prob_and_integrals(density.sample(128), regularizers=[energy])
        found.append(integrals.mean().item())
    assert found[1] < 0.5 * found[0]


def test_regularisers_that_cannot_be_are_refused() -> None:
    flow, energy = cnf.FFJORD(2), cnf.KineticEnergy(0.1)
    with pytest.raises(ValueError, match=r"kinetic_energy needs .* none in"):
        cnf.MaximumLikelihood(cnf.RealNVP(2), regularizers=[energy])
    with pytest.raises(ValueError, match="steer needs the path of a CNF"):
        cnf.MaximumLikelihood(cnf.RealNVP(2), steer=0.1)
    with pytest.raises(TypeError, match=r"HJBResidual needs the potential .* got .* MLPField"):
        cnf.MaximumLikelihood(flow, regularizers=[cnf.HJBResidual(0.1)])
    with pytest.raises(TypeError, match=r"regularizers\[0\] must be a cnf.Regularizer, got float"):
        cnf.MaximumLikelihood(flow, regularizers=[0.1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"must be a list .* got KineticEnergy"):
        cnf.MaximumLikelihood(flow, regularizers=energy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two of the name 'kinetic_energy'"):
        cnf.MaximumLikelihood(flow, regularizers=[energy, cnf.KineticEnergy(0.2)])


def test_a_regulariser_without_a_hash_is_refused() -> None:
    @dataclasses.dataclass
    class Own(cnf.Regularizer):
        weight: float
        name = "own"

        def integrand(self, point: Point) -> torch.Tensor:
            return point.x.sum(-1)

    with pytest.raises(TypeError, match=r"Own, has no hash, .* @dataclass\(frozen=True\)"):
        cnf.MaximumLikelihood(cnf.FFJORD(2), regularizers=[Own(1.0)])


# ---------------------------------------------------------------- STEER


def ends(objective: torch.nn.Module, x: torch.Tensor, n: int) -> list[float]:
    """Where n solves ended."""
    generator = seeded()
    with cnf.record_solves() as solves, torch.no_grad():
        for _ in range(n):
            objective(x, generator=generator)
    return [solve.t1 for solve in solves]


@pytest.mark.parametrize("times", [(0.0, 1.0), (2.0, 0.5)])
def test_steer_draws_the_base_time_uniformly(times: tuple[float, float]) -> None:
    """By Kolmogorov and Smirnov's distance, once a batch; `log_prob` has the true one."""
    flow = cnf.FFJORD(2, (4,), times=times, solver=cnf.Solver("euler", steps=1))
    x, n, b = torch.randn(3, 2), 1000, 0.4
    found = ends(cnf.MaximumLikelihood(flow, steer=b), x, n)
    assert len(found) == n
    uniform = (torch.tensor(found, dtype=torch.float64).sort().values - times[0] + b) / (2 * b)
    steps = torch.arange(n, dtype=torch.float64) / n
    assert 0 <= uniform[0] <= uniform[-1] <= 1
    assert max((uniform - steps).max(), (steps + 1 / n - uniform).max()) < 1.95 / math.sqrt(n)
    assert set(ends(flow, x, 3)) == {times[0]}


@pytest.mark.parametrize("inverted", [False, True])
def test_the_steered_loss_is_that_of_the_times_drawn(inverted: bool) -> None:
    """With regularisers, whose span is that one too; the CNF's base side, also in an Inverse."""
    field, x = cnf.MLPField(2), torch.randn(5, 2)

    def flow_of(*times: float) -> cnf.Flow:
        transform = cnf.CNF(field, "exact", times=times[::-1] if inverted else times)
        return cnf.Flow(cnf.StandardNormal(2), cnf.Inverse(transform) if inverted else transform)

    energy = [cnf.KineticEnergy(0.1)]
    objective = cnf.MaximumLikelihood(flow_of(0.0, 1.0), regularizers=energy, steer=0.5)
    with cnf.record_solves() as solves:
        loss = objective(x, generator=seeded())
    assert solves[0].t1 != 0
    own = cnf.MaximumLikelihood(flow_of(solves[0].t1, 1.0), regularizers=energy)
    assert torch.equal(loss, own(x))


def test_steers_that_cannot_be_are_refused() -> None:
    flow = cnf.FFJORD(2)
    for steer in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"steer={steer!r} must be finite and not negative"):
            cnf.MaximumLikelihood(flow, steer=steer)
    with pytest.raises(ValueError, match=r"steer=1.0 must be below the span .* from 0 to 1"):
        cnf.MaximumLikelihood(flow, steer=1.0)
    with pytest.raises(TypeError, match="steer='a' must be a number"):
        cnf.MaximumLikelihood(flow, steer="a")  # type: ignore[arg-type]


def test_learned_times_that_have_come_too_close_are_told() -> None:
    flow = cnf.FFJORD(2, times=(0.0, torch.nn.Parameter(torch.tensor(1.0))))
    objective = cnf.MaximumLikelihood(flow, steer=0.5)
    with torch.no_grad():
        flow.transform.data_time.fill_(0.3)
    with pytest.raises(ValueError, match=r"steer=0.5 must be below the span"):
        objective(torch.randn(4, 2))
