"""check: its numbers against closed forms, and a flow wrong on purpose for every row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.audit import Audit, check


class Linear(nn.Module):
    """dx/dt = A x, of which all is known."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(0.6 * torch.randn(dims, dims))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


class Tanh(Linear):
    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.tanh(x @ self.a.T)


class WrongDivergence(Tanh):
    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple:
        return self(t, x), 0.9 * (1 - self(t, x).square()) @ self.a.diagonal()


class Detached(Linear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x.detach() @ self.a.T)


class Hidden(Linear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.detach().T)


class Noisy(Linear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) + 1e-3 * torch.randn_like(x)


class Coupled(Linear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) - 0.1 * x.mean(0)


class Rounding(Linear):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x.float() @ self.a.float().T).to(x.dtype)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * (1 + t)


def flow_of(field, divergence="exact", solver=None) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(2), cnf.CNF(field, divergence, solver))


def randomised(flow: cnf.Flow, std: float = 0.3) -> cnf.Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0.0, std)
    return flow


def bad(audit: Audit) -> set[str]:
    """The rows that are not ok."""
    assert audit.ok == all(row.ok for row in audit.rows)
    return {row.name for row in audit.rows if not row.ok}


def test_the_numbers_of_a_linear_flow_are_those_of_the_closed_form() -> None:
    flow = flow_of(Linear(), solver=cnf.Solver("rk4", steps=2))
    x = torch.randn(20, 2)
    audit = check(flow, x, verbose=False)

    exact = copy.deepcopy(flow).double()
    a, x64 = exact.transform.field.a, x.double().requires_grad_()
    z = x64 @ torch.linalg.matrix_exp(-a).T
    log_p = exact.base.log_prob(z) - a.trace()
    error = (flow.log_prob(x) - log_p).abs()
    assert audit.log_det_error == pytest.approx(error.max().item(), rel=1e-4)
    assert audit.log_det_rms == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)
    z_error = (flow.transform.inverse(x) - z).abs().max().item()
    assert audit.z_error == pytest.approx(z_error, rel=1e-2)
    trip = (flow.transform.forward(flow.transform.inverse(x)) - x).abs().max().item()
    assert audit.round_trip == pytest.approx(trip)
    assert audit.round_trip_relative == pytest.approx(trip / x.square().mean().sqrt().item())
    assert (audit.nfe, audit.accepted, audit.rejected) == (8, 2, 0)

    ours = x.clone().requires_grad_()
    inputs = [(flow.transform.field.a, a), (ours, x64)]
    g = torch.autograd.grad(flow.log_prob(ours).mean(), [pair[0] for pair in inputs])
    truth = torch.autograd.grad(log_p.mean(), [pair[1] for pair in inputs])
    relative = [((p - q).norm() / q.norm()).item() for p, q in zip(g, truth, strict=True)]
    for mode in ("backprop", "checkpoint"):
        found = audit.gradients[mode]
        assert [found.error, found.x_error] == pytest.approx(relative, rel=1e-2)
        assert found.seconds > 0
        assert found.memory > 0
    assert audit.gradients["backprop"].backward_nfe == 0
    assert audit.gradients["adjoint"].backward_nfe > 0
    assert audit.gradient_check < 1e-5
    assert audit.divergence_error < 1e-8
    assert audit.coupling < 1e-9
    assert audit.trace_noise == audit.standard_error == 0


def test_the_trace_noise_of_a_linear_flow_is_known() -> None:
    """One Rademacher probe has the variance 2 (|S|^2 - sum S_ii^2), S the symmetric part of A."""
    flow, x = flow_of(Linear(4), "hutchinson"), torch.randn(500, 4)
    flow.base = cnf.StandardNormal(4)
    a = flow.transform.field.a.detach()
    s = (a + a.T) / 2
    std = (2 * (s.square().sum() - s.diagonal().square().sum())).sqrt().item()
    audit = check(flow, x, gradients=(), verbose=False)
    assert audit.trace_noise == pytest.approx(std, rel=0.05)
    assert audit.standard_error == pytest.approx(audit.trace_noise / 500**0.5)
    assert ("trace noise" in bad(audit)) == (audit.standard_error > 0.1)
    assert "trace noise" in bad(check(flow, x[:2], gradients=(), verbose=False))


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_an_accurate_flow_is_ok(blocks: int, divergence: str, capsys) -> None:
    solver = cnf.Solver(rtol=1e-6, atol=1e-6)
    options = {"context": 3, "blocks": blocks, "divergence": divergence, "solver": solver}
    flow = randomised(cnf.FFJORD(2, (8,), **options))
    audit = check(flow, torch.randn(8, 8, 2), torch.randn(8, 3))
    assert audit.ok, str(audit)
    assert list(audit.gradients) == ["backprop", "checkpoint", "adjoint"]
    assert capsys.readouterr().out == f"{audit}\n"
    assert audit.reference.startswith("float64")


