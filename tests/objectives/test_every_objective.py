"""What every objective must do: context, float64, compiled solves, DDP's rules, a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnf
from cnf.objectives.couplings import OptimalTransport
from cnf.variational import ELBO, VAE, Gaussian, posterior

RNODE = [cnf.KineticEnergy(0.01), cnf.JacobianFrobenius(0.02)]
CONTEXT = 3


def ffjord(context: int = 0, hidden: tuple[int, ...] = (8, 8), **options: Any) -> cnf.FFJORD:
    return cnf.FFJORD(2, hidden, context=context, **options)


def normal_target(x: Tensor, context: Tensor | None = None) -> Tensor:
    mean = 1.0 if context is None else context[..., :2]
    return -0.5 * (x - mean).square().sum(-1)


Make = Callable[..., nn.Module]

OBJECTIVES: dict[str, Make] = {
    "likelihood": lambda **o: cnf.MaximumLikelihood(ffjord(**o)),
    "likelihood by Hutchinson": lambda **o: cnf.MaximumLikelihood(
        ffjord(divergence="hutchinson", **o)
    ),
    "RNODE": lambda **o: cnf.MaximumLikelihood(ffjord(**o), regularizers=RNODE, steer=0.1),
    "Taylor": lambda **o: cnf.MaximumLikelihood(
        ffjord(**o), regularizers=[*RNODE, cnf.TaylorDerivative(2, 0.01)], steer=0.1
    ),
    "OT-Flow": lambda **o: cnf.MaximumLikelihood(
        ffjord(field=cnf.PotentialField, **o),
        regularizers=[cnf.KineticEnergy(0.1), cnf.HJBResidual(0.1)],
    ),
    "flow matching": lambda **o: cnf.FlowMatching(ffjord(**o)),
    "OT flow matching": lambda **o: cnf.FlowMatching(
        ffjord(**o), coupling=OptimalTransport(context_weight=1.0), path="variance-preserving"
    ),
    "reverse KL": lambda **o: cnf.ReverseKL(ffjord(**o), normal_target, samples=5),
    "path gradient": lambda **o: cnf.ReverseKL(
        ffjord(**o), normal_target, samples=5, gradient="path"
    ),
}
OWN_SAMPLES = {"reverse KL", "path gradient"}


def autoencoder(kind: str, **solver: Any) -> ELBO:
    """ELBO of a small VAE of three numbers."""
    q = posterior(kind, 2, 4, **solver)
    return ELBO(VAE(nn.Linear(3, 4), q, Gaussian(nn.Linear(2, 3))))


def arguments(name: str, context: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A batch for an objective."""
    x, c = torch.randn(12, 2, dtype=dtype), torch.randn(12, CONTEXT, dtype=dtype)
    if name in OWN_SAMPLES:
        return (c,) if context else ()
    return (x, c) if context else (x,)


def made(name: str, *, context: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    objective = OBJECTIVES[name](**({"context": CONTEXT} if context else {}), **options)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.3)
    return objective


def check_gradients(objective: nn.Module) -> None:
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(p.grad.abs().sum() > 0 for p in objective.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_float64_and_context(name: str, context: bool) -> None:
    objective = made(name, context=context).double()
    batch = arguments(name, context, torch.float64)
    generator = torch.Generator()
    loss = objective(*batch, generator=generator.manual_seed(0))
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    loss.backward()
    check_gradients(objective)
    torch.manual_seed(99)  # the generator is the only source of noise
    again = objective(*batch, generator=generator.manual_seed(0))
    assert again.equal(loss)
    if context:
        others = (*batch[:-1], batch[-1] + 1)
        assert not objective(*others, generator=generator.manual_seed(0)).equal(loss)


@pytest.mark.parametrize("name", ["Taylor"])  # the most at once: the compiler takes its time
def test_a_compiled_solver_gives_the_same(name: str) -> None:
    batch, generator = arguments(name, False), torch.Generator()
    losses, slopes = [], []
    for compiled in (False, True):
        solver = cnf.Solver("euler", steps=2, compile=compiled)
        objective = made(name, solver=solver, hidden=(4,))
        loss = objective(*batch, generator=generator.manual_seed(0))
        loss.backward()
        check_gradients(objective)
        losses.append(loss.detach())
        slopes.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_that_gives_the_context_is_trained_with_the_flow(name: str) -> None:
    objective = made(name, context=True).double()
    *batch, context = arguments(name, True, torch.float64)
    encoder = nn.Linear(CONTEXT, CONTEXT).double()

    def loss(generator: torch.Generator) -> Tensor:
        return objective(*batch, encoder(context), generator=generator.manual_seed(0))

    (slope,) = torch.autograd.grad(loss(torch.Generator()), encoder.bias)
    assert (slope.abs() > 1e-8).all()
    if name == "path gradient":  # it leaves out a part, whose mean is zero
        return
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            encoder.bias[0] += step
            ends.append(loss(torch.Generator()).item())
            encoder.bias[0] -= step
    assert slope[0].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=5e-3, abs=1e-5)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ddp_finds_every_parameter_used(group: None, name: str, context: bool) -> None:
    objective = DistributedDataParallel(made(name, context=context))
    for _ in range(2):  # the second call fails where a parameter was not in the first loss
        objective(*arguments(name, context)).backward()
    check_gradients(objective)


@pytest.mark.parametrize(
    "kind", ["gaussian", "planar", "radial", "sylvester", "iaf", "coupling", "ffjord"]
)
def test_ddp_of_autoencoders(group: None, kind: str) -> None:
    torch.manual_seed(0)
    objective = DistributedDataParallel(autoencoder(kind))
    for _ in range(2):
        objective(torch.randn(6, 3), beta=0.5).backward()
    check_gradients(objective)
