"""The trend of the function evaluations: a field that grows stiff in training is noticed, once."""

from __future__ import annotations

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.ode.methods import METHODS
from cnf.training import NFETrend, fit, load_checkpoint, save_checkpoint

from .test_checkpoint import same

ADAPTIVE = cnf.Solver("bosh3", rtol=3e-2, atol=3e-2)
STEPS = 176
QUARTER_TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


@contextmanager
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings of the block, none hidden because it was shown before."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def warned_at(numbers: list[int], **options: Any) -> int | None:
    """The step of the warning, by the definition: medians of slices."""
    growth, window = options.get("growth", 5.0), options.get("window", 100)
    first = statistics.median(numbers[:window])
    for step in range(window + 1, len(numbers) + 1):
        if statistics.median(numbers[step - window : step]) >= growth * first:
            return step
    return None


def numbers_of(message: warnings.WarningMessage) -> tuple[float, ...]:
    """What a warning names: the step, the recent median, the first one."""
    pattern = r"at step (\d+) .* last \d+ is ([\d.]+), that of the first \d+ was ([\d.]+)\."
    found = re.search(pattern, str(message.message))
    assert found is not None
    return tuple(map(float, found.groups()))


class Spinning(nn.Module):
    """A rotation that gradient descent with rate `growth` makes exp(growth) times as fast in every
    step, so that an adaptive method needs ever more evaluations.
    """

    def __init__(self, solver: Callable[[int], Any] = lambda step: ADAPTIVE) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(0.0))
        self.solver = solver
        self.nfe: list[int] = []

    def forward(self, x: Tensor) -> Tensor:  # (B, 2) -> ()
        """Minus the logarithm of the rate, after a solve of the rotation."""
        matrix = self.log_rate.detach().exp() * QUARTER_TURN

        def rotate(t: Tensor, x: Tensor) -> Tensor:
            return x @ matrix

        with torch.no_grad():
            end = cnf.odeint(rotate, x, 0.0, 1.0, self.solver(len(self.nfe)))
        self.nfe.append(end.stats.nfe)
        return -self.log_rate


def train(
    objective: Spinning, steps: int, growth: float = 0.034, **options: Any
) -> list[warnings.WarningMessage]:
    """The warnings of `fit`."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(objective.parameters(), lr=growth)
    choices = {"steps": steps, "batch_size": 4, "optimizer": optimizer, "progress": False}
    with caught() as found:
        fit(objective, torch.ones(4, 2), **{**choices, **options})
    return found


def updates(trend: NFETrend, numbers: list[int]) -> list[warnings.WarningMessage]:
    """The warnings of the trend."""
    with caught() as found:
        for nfe in numbers:
            trend.update(nfe)
    return found


@dataclass
class Whole:
    """A run in one piece: its evaluations step by step, its warnings, its folder; and the step at
    which it should warn.
    """

    nfe: list[int]
    warnings: list[warnings.WarningMessage]
    out: Path
    step: int


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of 176 steps."""
    objective, out = Spinning(), tmp_path_factory.mktemp("whole")
    found = train(objective, STEPS, out=out)
    return Whole(objective.nfe, found, out, warned_at(objective.nfe) or 0)


def test_fit_warns_once_where_the_definition_says(whole: Whole) -> None:
    (warning,) = whole.warnings
    assert 110 < whole.step < STEPS - 2
    assert warning.category is RuntimeWarning
    assert numbers_of(warning) == (
        whole.step,
        statistics.median(whole.nfe[whole.step - 100 : whole.step]),
        statistics.median(whole.nfe[:100]),
    )
    for remedy in ("Regularise", "weight decay", "smooth", "rtol", "learning rate", "fixed-step"):
        assert remedy in str(warning.message)


def test_no_warning_before_that_step_nor_where_nothing_grows(whole: Whole) -> None:
    objective = Spinning()
    assert train(objective, whole.step - 1) == []
    assert objective.nfe == whole.nfe[: whole.step - 1]
    assert train(Spinning(), STEPS, growth=0.001) == []


def test_fixed_steps_are_not_watched() -> None:
    """Nor where their number grows twentyfold, as somebody may choose."""
    objective = Spinning(lambda step: cnf.Solver("rk4", steps=1 if step < 105 else 20))
    assert train(objective, STEPS, growth=0.001) == []
    assert warned_at(objective.nfe) is not None


@pytest.mark.parametrize("cut", [60, 120, "after the warning"])
def test_resumed_run_warns_where_the_run_in_one_piece_does(
    tmp_path: Path, whole: Whole, cut: Any
) -> None:
    late = isinstance(cut, str)
    first = train(Spinning(), whole.step + 1 if late else cut, out=tmp_path)
    second = train(Spinning(), STEPS, out=tmp_path, resume=True)
    assert (len(first), len(second)) == ((1, 0) if late else (0, 1))
    assert numbers_of((first + second)[0]) == numbers_of(whole.warnings[0])
    states = [load_checkpoint(out / "last.safetensors") for out in (whole.out, tmp_path)]
    for state in states:
        state["progress"].pop("elapsed")
    assert same(*states)


