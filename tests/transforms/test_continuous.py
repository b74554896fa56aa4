"""CNF against flows in closed form, and the rules of its noise, choices and times."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import cnf

TIGHT = cnf.Solver(rtol=1e-9, atol=1e-9)
A = torch.tensor([[0.3, -1.2, 0.0], [0.9, -0.4, 0.2], [0.1, 0.5, 0.7]], dtype=torch.float64)


class Linear(nn.Module):
    """dx/dt = a(t) A x with a(t) = 1 + t."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (1 + t) * x @ A.to(x).T


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (-0.5, 2.0)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
def test_a_linear_field_is_a_matrix_exponential(times: tuple[float, float], method: str) -> None:
    transform = cnf.CNF(Linear(), "exact", cnf.Solver(method, 1e-9, 1e-9), times=times)
    z = torch.randn(5, 3, dtype=torch.float64)
    start, end = times
    area = (end + end**2 / 2) - (start + start**2 / 2)
    x, log_det = transform.forward_and_log_det(z)
    assert torch.allclose(x, z @ torch.linalg.matrix_exp(area * A).T, atol=1e-7)
    assert torch.allclose(log_det, (area * A.trace()).expand(5), atol=1e-7)
    back, negative = transform.inverse_and_log_det(x)
    assert torch.allclose(back, z, atol=1e-7)
    assert torch.allclose(negative, -log_det, atol=1e-7)


def test_a_nonlinear_field_in_closed_form() -> None:
    """dx/dt = -sin x: tan(x/2) = tan(z/2) e^-1 and dx/dz = sin x / sin z."""
    transform = cnf.CNF(lambda t, x: -x.sin(), "exact", TIGHT, event_dims=0)
    z = torch.linspace(0.2, 3.0, 20, dtype=torch.float64)
    x, log_det = transform.forward_and_log_det(z)
    truth = 2 * torch.atan((z / 2).tan() * math.exp(-1))
    assert torch.allclose(x, truth, atol=1e-7)
    assert torch.allclose(log_det, (truth.sin() / z.sin()).log(), atol=1e-7)


def test_context_drives_the_field() -> None:
    transform = cnf.CNF(lambda t, x, context: context[:, :1] * x + context[:, 1:], "exact", TIGHT)
    z, context = torch.randn(4, 2).double(), torch.tensor([[0.7, 2.0]]).double()
    x, log_det = transform.forward_and_log_det(z, context)
    rate, shift = 0.7, 2.0
    assert torch.allclose(x, z * math.exp(rate) + shift / rate * math.expm1(rate), atol=1e-7)
    assert torch.allclose(log_det, torch.full((4,), 2 * rate).double(), atol=1e-7)


def test_an_optional_context_may_be_left_out() -> None:
    def field(t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x) if context is None else context

    z = torch.randn(5, 2)
    assert torch.equal(cnf.CNF(field).forward(z), z)
    assert torch.allclose(cnf.CNF(field).forward(z, torch.ones(2)), z + 1)


@pytest.mark.parametrize("event", [(), (1,), (4,), (2, 1, 2), (1, 2, 1, 2)], ids=str)
def test_the_event_shape_of_a_field_is_known(event: tuple[int, ...]) -> None:
    if event:
        assert cnf.CNF(cnf.MLPField(event)).event_dims == len(event)
    transform = cnf.CNF(lambda t, x: 0.5 * x, "exact", event_dims=len(event))
    _, log_det = transform.forward_and_log_det(torch.ones((7, *event)))
    assert torch.allclose(log_det, torch.full((7,), 0.5 * math.prod(event)), atol=1e-5)


def test_times_stay_within_the_span() -> None:
    seen: list[float] = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        assert t.shape == ()
        assert t.dtype == x.dtype
        seen.append(t.item())
        return torch.sin(3 * x) * (1 + t)

    for solver in (cnf.Solver(), cnf.Solver("rk4"), cnf.TorchDiffEq(), cnf.TorchDiffEq("rk4")):
        for call in ("forward", "inverse"):
            seen.clear()
            getattr(cnf.CNF(field, solver=solver), call)(torch.randn(5, 2))
            first, last = (0.0, 1.0) if call == "forward" else (1.0, 0.0)
            assert seen[0] == first
            assert min(abs(t - last) for t in seen) < 1e-6
            assert min(seen) >= 0.0
            assert max(seen) <= 1.0