WRONG = {
    "a wrong with_divergence": (WrongDivergence, "exact", {"divergence"}),
    "one that this estimate does not use": (WrongDivergence, "hutchinson", {"divergence"}),
    "detached x": (Detached, "exact", {"divergence", "gradient check"}),
    "detached x, estimated": (Detached, "hutchinson", {"divergence", "gradient check"}),
    "hidden parameters": (Hidden, "exact", {"gradient check"}),
    "coupled rows": (Coupled, "exact", {"coupling", "divergence"}),
    "noise": (Noisy, "exact", {"determinism"}),
}


@pytest.mark.parametrize(("field", "divergence", "rows"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_flagged_where_it_is_wrong(field, divergence: str, rows: set) -> None:
    flow = flow_of(field(), divergence)
    audit = check(flow, torch.randn(64, 2), gradients=["backprop"], verbose=False)
    assert bad(audit) - {"trace noise"} == rows
    assert audit.deterministic == ("determinism" not in rows)


COARSE = [cnf.Solver("euler", steps=2), cnf.Solver("bosh3", rtol=0.3, atol=0.3)]


@pytest.mark.parametrize(
    "solver", [*COARSE, cnf.TorchDiffEq("rk4", steps=1)], ids=["euler", "loose", "torchdiffeq"]
)
def test_a_coarse_solver_is_flagged_and_a_finer_one_passes(solver) -> None:
    flow, x = randomised(cnf.FFJORD(2, (8,), divergence="exact"), 0.8), torch.randn(16, 2)
    rows = bad(check(flow, x, solver=solver, gradients=["backprop"], verbose=False))
    assert {"log-det", "backprop"} <= rows
    tight = cnf.Solver(rtol=1e-6, atol=1e-6)
    assert check(flow, x, solver=tight, gradients=(), verbose=False).ok


def test_a_mode_that_is_not_there_is_reported() -> None:
    flow = flow_of(Tanh(), solver=cnf.TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6))
    audit = check(flow, torch.randn(4, 2), gradients=["checkpoint", "backprop"], verbose=False)
    assert audit.ok, str(audit)
    assert "checkpoint" in audit.gradients["checkpoint"].failure
    assert audit.gradients["backprop"].failure == ""


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("size", [3, 9])
def test_images_few_and_many_dimensions(size: int, divergence: str) -> None:
    part = cnf.CNF(Conv(), divergence, cnf.Solver("rk4", steps=8), event_dims=3)
    flow = randomised(cnf.Flow(cnf.StandardNormal(1, size, size), part))
    x = torch.randn(3, 1, size, size)
    assert bad(check(flow, x, gradients=(), verbose=False)) <= {"trace noise"}
    flow.transform.field.forward = lambda t, x: Conv.forward(flow.transform.field, t, x.detach())
    assert "divergence" in bad(check(flow, x, gradients=(), verbose=False))


@pytest.mark.parametrize("x", [torch.randn(2), torch.randn(1, 2)], ids=["()", "(1,)"])
def test_one_row_is_enough(x: Tensor) -> None:
    audit = check(flow_of(Tanh()), x, verbose=False)
    assert audit.ok, str(audit)
    assert audit.coupling != audit.coupling  # NaN: not measured


def test_a_field_that_is_not_float64_gets_a_reference_that_says_so() -> None:
    a, x = torch.randn(2, 2), torch.randn(5, 2)
    audit = check(flow_of(lambda t, x: torch.tanh(x @ a)), x, verbose=False)
    assert audit.ok, str(audit)
    assert audit.reference.startswith("float32")
    assert "float64 fails" in str(audit)
    audit = check(flow_of(Rounding()), x, gradients=["backprop"], verbose=False)
    assert audit.ok, str(audit)
    assert "rounds to float32" in str(audit)


def test_nothing_is_left_behind() -> None:
    flow = randomised(cnf.FFJORD(2, (8,))).train()
    x = torch.randn(6, 2, requires_grad=True)
    flow.log_prob(x).mean().backward()
    before = copy.deepcopy(flow)
    grads = [p.grad.clone() for p in (*flow.parameters(), x)]
    value, state = x.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        check(flow, x, solver=cnf.Solver("rk4", steps=2), divergence="exact", verbose=False)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.training
    assert repr(flow) == repr(before)
    assert torch.equal(x, value)
    assert all(
        torch.equal(p, q) for p, q in zip(flow.parameters(), before.parameters(), strict=True)
    )
    assert all(torch.equal(p.grad, g) for p, g in zip((*flow.parameters(), x), grads, strict=True))


def test_without_a_reference_every_row_says_so() -> None:
    flow, x = flow_of(Tanh()), torch.randn(4, 2)
    whole = check(flow, x, verbose=False)
    hasty = check(flow, x, reference=cnf.Solver(max_steps=1), verbose=False)
    assert [row.name for row in hasty.rows] == [row.name for row in whole.rows]
    assert bad(hasty) == {row.name for row in whole.rows} - {"determinism", "solve"}
    assert "float64 fails" in str(hasty)


class Normalised(Tanh):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x @ self.a.T))


