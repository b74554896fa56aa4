"""Data without a density are named, in `fit` and in `check`, and no others are."""

import re
import warnings

import pytest
import torch

import cnf
from cnf.data import TOY_NAMES, split_table, toy
from cnf.data.tabular import sklearn_table
from cnf.singular import singularities
from cnf.training import fit
from cnf.transforms import Compose, Diagonal, Interval


def normal(n: int = 400, dims: int = 3) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(0))


X = normal()
UNIT = X / X.norm(dim=1, keepdim=True)
BINARY = torch.cat([X, (X[:, :1] > 0).float()], 1)
SINGULAR = {
    "half of the rows one point": (
        torch.where(torch.arange(400)[:, None] % 2 == 0, torch.ones(3), X),
        "200 of 400 rows are one and the same: remove repeated rows",
    ),
    "a line": (X[:, :1] * torch.tensor([1.0, -2.0, 3.0]) + 5, "column 1 is a linear .*of 0; col"),
    "a sum": (torch.cat([X, X.sum(1, keepdim=True)], 1), "column 3 is a .* combination of 0, 1, 2"),
    "shares": (X.softmax(1), "column 2 is a linear combination of 0, 1: leave such columns out"),
    "unit vectors": (UNIT, "surface of the second order"),
    "a circle": (UNIT[:, :2] / UNIT[:, :2].norm(dim=1, keepdim=True), "surface of the second"),
    "an ellipsoid": (UNIT * torch.tensor([1.0, 5.0, 0.2]) + 3, "surface of the second order"),
    "a square": (torch.cat([X, X[:, :1].square() + X[:, 1:2]], 1), "surface of the second order"),
    "two values": (BINARY, r"column 3 has few values, 2 in 400 rows: .*UniformDequantization"),
    "one value": (BINARY.clone().fill_(1.0), "400 of 400 rows are one and the same"),
    "counts": (X.round(), "columns 0, 1, 2 have few values"),
    "many zeros": (torch.cat([X, X[:, :1].relu()], 1), "column 3 has a value that more than 33%"),
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_without_a_density(name: str, dtype: torch.dtype) -> None:
    x, message = SINGULAR[name]
    (found,) = singularities(x.to(dtype))
    assert re.search(message, found)


@pytest.mark.parametrize("n", [1, 16, 64, 2000])
def test_data_with_a_density(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in TOY_NAMES:
        assert singularities(toy(name).sample(n, generator)) == []
    for dims in (1, 2, 5, 64):
        x = normal(n, dims)
        near = torch.cat([x, x[:, :1] + 1e-3 * normal(n, dims + 1)[:, 1:2]], 1)
        for each in (x, x.exp(), x**3, 1 / x, 100 + 1e-2 * x, near):
            assert singularities(each) == []
    for table in ("breast_cancer", "iris", "wine"):
        assert singularities(split_table(sklearn_table(table)).train[:n]) == []


def test_columns_that_are_dequantized_are_left_out() -> None:
    assert singularities(BINARY, (None, None, None, 2)) == []
    assert singularities(X.round().long(), 8) == []
    (found,) = singularities(
        torch.cat([BINARY, X.sum(1, keepdim=True)], 1), (None,) * 3 + (2, None)
    )
    assert "column 4 is a linear combination of 0, 1, 2" in found


@pytest.mark.parametrize("objective", [cnf.MaximumLikelihood, cnf.FlowMatching])
def test_fit_says_it_once(objective: type, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    flow = cnf.FFJORD(3, hidden=(8,), solver=cnf.Solver("rk4", steps=2))
    fit(objective(flow), UNIT, steps=3, batch_size=100, progress=False)
    (said,) = (str(w.message) for w in recwarn)
    assert said.startswith("the data have no density, so that the likelihood grows without bound")
    assert "surface" in said


def test_check_has_a_row_for_it() -> None:
    flow = cnf.FFJORD(3, hidden=(8,), divergence="exact")
    audit = cnf.check(flow, SINGULAR["a line"][0][:32], gradients=[], verbose=False)
    assert not audit.ok
    assert audit.rows[0].name == "data"
    assert "the likelihood is unbounded: leave such columns out" in audit.rows[0].verdict
    good = cnf.check(flow, X[:32].reshape(2, 16, 3), gradients=[], verbose=False)
    assert good.rows[0].name == "determinism"


SCALED = X[:, :2] * torch.tensor([5.0, 0.1]) + torch.tensor([20.0, -30.0])
FLOWS = {
    "FFJORD": lambda: cnf.FFJORD(2, hidden=(8,), solver=cnf.Solver("rk4", steps=2)),
    "RealNVP": lambda: cnf.RealNVP(2, layers=2, hidden=(8,)),
    "MAF": lambda: cnf.MAF(2, layers=1, hidden=(8,)),
    "spline": lambda: cnf.NeuralSpline(2, layers=2, hidden=(8,)),
}


def train(flow: cnf.Flow, x: torch.Tensor, objective: type = cnf.MaximumLikelihood) -> torch.Tensor:
    torch.manual_seed(0)
    fit(objective(flow), x, steps=1, batch_size=200, progress=False)
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


@pytest.mark.parametrize("name", FLOWS)
def test_fit_says_that_data_are_far_from_the_base(name: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"far from the base.*2 of 2 dim.*standardize the data"):
        train(FLOWS[name](), SCALED)


@pytest.mark.parametrize("objective", [cnf.MaximumLikelihood, cnf.FlowMatching])
def test_the_remedy_is_one(objective: type) -> None:
    flow = FLOWS["FFJORD"]()
    with pytest.warns(RuntimeWarning, match=r"Diagonal\(event_shape\), after end.initialize\(x\)"):
        train(flow, SCALED, objective)
    layer = Diagonal(flow.event_shape)
    layer.initialize(SCALED)
    layer.requires_grad_(False)
    train(cnf.Flow(flow.base, Compose(flow.transform, layer)), SCALED, objective)


def test_it_is_the_layers_of_the_flow_that_count() -> None:
    flow = FLOWS["FFJORD"]()
    wide = cnf.Flow(flow.base, Compose(flow.transform, Interval(0, 1000)))
    train(wide, 1000 * torch.sigmoid(X[:, :2]))
    with pytest.warns(RuntimeWarning, match="far from the base"):
        train(wide, 500 + X[:, :2])
    normed = cnf.Flow(flow.base, Compose(flow.transform, cnf.transforms.ActNorm(2)))
    train(normed, SCALED)
    uniform = torch.distributions.Uniform(torch.full((2,), 1e4), torch.full((2,), 1e4 + 1))
    train(
        cnf.Flow(torch.distributions.Independent(uniform, 1), Diagonal(2)), 1e4 + X[:, :2].sigmoid()
    )


@pytest.mark.parametrize("name", TOY_NAMES)
def test_toys_are_near_enough(name: str) -> None:
    for flow in FLOWS.values():
        train(flow(), toy(name).sample(400, torch.Generator().manual_seed(0)))


@pytest.mark.filterwarnings("ignore:the data")
def test_the_look_does_not_change_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(n)
        return 50 + torch.randn(n, 2, generator=generator)

    with_look = train(cnf.FFJORD(2, hidden=(8,)), draw)
    assert len(drawn) == 1
    monkeypatch.setattr("cnf.training.step.look_at", lambda objective, batch: None)
    assert torch.equal(train(cnf.FFJORD(2, hidden=(8,)), draw), with_look)


def test_a_resumed_run_does_not_say_it_again(tmp_path) -> None:
    objective = cnf.MaximumLikelihood(FLOWS["RealNVP"]())
    options = {"batch_size": 50, "progress": False, "out": tmp_path}
    with pytest.warns(RuntimeWarning, match="far from the base"):
        fit(objective, SCALED, steps=1, **options)
    fit(objective, SCALED, steps=2, resume=True, **options)
