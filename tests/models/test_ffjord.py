"""FFJORD composes what it says, from its arguments alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Laplace

import cnf


def test_the_defaults() -> None:
    flow = cnf.FFJORD(3)
    assert isinstance(flow, cnf.Flow)
    assert isinstance(flow.base, cnf.StandardNormal)
    assert isinstance(flow.transform, cnf.CNF)
    assert isinstance(flow.transform.field, cnf.MLPField)
    assert flow.transform.divergence == cnf.Exact()  # in closed form
    assert flow.transform.solver == cnf.Solver()
    assert flow.event_shape == (3,)


def test_the_trace_is_exact_where_it_costs_no_more() -> None:
    deep = cnf.FFJORD(3, (8, 8, 8))
    assert deep.transform.divergence == cnf.Hutchinson()
    assert cnf.CNF(lambda t, x: -x).divergence == cnf.Hutchinson()
    assert cnf.FFJORD(3, (8,), divergence="hutchinson").transform.divergence == cnf.Hutchinson()


@pytest.mark.parametrize("features", [1, 3, (3,), (2, 1), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("field", [cnf.MLPField, cnf.ConcatSquashField])
def test_any_event_shape(features, field) -> None:
    flow = cnf.FFJORD(features, hidden=(8,), field=field)
    event = (features,) if isinstance(features, int) else features
    assert flow.event_shape == event
    x, log_prob = flow.sample_and_log_prob(5)
    assert x.shape == (5, *event)
    assert log_prob.shape == flow.log_prob(x).shape == (5,)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_have_their_own_weights_and_one_solve_each(blocks: int) -> None:
    flow = cnf.FFJORD(2, hidden=(8,), blocks=blocks)
    one = cnf.FFJORD(2, hidden=(8,))
    assert len(list(flow.parameters())) == blocks * len(list(one.parameters()))
    with cnf.record_solves() as solves:
        flow.log_prob(torch.randn(5, 2)).sum().backward()
    assert len(solves) == blocks
    assert all(p.grad is not None for p in flow.parameters())


def test_arguments_reach_the_parts() -> None:
    solver = cnf.Solver("rk4", steps=7)
    flow = cnf.FFJORD(
        2, (5, 6), blocks=2, context=3, divergence="exact", solver=solver, activation="softplus"
    )
    for transform in flow.transform:
        assert transform.solver is solver
        assert transform.divergence == cnf.Exact()
        assert transform.field.context == 3
        assert any(isinstance(module, nn.Softplus) for module in transform.modules())
        widths = [m.out_features for m in transform.modules() if isinstance(m, nn.Linear)]
        assert widths == [5, 6, 2]


def test_a_field_of_ones_own() -> None:
    class Scaled(nn.Module):
        def __init__(
            self, features: int, hidden: tuple[int, ...], context: int, rate: float
        ) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full((features,), rate))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.rate * x

    flow = cnf.FFJORD(2, field=Scaled, rate=0.7, divergence="exact")
    x = torch.randn(5, 2)
    scale = torch.tensor(0.7).exp()
    truth = torch.distributions.Normal(0.0, scale).log_prob(x).sum(-1)
    assert torch.allclose(flow.log_prob(x), truth, atol=1e-4)


def test_a_base_of_ones_own() -> None:
    laplace = Independent(Laplace(torch.zeros(2), torch.ones(2)), 1)
    flow = cnf.FFJORD(2, base=laplace, divergence="exact")
    for parameter in flow.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(5, 2)
    assert torch.allclose(flow.log_prob(x), laplace.log_prob(x), atol=1e-6)
    assert torch.allclose(flow.double().log_prob(x.double()).float(), laplace.log_prob(x))


def test_the_same_seed_builds_the_same_model() -> None:
    flows = []
    for _ in range(2):
        torch.manual_seed(1)
        flows.append(cnf.FFJORD(2).state_dict())
    assert all(torch.equal(flows[0][key], flows[1][key]) for key in flows[0])


def test_the_state_dict_is_the_fields() -> None:
    assert set(cnf.FFJORD(2, hidden=(8,)).state_dict()) == {
        f"transform.field.network.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