def test_rademacher_noise_is_exact_for_a_diagonal_jacobian() -> None:
    transform = cnf.CNF(lambda t, x: -(x**3), "hutchinson")
    x, log_det = transform.forward_and_log_det(torch.randn(5, 3), generator=seeded())
    assert log_det.std() > 0.1
    _, negative = transform.inverse_and_log_det(x, divergence="exact")
    assert torch.allclose(negative, -log_det, atol=1e-4)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_estimate_is_unbiased(noise: str) -> None:
    field = cnf.MLPField(4, (16,), frequencies=0).double()
    transform = cnf.CNF(field, cnf.Hutchinson(noise), cnf.Solver("rk4", steps=4))
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    z = torch.randn(1, 4).double()
    with torch.no_grad():
        _, exact = transform.forward_and_log_det(z, divergence="exact")
        _, estimates = transform.forward_and_log_det(z.expand(20_000, 4), generator=seeded())
    error = (estimates.mean() - exact).item()
    assert estimates.std() > 0.1
    assert abs(error) < 4.5 * estimates.std().item() / math.sqrt(20_000)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    transform, z = cnf.CNF(cnf.MLPField(4, (8,)), "hutchinson"), torch.randn(5, 4)
    first, second, other = (
        transform.forward_and_log_det(z, generator=seeded(seed))[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_the_noise_is_drawn_once_a_solve_of_the_shape_of_the_batch() -> None:
    drawn: list[torch.Size] = []

    class Counting(cnf.Hutchinson):
        def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
            drawn.append(x.shape)
            return super().sample_noise(x, generator)

    transform = cnf.CNF(cnf.MLPField(4, (8,)), Counting())
    transform.forward_and_log_det(torch.randn(3, 5, 4))[1].sum().backward()
    assert drawn == [(15, 4)]


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_random_draws_between_forward_and_backward_change_nothing(gradient: str) -> None:
    transform = cnf.CNF(cnf.MLPField(4, (8,)), "hutchinson", solver=cnf.Solver(gradient=gradient))
    batches = torch.randn(4, 4), torch.randn(5, 4)

    def gradients(disturb: bool) -> list[Tensor]:
        parameters = list(transform.parameters())
        losses = [transform.forward_and_log_det(z, generator=seeded())[1].sum() for z in batches]
        if disturb:
            torch.manual_seed(99)
            torch.randn(7)
            losses.reverse()  # backward passes interleave
        grads = [torch.autograd.grad(loss, parameters) for loss in losses]
        return [g for grad in (reversed(grads) if disturb else grads) for g in grad]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, two)


def test_values_alone_never_pay_for_the_divergence() -> None:
    class Never(cnf.Divergence):
        def __call__(self, *args):
            raise AssertionError("the divergence was computed")

    transform, z = cnf.CNF(cnf.MLPField(2), Never()), torch.randn(5, 2)
    assert transform.forward(z).shape == transform.inverse(z).shape == z.shape
    with pytest.raises(AssertionError):
        transform.forward_and_log_det(z)


def test_a_closed_form_of_the_field_is_used() -> None:
    class Cubic(nn.Module):
        calls = 0

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -(x**3)

        def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None):
            Cubic.calls += 1
            return -(x**3), -3 * x.square().sum(-1)

    z = torch.randn(5, 2)
    closed = cnf.CNF(Cubic(), "exact").forward_and_log_det(z)[1]
    assert Cubic.calls > 0
    traced = cnf.CNF(lambda t, x: -(x**3), "exact").forward_and_log_det(z)[1]
    assert torch.allclose(closed, traced, atol=1e-5)


def test_choices_hold_for_one_call_alone() -> None:
    transform, z = cnf.CNF(cnf.MLPField(2), "hutchinson"), torch.randn(5, 2)
    with cnf.record_solves() as solves:
        transform.forward_and_log_det(z, solver=cnf.Solver("rk4", steps=3), divergence="exact")
        transform.forward_and_log_det(z)
    assert [s.method for s in solves] == ["rk4", "dopri5"]
    assert solves[0].accepted == 3
    assert transform.solver == cnf.Solver()
    assert transform.divergence == cnf.Hutchinson()


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_score_is_the_derivative_of_log_det(divergence: str) -> None:
    """First derivatives in x, and their derivatives in the weights, against finite differences."""
    transform = cnf.CNF(cnf.MLPField(2, (8,)), divergence, cnf.Solver("rk4", steps=4)).double()

    def log_det(x: Tensor) -> Tensor:
        return transform.inverse_and_log_det(x, generator=seeded())[1]

    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_det, x)
    assert torch.autograd.gradgradcheck(log_det, x)
    (score,) = torch.autograd.grad(log_det(x).sum(), x, create_graph=True)
    score.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transform.parameters())


def test_train_and_eval_choose_nothing() -> None:
    transform, z = cnf.CNF(cnf.MLPField(2)), torch.randn(5, 2)
    trained = transform.train().forward_and_log_det(z, generator=seeded())
    evaluated = transform.eval().forward_and_log_det(z, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))
