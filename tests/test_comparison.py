"""compare_trace: its numbers against closed forms, and everything as it was afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import cnf
from cnf.comparison import TraceComparison, TraceRow, compare_trace
from cnf.divergence import Divergence, Hutchinson
from cnf.fields import LinearField

FIXED = cnf.Solver("rk4", steps=2)


class Tanh(nn.Module):
    """A field without closed forms."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.6 * torch.randn(dims, dims))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.tanh(x @ self.a.T)


class WrongForm(Tanh):
    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple:
        return self(t, x), 1 + ((1 - self(t, x).square()) @ self.a.diagonal())


class Shifted(Divergence):
    """Hutchinson's estimate, off by a constant."""

    def __init__(self, shift: float) -> None:
        self.inner, self.shift = Hutchinson(), shift

    def sample_noise(self, x, generator=None):
        return self.inner.sample_noise(x, generator)

    def __call__(self, field, t, x, context=None, noise=None, constants=None):
        dx, div = self.inner(field, t, x, context, noise)
        return dx, div + self.shift


class Still(cnf.Transform):
    """No transform at all."""

    def forward_and_log_det(self, z, context=None, **choices):
        return z, z.new_zeros(z.shape[:-1])

    inverse_and_log_det = forward_and_log_det


def flow_of(field, dims: int, *event: int, **options) -> cnf.Flow:
    part = cnf.CNF(field, "hutchinson", options.pop("solver", FIXED), **options)
    return cnf.Flow(cnf.StandardNormal(*(event or (dims,))), part)


def by_name(comparison: TraceComparison) -> dict[str, TraceRow]:
    return {row.name: row for row in comparison.rows}


def quick(flow: cnf.Flow, x: Tensor, context: Tensor | None = None, **options) -> TraceComparison:
    return compare_trace(flow, x, context, **{"rounds": 1, "verbose": False} | options)


def stds(a: Tensor) -> tuple[float, float]:
    """The known standard deviation of one Rademacher and one Gaussian probe."""
    s = (a + a.T) / 2
    total = s.square().sum()
    rademacher = (2 * (total - s.diagonal().square().sum())).sqrt().item()
    return rademacher, (2 * total).sqrt().item()


@pytest.mark.parametrize("closed", [True, False])
def test_the_noise_of_a_linear_flow_is_known(closed: bool) -> None:
    field = LinearField(6)
    a = nn.init.normal_(field.linear.weight, std=0.3).detach()
    times = (0.0, 1.5)
    flow = flow_of(field if closed else lambda t, x: x @ a.T, 6, times=times)
    comparison = quick(flow, torch.randn(400, 6), training=closed)
    rows = by_name(comparison)
    rademacher, gaussian = (1.5 * std for std in stds(a))
    assert rows["Hutchinson, 1 probe"].std == pytest.approx(rademacher, rel=0.05)
    assert rows["Hutchinson, 16 probes"].std == pytest.approx(rademacher / 4, rel=0.05)
    assert rows["Hutchinson, 1 Gaussian"].std == pytest.approx(gaussian, rel=0.05)
    assert ("exact, closed form" in rows) == closed
    assert comparison.exact == ("closed form" if closed else "6 products an evaluation")
    for name, row in rows.items():
        assert row.note == ""
        assert row.nfe == 8
        assert row.seconds > 0
        assert row.memory > 0
        if "exact" in name:
            assert (row.std, row.bias_error, row.draws) == (0, 0, 1)
            assert abs(row.bias) < 1e-5
        else:
            assert row.draws == 16
            assert row.bias_error == pytest.approx(row.std / math.sqrt(16 * 400))
            assert abs(row.bias) < 4.5 * row.bias_error + 1e-5


def test_evaluations_are_those_of_record_solves_and_adjoints_count() -> None:
    flow = cnf.FFJORD(2, (8,), blocks=2, divergence="exact", solver=cnf.Solver(gradient="adjoint"))
    x = torch.randn(16, 2)
    with cnf.record_solves() as solves:
        loss = -flow.log_prob(x).mean()
        forward = sum(s.nfe for s in solves)
        loss.backward()
    (row,) = quick(flow, x, estimators=["exact"]).rows
    assert row.nfe == forward
    assert row.training_nfe == sum(s.nfe for s in solves) > forward


