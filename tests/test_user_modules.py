"""Modules of users: the ways out, when they are looked at, and what they are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.ode import odeint
from cnf.transforms import Coupling
from cnf.variational import VAE, Bernoulli, posterior


class Conditioner(nn.Module):
    """A network of x alone, with one more module in it."""

    def __init__(self, first: nn.Module, inputs: Any, outputs: Any) -> None:
        super().__init__()
        self.network = nn.Sequential(first, nn.Linear(inputs[0], 8), nn.Tanh())
        self.last = nn.Linear(8, outputs[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.network(x))


def coupling(first: Callable[[], nn.Module], mask: str = "halves", dims: int = 2) -> Coupling:
    return Coupling(
        dims, mask, conditioner=lambda inputs, outputs, _: Conditioner(first(), inputs, outputs)
    )


def flow_of(layer: cnf.Transform, dims: int = 2) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(dims), layer)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("elementwise", ["affine", "spline"])
def test_the_density_of_a_conditioner_that_writes_integrates_to_one(elementwise, inference):
    def make(inputs: Any, outputs: Any, context: int) -> nn.Module:
        return Conditioner(nn.ELU(inplace=True), inputs, outputs)

    flow = flow_of(Coupling(2, "halves", elementwise, conditioner=make))
    side = torch.linspace(-9, 9, 301)
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.cartesian_prod(side, side)
        before = x.clone()
        total = flow.log_prob(x).exp().sum() * (side[1] - side[0]) ** 2
        assert abs(total.item() - 1) < 1e-3
        assert torch.equal(x, before)
        z = flow.transform.inverse(x)
        torch.testing.assert_close(flow.transform.forward(z), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["halves", "alternating"])
def test_a_conditioner_that_writes_has_the_gradient_of_one_that_does_not(mask):
    torch.manual_seed(0)
    writes = flow_of(coupling(lambda: nn.ELU(inplace=True), mask, 4), 4)
    twin = copy.deepcopy(writes)
    twin.transform.conditioner.network[0] = nn.ELU()
    x = torch.randn(5, 4)
    grads = []
    for flow in (writes, twin):
        own = x.clone().requires_grad_()
        flow.log_prob(own).sum().backward()
        grads.append([own.grad, *(p.grad for p in flow.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


class Doubling(nn.Module):
    """2 x, in-place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def encode(x: Tensor, context: Tensor) -> None:
    x.copy_(x > 0)
    before = x.clone()
    network = nn.Sequential(Doubling(), nn.Linear(2, 4))
    VAE(Doubling(), posterior("gaussian", 2, 4), Bernoulli(network)).elbo(x).sum().backward()
    assert torch.equal(x, before)
    x.copy_(context)


def match(x: Tensor, context: Tensor) -> None:
    field = cnf.CNF(lambda t, x, c: c.mul_(2) + x.mul_(3))
    cnf.FlowMatching(flow_of(field, 4))(x, context)


def solve(x: Tensor, context: Tensor) -> None:
    with pytest.raises(RuntimeError, match="modified an argument behind x"):
        odeint(lambda t, x, c: c.mul_(0.5) - x, x, 0.0, 1.0, args=(context,))


def weigh(x: Tensor, context: Tensor) -> None:
    flow = cnf.RealNVP(4, 2, hidden=(4,))

    def log_density(x: Tensor) -> Tensor:
        return -x.square_().sum(-1) / 2

    found = cnf.importance_sampling(flow, log_density, 500)
    assert found.samples.min() < 0


@pytest.mark.parametrize("use", [match, solve, weigh, encode])
def test_what_is_given_to_a_module_that_writes_stays_as_it_is(use):
    x = torch.randn(5, 4)
    context = x.clone()
    before = x.clone(), context.clone()
    use(x, context)
    assert torch.equal(x, before[0])
    assert torch.equal(context, before[1])


# ---------------------------------------------------------------- dropout and batch norm


def test_a_layer_is_looked_at_again_after_train_and_eval():
    flow, x = flow_of(coupling(lambda: nn.Dropout(0.5))), torch.randn(5, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'conditioner\.network\.0'.*Dropout.*eval"):
            flow.log_prob(x)
        flow.eval()
        assert torch.equal(flow.log_prob(x), flow.log_prob(x))
        flow.transform.conditioner.train()  # the conditioner alone
        with pytest.raises(ValueError, match="drops at random"):
            flow.sample((3,))
        flow.train()


def test_a_part_put_in_later_is_seen():
    flow, x = flow_of(coupling(nn.Identity)), torch.randn(5, 2)
    flow.log_prob(x)
    flow.transform.conditioner.network[0] = nn.Dropout(0.5)
    flow.eval().log_prob(x)
    with pytest.raises(ValueError, match="drops at random"):
        flow.train().log_prob(x)


def test_dropout_on_purpose():
    flow, x = flow_of(coupling(lambda: nn.Dropout(0.5))), torch.randn(50, 2)
    for part in flow.modules():
        part.check_modules = False
    torch.manual_seed(0)
    one = flow.log_prob(x)
    one.mean().backward()
    assert not torch.equal(one, flow.log_prob(x))
    torch.manual_seed(0)
    assert torch.equal(one, flow.log_prob(x))
    again = copy.deepcopy(flow)
    again.transform.check_modules = True
    with pytest.raises(ValueError, match="check_modules = False"):
        again.log_prob(x)


def test_parts_without_an_effect_are_allowed():
    for first in (
        lambda: nn.Dropout(0.0),
        lambda: nn.LayerNorm(1),
        lambda: nn.BatchNorm1d(1).eval(),
        lambda: nn.RReLU().eval(),
        lambda: nn.GRU(1, 1, dropout=0.0),
    ):
        layer = coupling(nn.Identity)
        layer.conditioner.unused = first()
        assert flow_of(layer).log_prob(torch.randn(5, 2)).isfinite().all()


def test_what_a_layer_was_found_to_be_is_no_part_of_its_state():
    flow = cnf.RealNVP(2, 2, hidden=(4,))
    before = flow.state_dict().keys()
    flow.log_prob(torch.randn(5, 2))
    assert flow.state_dict().keys() == before


def test_the_layer_of_batch_statistics_stays_as_it_is():
    flow = flow_of(cnf.transforms.BatchNorm(2))
    assert flow.train().log_prob(torch.randn(50, 2)).isfinite().all()


class Dropping(nn.Module):
    """A field that drops at random."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.dropout(x)


def test_fields_under_torchdiffeq():
    pytest.importorskip("torchdiffeq")
    field, x = Dropping(), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"'dropout' of this vector field.*drops"):
        odeint(field, x, 0.0, 1.0, cnf.TorchDiffEq("rk4", steps=2))
    with pytest.raises(ValueError, match="drew random numbers"):
        odeint(lambda t, x: field(t, x), x, 0.0, 1.0, cnf.TorchDiffEq("rk4", steps=2))
    odeint(field, x, 0.0, 1.0, cnf.TorchDiffEq("rk4", steps=2, check_field=False))
    odeint(field.eval(), x, 0.0, 1.0, cnf.TorchDiffEq("rk4", steps=2))
