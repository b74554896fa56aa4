"""Maximum likelihood: its value, its gradient, and the density that it finds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import cnf


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
    with pytest.warns(RuntimeWarning, match="none is above 0"):
        cnf.MaximumLikelihood(flow)(x)
    flow.transform[0].solver = cnf.Solver("dopri5", rtol=1e-6, atol=1e-6)
    assert cnf.MaximumLikelihood(flow)(x) > 0  # and no warning, which would be an error here