@pytest.mark.parametrize("shift", [0.05, -0.05])
def test_a_biased_estimator_shows(shift: float) -> None:
    flow = flow_of(Tanh(3), 3)
    named = {"good": cnf.Hutchinson(), "wrong": Shifted(shift)}
    rows = by_name(quick(flow, torch.randn(400, 3), estimators=named, training=False))
    assert abs(rows["good"].bias) < 4.5 * rows["good"].bias_error
    assert abs(rows["wrong"].bias) > 4.5 * rows["wrong"].bias_error
    assert rows["wrong"].bias == pytest.approx(-shift, abs=4.5 * rows["wrong"].bias_error)


def test_a_wrong_closed_form_shows_in_the_row_of_products() -> None:
    rows = by_name(quick(flow_of(WrongForm(3), 3), torch.randn(20, 3), training=False))
    assert rows["exact, closed form"].bias == 0
    assert rows["exact, by products"].bias == pytest.approx(1.0, abs=1e-5)
    assert rows["exact, by products"].bias_error == 0


def test_everything_stays_as_it_was() -> None:
    captured = torch.randn(4, 4, requires_grad=True)
    flow = cnf.FFJORD(4, (8,), context=2).eval()
    flow.transform = cnf.Compose(
        flow.transform, cnf.CNF(lambda t, x, c: 0.1 * x @ captured, "exact", FIXED)
    )
    x, c = torch.randn(10, 4, requires_grad=True), torch.randn(10, 2)
    (-flow.log_prob(x, c).mean()).backward()
    tensors = {**flow.state_dict(), "x": x, "context": c, "captured": captured}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    owners = [*flow.parameters(), x, captured]
    gradients = [tensor.grad.clone() for tensor in owners]
    choices = [(part.solver, part.divergence) for part in flow.transform]
    state, modes = torch.get_rng_state(), [m.training for m in flow.modules()]
    quick(flow, x, c, solver=cnf.Solver("heun", steps=2))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    for owner, gradient in zip(owners, gradients, strict=True):
        assert torch.equal(owner.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(part.solver, part.divergence) for part in flow.transform] == choices
    assert [m.training for m in flow.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_generator_repeats_the_errors_whatever_the_rounds() -> None:
    flow, x = flow_of(Tanh(3), 3), torch.randn(8, 3)

    def errors(seed: int = 3, **options) -> list[tuple[float, float]]:
        generator = torch.Generator().manual_seed(seed)
        rows = quick(flow, x, generator=generator, training=False, **options).rows
        return [(row.bias, row.std) for row in rows]

    assert errors() == errors(rounds=2)
    assert errors() != errors(4)


def test_without_gradient_and_in_inference_mode() -> None:
    flow, x = flow_of(Tanh(3), 3), torch.randn(8, 3)
    with torch.no_grad():
        assert quick(flow, x).rows[0].training_seconds > 0
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert quick(flow, torch.randn(8, 3)).rows[0].training_seconds > 0


@pytest.mark.parametrize(
    "solver",
    [
        cnf.Solver(batch="independent"),
        cnf.Solver(gradient="checkpoint"),
        cnf.TorchDiffEq("rk4", steps=2),
    ],
    ids=["independent", "checkpoint", "torchdiffeq"],
)
def test_every_kind_of_solve(solver) -> None:
    comparison = quick(flow_of(Tanh(3), 3), torch.randn(2, 4, 3), solver=solver, draws=3)
    assert not any(row.note for row in comparison.rows), str(comparison)
    assert all(row.training_seconds > 0 for row in comparison.rows)
    assert comparison.rows[0].bias == 0


def test_images_in_batches() -> None:
    flow = flow_of(cnf.fields.ConvField((1, 3, 3), (4,)), 9, 1, 3, 3)
    comparison = quick(flow, torch.randn(4, 1, 3, 3), draws=2)
    assert abs(by_name(comparison)["exact, by products"].bias) < 1e-4
    assert "4 x (1, 3, 3)" in comparison.setting


def test_what_takes_too_long_is_left_out() -> None:
    flow, x = flow_of(Tanh(600), 600), 0.1 * torch.randn(4, 600)
    comparison = quick(flow, x, budget=1e-4, draws=8)
    rows = by_name(comparison)
    assert comparison.exact.startswith("none")
    exact = rows["exact, by products"]
    assert exact.note.startswith("left out: about")
    assert math.isnan(exact.seconds)
    assert math.isnan(exact.bias)
    one = rows["Hutchinson, 1 probe"]
    assert "left out" in one.note or math.isnan(one.bias)
    text = str(comparison)
    assert "raise budget" in text
    assert "no bias" in text


def test_few_draws_and_no_training_step_where_the_budget_ends(monkeypatch) -> None:
    flow, x = flow_of(Tanh(8), 8), torch.randn(4, 8)
    options = {"estimators": ["hutchinson"], "draws": 5000}
    (row,) = quick(flow, x, budget=0.2, **options).rows
    assert 2 <= row.draws < 5000
    assert f"{row.draws} draws" in row.note
    assert math.isfinite(row.bias)
    monkeypatch.setattr("cnf.comparison.trial._MEMORY", 1)
    (row,) = quick(flow, x, estimators=["hutchinson"]).rows
    assert "no training step: about" in row.note
    assert "GiB" in row.note
    assert math.isnan(row.training_seconds)


def test_what_fails_has_a_row_that_says_so() -> None:
    named = {"too much": cnf.HutchPlusPlus(rank=9), "exact": "exact"}
    comparison = quick(flow_of(Tanh(3), 3), torch.randn(4, 3), estimators=named)
    bad, good = comparison.rows
    assert "rank=9 must be at most D=3" in bad.note
    assert math.isnan(bad.std)
    assert good.note == ""
    assert good.training_seconds > 0


def test_the_table_prints_each_row(capsys) -> None:
    flow, x = flow_of(Tanh(3), 3), torch.randn(16, 3)
    comparison = compare_trace(flow, x, rounds=1)
    text = capsys.readouterr().out
    assert text == f"{comparison}\n"
    first, *heads_and_rows, last = text.splitlines()
    assert first.startswith("cnf.compare_trace: 16 x (3,), rk4, cpu")
    assert last == "  exact: 3 products an evaluation"
    for row, line in zip(comparison.rows, heads_and_rows[2:], strict=True):
        assert line.startswith(f"  {row.name} ")
        assert f"{row.std:.2g}" in line
    assert len({len(line) for line in heads_and_rows}) == 1
    assert "no parameters to train" in str(quick(flow_of(lambda t, x: -x, 3), x))


def test_the_plot_labels_every_row() -> None:
    comparison = quick(flow_of(Tanh(4), 4), torch.randn(16, 4), training=False)
    figure = comparison.plot()
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    assert {text.get_text().strip() for text in ax.texts} == {row.name for row in comparison.rows}
    assert len(ax.collections) == sum(row.std > 0 for row in comparison.rows)
    lines = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
    assert lines == {"exact, by products": pytest.approx(1e3 * comparison.rows[0].seconds)}
    points = {c.get_label(): c.get_offsets()[0] for c in ax.collections}
    for row in comparison.rows[1:]:
        assert list(points[row.name]) == pytest.approx([1e3 * row.seconds, row.std])


def test_one_dimension() -> None:
    comparison = quick(flow_of(Tanh(1), 1), torch.randn(5, 1), training=False)
    assert not any("Hutch++" in row.name for row in comparison.rows)
    assert by_name(comparison)["Hutchinson, 1 probe"].std < 1e-5
    assert isinstance(comparison.plot(), Figure)


def test_wrong_input_is_refused() -> None:
    flow, x = flow_of(Tanh(2), 2), torch.randn(4, 2)
    with pytest.raises(TypeError, match=r"cnf\.Flow"):
        quick(nn.Linear(2, 2), x)
    for wrong, match in [
        ({"x": x[:0]}, "nothing to measure"),
        ({"x": torch.randn(4, 3)}, "expected"),
        ({"x": x / 0}, "finite"),
        ({"estimators": ["hutchinsen"]}, "Did you mean 'hutchinson'"),
        ({"estimators": []}, "one or more"),
        ({"estimators": ["exact", "exact"]}, "each once"),
        ({"draws": 1}, "draws=1"),
        ({"rounds": 0}, "rounds=0"),
        ({"budget": 0}, "budget=0"),
    ]:
        with pytest.raises(ValueError, match=match):
            quick(flow, **{"x": x} | wrong)
    for wrong in [{"x": [1.0]}, {"estimators": [3]}, {"estimators": 3}, {"training": 1}]:
        with pytest.raises(TypeError):
            quick(flow, **{"x": x} | wrong)
    with pytest.raises(ValueError, match="no CNF"):
        quick(cnf.Flow(cnf.StandardNormal(2), Still()), x)


def test_a_flow_of_integers_is_compared_by_the_flow_within() -> None:
    model = cnf.FFJORD(2, hidden=(8,))
    pixels = cnf.Compose(model.transform, cnf.Sigmoid(), cnf.UniformDequantization(17))
    x = torch.randint(17, (8, 2))
    table = cnf.compare_trace(
        cnf.Flow(model.base, pixels), x, draws=4, rounds=1, training=False, verbose=False
    )
    assert table.rows[0].std == 0 < table.rows[2].std
