"""What no solver can be right with is found and named; run as a script, it checks its table.

The last test runs this file under `python -O -W error`, so nothing in the table may be an `assert`.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnf
from cnf.ode import Solver, odeint

NAN = float("nan")
GRADIENTS = ("backprop", "checkpoint", "adjoint")
BATCHES = ("shared", "independent")
SECONDS = 5.0


class Case(NamedTuple):
    """A call that must fail, how, and what its message must say."""

    name: str
    call: Any
    error: type[Exception]
    words: tuple[str, ...]
    status: str | None = None


def complaint(case: Case) -> str | None:
    """What is wrong with the way in which a case fails, or None."""
    start = time.process_time()
    try:
        result = case.call()
    except Exception as error:
        if type(error) is not case.error:
            return f"raised {type(error).__name__}, not {case.error.__name__}: {error}"
        missing = [word for word in case.words if word not in str(error)]
        if missing:
            return f"does not say {missing}: {error}"
        if case.status is not None and error.status != case.status:
            return f"has status {error.status}, not {case.status}: {error}"
        seconds = time.process_time() - start
        return f"took {seconds:.1f} s" if seconds > SECONDS else None
    return f"raised nothing, and returned {result!r}"


def points(n: int = 5, d: int = 2) -> torch.Tensor:
    return torch.linspace(-1, 1, n * d).reshape(n, d)


def log_det(field: Any, x: torch.Tensor | None = None, solver: Any = None, **options: Any) -> Any:
    x = points() if x is None else x
    solver = Solver(**options) if solver is None else solver
    return cnf.CNF(field, "exact", solver).forward_and_log_det(x.clone().requires_grad_())[1]


# ---------------------------------------------------------------- the causes


def nan_at_once(t, x):
    return x * NAN


def nan_later(t, x):
    return x * torch.where(t > 0.5, NAN, -1.0)


def nan_in_sample(t, x):
    return x * torch.where(x.detach()[:, :1] > 0.2, NAN, -1.0)


def square(t, x):  # x(t) = 1 / (1/2 - t) from x(0) = 2
    return x * x


def singular(t, x):  # x(t) = -log(1/e - t) from x(0) = 1
    return x.exp()


def stiff(t, x):
    return -1e6 * (x - torch.cos(t))


def wavy(t, x):
    return (7 * x).sin() + (9 * t).cos()


def causes() -> Iterator[Case]:
    """Each status from a problem that has that cause."""
    two = torch.full((4, 1), 2.0)
    table = [
        ("nan-at-once", nan_at_once, points(), "non_finite_field", ("t=0 ", "weights", "5 of 5")),
        ("nan-later", nan_later, points(), "non_finite_field", ("weights",)),
        ("nan-in-sample", nan_in_sample, points(), "non_finite_field", ("2 of 5", "[3, 4]")),
        ("blow-up", square, two, "blow_up", ("bound the field", "4 of 4")),
        ("stiff", stiff, points(), "too_many_steps", ("stiff", "max_steps=300", "loosen")),
        ("singular", singular, two / 2, "step_underflow", ("t=0.36788", "discontinuous")),
    ]
    for (name, f, x, status, words), batch, gradient in itertools.product(
        table, BATCHES, GRADIENTS
    ):
        solver = Solver(max_steps=300, batch=batch, gradient=gradient)
        yield Case(
            f"{name}-{batch}-{gradient}",
            lambda f=f, x=x, s=solver: log_det(f, x, s),
            cnf.SolverError,
            (*words, status, "Remedy"),
            status,
        )
    words = ("tolerance", "rounding", "float64", "loosen")
    for batch, gradient in itertools.product(BATCHES, GRADIENTS):
        limit = 1000 if (gradient, batch) == ("backprop", "shared") else 100
        fine = Solver(rtol=0.0, atol=1e-12, max_steps=limit, batch=batch, gradient=gradient)
        yield Case(
            f"resolution-{batch}-{gradient}",
            lambda s=fine: log_det(wavy, 1 + points(), s),
            cnf.SolverError,
            words,
            "tolerance_below_resolution",
        )


class Holding(nn.Module):
    """A field that holds one more module, by name."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"inner": part})
        self.linear = nn.Linear(4, 4)

    def forward(self, t, x):
        part, h = self.parts["inner"], self.linear(x)
        if isinstance(part, nn.MultiheadAttention):
            h = h.reshape(len(x), 2, 2)
            return part(h, h, h, need_weights=False)[0].reshape(x.shape)
        return part(h.unsqueeze(-1)).squeeze(-1) if isinstance(part, nn.Dropout1d) else part(h)