def test_a_checkpoint_from_before_the_trend_is_resumed(tmp_path: Path, whole: Whole) -> None:
    train(Spinning(), 10, out=tmp_path)
    file = tmp_path / "last.safetensors"
    state = load_checkpoint(file)
    assert state.pop("trend")["recent"] == whole.nfe[:10]
    save_checkpoint(file, state)
    objective = Spinning()
    (warning,) = train(objective, STEPS, out=tmp_path, resume=True)
    assert objective.nfe == whole.nfe[10:]
    assert numbers_of(warning)[0] == 10 + (warned_at(objective.nfe) or 0)


SERIES = {
    "jump": [10] * 8 + [50] * 8,
    "just below": [10] * 8 + [49] * 50,
    "noise": [30, 8, 60, 14, 400, 20, 20, 7, 9, 100, 150, 100, 7, 160, 99, 101, 7, 230, 90, 110],
    "spikes": [10, 10, 10, 10, 900] * 30,
    "slow": [10 + k // 3 for k in range(600)],
    "falls": [500 - k for k in range(400)],
    "few": [1, 900, 900, 900],
    "from the start": [900] * 20,
}


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 5, "growth": 2.0}], ids=str)
@pytest.mark.parametrize("name", SERIES)
def test_warns_where_the_definition_says(name: str, options: dict[str, Any]) -> None:
    numbers = SERIES[name]
    step = warned_at(numbers, **options)
    trend = NFETrend(**options)
    found = updates(trend, numbers)
    assert [numbers_of(warning)[0] for warning in found] == ([] if step is None else [step])
    assert trend.step == len(numbers)
    assert trend.warned == (step is not None)


def test_the_series_tell_warnings_from_silence() -> None:
    steps = {name: warned_at(numbers, window=4) for name, numbers in SERIES.items()}
    assert {name for name, step in steps.items() if step} == {"jump", "noise", "slow"}
    assert warned_at(SERIES["slow"]) is not None


def test_steps_without_evaluations_count_but_do_not_matter() -> None:
    assert updates(NFETrend(window=2), [0] * 50) == []
    found = updates(NFETrend(window=2), [0, 0, 10, 0, 10, 50, 0, 50])
    assert [numbers_of(warning) for warning in found] == [(8, 50, 10)]


@pytest.mark.parametrize("kind", [cnf.Solver, cnf.TorchDiffEq])
def test_observes_forward_solves_by_adaptive_methods(kind: Any) -> None:
    flow = cnf.FFJORD(2, hidden=(4,), divergence="exact")
    names = METHODS if kind is cnf.Solver else ["adaptive_heun", "heun2", "dopri5", "rk4"]
    for name in names:
        solver = kind(name, rtol=1e-2, atol=1e-2, steps=2, gradient="adjoint")
        with cnf.record_solves() as solves:
            (flow.log_prob(torch.ones(3, 2), solver=solver).mean() ** 2).backward()
        forward = sum(solve.nfe for solve in solves if solve.kind == "forward")
        assert 0 < forward < sum(solve.nfe for solve in solves)
        trend = NFETrend(window=1)
        trend.observe(solves + solves)
        assert trend.first == (2 * forward if solver.adaptive else None), name


def test_a_state_carries_it_over() -> None:
    numbers = SERIES["noise"]
    for cut in range(len(numbers) + 1):
        whole, first, second = (NFETrend(window=4) for _ in range(3))
        expected = updates(whole, numbers)
        found = updates(first, numbers[:cut])
        second.load_state_dict(first.state_dict())
        found += updates(second, numbers[cut:])
        assert [str(w.message) for w in found] == [str(w.message) for w in expected]
        assert second.state_dict() == whole.state_dict()


def test_the_warning_points_at_the_line_of_the_caller(whole: Whole) -> None:
    (warning,) = updates(NFETrend(window=1), [10, 50])
    assert warning.filename == whole.warnings[0].filename == __file__


def test_a_warning_raised_as_an_error_is_raised_once() -> None:
    trend = NFETrend(window=1)
    trend.update(10)
    with pytest.raises(RuntimeWarning, match="Regularise"):
        trend.update(50)
    trend.update(60)
    assert trend.step == 3


def test_an_update_costs_nothing_noticeable() -> None:
    def seconds() -> float:
        trend, began = NFETrend(), time.perf_counter()
        for k in range(1000):
            trend.update(20 + k % 7)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.1  # 100 us an update; a solve takes milliseconds


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 2.5}, {"growth": 1.0}], ids=str)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        NFETrend(**options)
