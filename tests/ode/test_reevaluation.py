"""A field that is not there what it was: found where a backward pass evaluates it again."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf import Solver
from cnf.ode import odeint

RECOMPUTING = ("checkpoint", "adjoint")


class Changing(nn.Module):
    """A field with a factor that should not change, and does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("mean", torch.zeros(()))
        self.calls = itertools.count()
        self.numpy = np.random.default_rng(0)
        self.own = torch.Generator().manual_seed(0)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(x) * self.factor(x)


class Counting(Changing):
    def factor(self, x: Tensor) -> float:
        return 1 + 0.1 * (next(self.calls) % 7)


class Averaging(Changing):
    def factor(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().abs().mean()
        return 1 + self.mean


class Clock(Changing):
    def factor(self, x: Tensor) -> float:
        return 1 + 1e3 * time.perf_counter() % 1


class NumPy(Changing):
    def factor(self, x: Tensor) -> float:
        return 1 + float(self.numpy.random())


class OwnGenerator(Changing):
    def factor(self, x: Tensor) -> Tensor:
        return 1 + torch.rand((), generator=self.own)


class Spectral(Changing):
    """Power iteration goes on at every call in train(), here from a start far from its end."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.utils.parametrizations.spectral_norm(self.network[0])
        parametrization = layer.parametrizations.weight[0]
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(torch.eye(8, 3)).mul_(
                torch.tensor([3.0, 2.0, 1.0])
            )
            parametrization._u.copy_(torch.eye(8)[2] + 0.01)
            parametrization._v.copy_(torch.eye(3)[2] + 0.01)

    def factor(self, x: Tensor) -> float:
        return 1.0


FIELDS = [Counting, Averaging, Clock, NumPy, OwnGenerator, Spectral]


def backward(field: nn.Module, solver: Solver) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    z, log_det = cnf.CNF(field, "exact", solver).inverse_and_log_det(x)
    (z.square().sum() + log_det.sum()).backward()


@pytest.mark.parametrize("gradient", RECOMPUTING)
@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_that_changes_between_evaluations_is_refused(kind, gradient):
    with pytest.raises(ValueError, match=rf"'{gradient}' evaluated.*again.*check_field=False"):
        backward(kind(), Solver("rk4", steps=4, gradient=gradient))
    backward(kind(), Solver("rk4", steps=4, gradient=gradient, check_field=False))
    backward(kind(), Solver("rk4", steps=4, gradient="backprop"))


@pytest.mark.parametrize("batch", ["shared", "independent"])
def test_a_buffer_that_moves_is_found_with_adaptive_steps_too(batch):
    with pytest.raises(ValueError, match="evaluated the vector field again"):
        backward(Averaging(), Solver(gradient="checkpoint", batch=batch))


def test_one_sample_among_many_is_enough():
    """The others are much larger, and do not change."""
    calls = itertools.count()

    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x.abs() < 10, (1 + next(calls)) * x / 1e4, -x)

    x = torch.tensor([[1e6]] * 50 + [[1.0]], requires_grad=True)
    end = odeint(field, x, 0.0, 1.0, Solver("rk4", steps=3, gradient="checkpoint"))
    with pytest.raises(ValueError, match="evaluated the vector field again"):
        end.x.sum().backward()


CHOICES = [
    Solver(gradient=gradient, batch=batch)
    for gradient in RECOMPUTING
    for batch in ("shared", "independent")
]


@pytest.mark.parametrize("solver", CHOICES, ids=lambda s: f"{s.gradient}-{s.batch}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_no_reason(solver, dtype):
    """A field that rounds differently each time: by what the order of a sum may change."""
    signs = itertools.cycle((-1, 1))

    def field(t: Tensor, x: Tensor) -> Tensor:
        return (x.sin() - 2 * x) * (1 + 4 * next(signs) * torch.finfo(dtype).eps)

    x = (100 * torch.randn(8, 3, dtype=dtype)).requires_grad_()
    odeint(field, x, 0.0, 1.0, solver).x.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_a_field_in_low_precision_is_itself(gradient):
    flow = cnf.FFJORD(3, (8,), divergence="exact", solver=Solver("rk4", 3, gradient=gradient))
    with torch.autocast("cpu", torch.bfloat16):
        loss = -flow.log_prob(torch.randn(16, 3)).mean()
    loss.backward()  # outside autocast


def test_the_end_of_a_checkpointed_solve_may_be_written_into():
    x = torch.ones(2, 1, requires_grad=True)
    end = odeint(lambda t, x: -x, x, 0.0, 1.0, Solver("rk4", gradient="checkpoint")).x
    end.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 1), 2 * torch.e**-1))


def test_batch_statistics_by_hand_are_found_by_the_audit():
    """Evaluated again on the same batch they are the same: only another batch tells."""
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: x.mean(0) - x, "exact"))
    audit = cnf.check(flow, torch.randn(8, 2), gradients=["backprop"], verbose=False)
    assert not audit.ok
    assert audit.coupling > 0.1