RANDOM = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout1d": lambda: nn.Dropout1d(0.5),
    "alpha-dropout": lambda: nn.AlphaDropout(0.5),
    "batch-norm": lambda: nn.BatchNorm1d(4),
    "attention": lambda: nn.MultiheadAttention(2, 1, dropout=0.5, batch_first=True),
    "rrelu": lambda: nn.RReLU(),
}
DRAWING = {
    "dropout": lambda t, x: F.dropout(x, 0.5, training=True),
    "randn": lambda t, x: x + torch.randn_like(x),
    "randint": lambda t, x: x * torch.randint(0, 2, (1,)),
}


def randomness() -> Iterator[Case]:
    """Fields that are no functions of (t, x)."""
    wide = points(5, 4)
    for (name, make), batch in itertools.product(RANDOM.items(), BATCHES):
        yield Case(
            f"module-{name}-{batch}",
            lambda m=make, b=batch: log_det(Holding(m()), wide, batch=b),
            ValueError,
            ("'parts.inner'", type(make()).__name__, "field.eval()", "check_field=False"),
        )
    for (name, f), gradient in itertools.product(DRAWING.items(), GRADIENTS):
        for solver in (Solver(gradient=gradient), Solver("rk4", gradient=gradient)):
            yield Case(
                f"drawing-{name}-{gradient}-{solver.method}",
                lambda f=f, s=solver: log_det(f, None, s),
                ValueError,
                ("drew random numbers", "check_field=False", "context"),
            )


def gradients() -> Iterator[Case]:
    """Gradients that would be lost or wrong."""
    own = torch.full((2,), 0.5, requires_grad=True)
    for gradient, batch in itertools.product(("checkpoint", "adjoint"), BATCHES):
        solver = Solver(gradient=gradient, batch=batch)
        yield Case(
            f"captured-{gradient}-{batch}",
            lambda s=solver: log_det(lambda t, x: own * x.tanh(), None, s),
            ValueError,
            ("(2,)", "not declared", "backprop"),
        )

        def twice(s: Solver = solver) -> Any:
            x = points().requires_grad_()
            value = cnf.CNF(cnf.MLPField(2, (4,)), "exact", s).inverse(x).sum()
            return torch.autograd.grad(value, x, create_graph=True)

        words = (f'gradient="{gradient}"', "gradient='backprop'", "compile=False")
        yield Case(f"twice-{gradient}-{batch}", twice, RuntimeError, words)