def test_what_the_solver_was_told_not_to_check_is_flagged() -> None:
    x, unchecked = torch.randn(16, 2), cnf.Solver(check_field=False)
    with pytest.raises(ValueError, match="mixes samples"):
        check(flow_of(Normalised()), x, verbose=False)
    audit = check(flow_of(Normalised(), solver=unchecked), x, gradients=(), verbose=False)
    assert bad(audit) == {"coupling", "divergence"}
    assert bad(check(flow_of(Noisy(), solver=unchecked), x, verbose=False)) == {"determinism"}


def test_the_function_and_the_package_keep_their_names() -> None:
    assert cnf.check is check
    assert cnf.audit.__name__ == "cnf.audit"


def test_a_generator_decides_the_noise() -> None:
    flow = randomised(cnf.FFJORD(2, (8,), divergence="hutchinson"))
    x = torch.randn(6, 2)
    found = [
        check(flow, x, generator=torch.Generator().manual_seed(s), gradients=(), verbose=False)
        for s in (1, 1, 2)
    ]
    assert found[0].trace_noise == found[1].trace_noise != found[2].trace_noise


def test_bad_inputs_are_refused() -> None:
    flow, x = cnf.FFJORD(2, (8,)), torch.randn(6, 2)
    with pytest.raises(TypeError, match=r"must be a cnf\.Flow"):
        check(flow.transform, x)
    with pytest.raises(TypeError, match="x must be a tensor"):
        check(flow, [[0.0, 1.0]])
    with pytest.raises(ValueError, match="pass one row or more"):
        check(flow, x[:0])
    with pytest.raises(ValueError, match="x has shape"):
        check(flow, x[:, :1])
    with pytest.raises(TypeError, match="parameters are"):
        check(flow, x.double())
    with pytest.raises(ValueError, match="context"):
        check(flow, x, torch.randn(6, 3))
    with pytest.raises(ValueError, match="gradients"):
        check(flow, x, gradients=["exact"])
    with pytest.raises(cnf.SolverError):
        check(flow_of(lambda t, x: -50 * x**3), 2 * x)


def test_a_flow_of_integers_is_audited_by_the_flow_within() -> None:
    torch.manual_seed(0)
    model = cnf.FFJORD(2, hidden=(8,))
    pixels = cnf.Compose(model.transform, cnf.Sigmoid(), cnf.UniformDequantization(17))
    x = torch.randint(17, (8, 2))
    audit = cnf.check(cnf.Flow(model.base, pixels), x, gradients=["backprop"], verbose=False)
    assert audit.ok
    ends = cnf.Compose(cnf.Sigmoid(), cnf.UniformDequantization(17))
    with pytest.raises(ValueError, match="no CNF"):
        cnf.check(cnf.Flow(model.base, ends), x)