CASES = [case for group in (causes, randomness, gradients) for case in group()]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_cause_is_found_and_named(case):
    assert complaint(case) is None


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [name for name in RANDOM if name != "attention"])
def test_a_module_that_is_random_in_training_only_is_allowed_in_eval(name, batch):
    field, x = Holding(RANDOM[name]()).eval(), points(5, 4)
    flow = cnf.CNF(field, "exact", Solver("rk4", steps=2, batch=batch))
    state = torch.get_rng_state()
    assert torch.equal(flow.inverse_and_log_det(x)[1], flow.inverse_and_log_det(x)[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_field_is_allowed_on_request(name):
    choice = Solver("euler", steps=2, check_field=False)
    field, x = Holding(RANDOM[name]()), points(5, 4)
    assert cnf.CNF(field, "exact", choice).forward(x).isfinite().all()
    assert cnf.CNF(field.eval(), "exact").forward(x).isfinite().all()
    flow = cnf.CNF(DRAWING["randn"], "exact", choice)
    assert not torch.equal(flow.forward(x), flow.forward(x))


def test_modules_without_an_effect_are_allowed():
    """Dropout of nothing, batch norm with statistics of its own in eval mode, other norms."""
    for part in (nn.Dropout(0.0), nn.LayerNorm(4), nn.BatchNorm1d(4).eval(), nn.RReLU().eval()):
        assert cnf.CNF(Holding(part), "exact").forward(points(5, 4)).isfinite().all()
    mixing = nn.BatchNorm1d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"parts\.inner.*mixes samples"):
        cnf.CNF(Holding(mixing), "exact").forward(points(5, 4))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_random_numbers_of_the_user_stay_as_they_were(gradient, batch):
    flow = cnf.FFJORD(2, (4,), divergence="exact", solver=Solver(gradient=gradient, batch=batch))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flow.log_prob(points()).sum().backward()
    assert torch.equal(torch.rand(4), expected)
    own = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    flow.log_prob(points(), divergence="hutchinson", generator=own).sum().backward()
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- precision


def warnings_of(solver, dtype=torch.bfloat16, enabled=True):
    flow = cnf.FFJORD(2, (4,), divergence="exact", solver=solver)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with torch.autocast("cpu", dtype, enabled=enabled), torch.no_grad():
            value = flow.log_prob(points())
    assert value.dtype == torch.float32
    return seen


def test_autocast_coarser_than_the_tolerance_is_warned_about():
    (seen,) = warnings_of(Solver(rtol=1e-3, atol=1e-3))
    assert seen.category is RuntimeWarning
    assert seen.filename == __file__
    for word in ("autocast", "bfloat16", "rtol=0.001", "0.23"):
        assert word in str(seen.message)
    assert not warnings_of(Solver(rtol=0.3, atol=0.3))
    assert not warnings_of(Solver("rk4", steps=3))
    assert not warnings_of(Solver(), enabled=False)
    assert not warnings_of(Solver(rtol=0.05, atol=0.05), torch.float16)
    assert warnings_of(Solver(rtol=1e-2, atol=1e-2), torch.float16)


# ---------------------------------------------------------------- the stiff adjoint


def stable(t, y):
    """y' = -20 (y - sin t) - 20 (y - sin t)^3 + cos t, stable forwards and not backwards."""
    away = y - t.sin()
    return -20 * away - 20 * away**3 + t.cos()


def end_of(y0, **options):
    options = {"max_steps": 20000, **options}
    y0 = torch.as_tensor(y0, dtype=torch.float64).reshape(1, 1)
    return odeint(stable, y0, 0.0, 2.0, Solver(**options))


@pytest.mark.parametrize("y0", [0.5, -0.3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_the_gradient_of_a_stiff_problem(gradient, batch, y0):
    """dy(2)/dy(0) is e^-40 or so: right to 1e-3 of the gradients of this problem.

    Where it is large enough to be told from rounding, after a tenth of the span, to 1e-3 of itself.
    """
    y = torch.tensor([[y0]], dtype=torch.float64, requires_grad=True)
    solver = Solver(gradient=gradient, batch=batch)
    (found,) = torch.autograd.grad(odeint(stable, y, 0.0, 2.0, solver).x, y)
    tight, eps = {"method": "dopri8", "rtol": 1e-13, "atol": 1e-14}, 1e-3
    difference = end_of(y0 + eps, **tight).x - end_of(y0 - eps, **tight).x
    assert abs(found - difference / (2 * eps)) < 1e-3
    assert 0 <= found < 1e-3
    (found,) = torch.autograd.grad(odeint(stable, y, 0.0, 0.1, solver).x, y)
    fine = Solver(max_steps=20000, **tight)
    high, low = (odeint(stable, y.detach() + d, 0.0, 0.1, fine).x for d in (1e-5, -1e-5))
    torch.testing.assert_close(found, (high - low) / 2e-5, rtol=1e-3, atol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_adjoint_of_a_stiff_problem_is_refused_with_advice(batch):
    y = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    start = time.process_time()
    end = odeint(stable, y, 0.0, 2.0, Solver(gradient="adjoint", batch=batch))
    assert abs(end.x.item() - math.sin(2)) < 1e-3
    with pytest.raises(cnf.SolverError, match=r"adjoint.*gradient='backprop'"):
        end.x.sum().backward()
    assert time.process_time() - start < SECONDS


# ---------------------------------------------------------------- without assertions


def test_the_causes_are_found_without_assertions_too():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 60
    names = [name for name in names if not name.endswith(("checkpoint", "adjoint"))]
    result = subprocess.run(
        [sys.executable, "-O", "-W", "error", __file__],
        env={**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(names)} cases, 0 complaints" in result.stdout


def main() -> int:
    """Check the cases, the causes in one gradient mode; the number of complaints."""
    torch.set_num_threads(1)
    cases = [case for case in CASES if not case.name.endswith(("checkpoint", "adjoint"))]
    failed = [f"{case.name}: {text}" for case in cases if (text := complaint(case)) is not None]
    sys.stdout.write("\n".join([*failed, f"{len(cases)} cases, {len(failed)} complaints\n"]))
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))


def test_too_few_steps_are_no_question_of_the_resolution():
    flow = cnf.FFJORD(2, divergence="exact", solver=Solver(rtol=1e-6, atol=1e-6, max_steps=2))
    with pytest.raises(cnf.SolverError) as raised:
        flow.log_prob(3 * torch.randn(6, 2))
    assert raised.value.status == "too_many_steps"
