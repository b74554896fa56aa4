"""The training loop: what it does, when it stops, and what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.errors import CheckpointError, SolverError, TrainingError
from cnf.objectives.terms import log_terms
from cnf.training import fit, linear, load_checkpoint, load_weights, moving_average
from cnf.training.batches import make_batches

from .noisy_run import Noisy, noisy_run


class Quadratic(nn.Module):
    """Half the squared distance to the data: its gradient is the distance, one row in every batch
    is enough.
    """

    def __init__(self, trouble: Callable[[int, Tensor], Tensor] = lambda step, loss: loss) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(2))
        self.trouble = trouble
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:  # (B, 2) -> ()
        """Loss, after `trouble` had its way with it."""
        self.step += 1
        return self.trouble(self.step, 0.5 * (self.center - x).square().sum(-1).mean())


def quick(objective: nn.Module, **options: Any) -> Any:
    """`fit` on ones by gradient descent with rate 0.1, quietly."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    choices: dict[str, Any] = {
        "steps": 20,
        "batch_size": 5,
        "optimizer": optimizer,
        "progress": False,
    }
    return fit(objective, torch.ones(10, 2), **{**choices, **options})


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_gradient_descent_in_closed_form(tmp_path: Path) -> None:
    objective = Quadratic()
    result = quick(objective, out=tmp_path, log_every=5)
    expected = 1 - 0.9**20
    assert torch.allclose(objective.center, torch.full((2,), expected))
    assert (result.stopped, result.step, result.signal, result.exit_code) == ("steps", 20, None, 0)
    assert (result.best, result.best_step, result.last) == (
        None,
        None,
        tmp_path / "last.safetensors",
    )
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[0]["loss"] == pytest.approx(0.9**8)
    assert lines[0]["grad_norm"] == pytest.approx(2**0.5 * 0.9**4)
    assert set(lines[0]) == {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "nfe_forward",
        "nfe_backward",
        "elapsed",
    }


def test_every_batch_is_augmented() -> None:
    """By twice its own, the data are twos; the center goes there as to any data."""
    objective, seen = Quadratic(), []

    def double(batch: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((tuple(batch.shape), generator.initial_seed()))
        return 2 * batch

    quick(objective, augment=double, seed=5)
    assert torch.allclose(objective.center, torch.full((2,), 2 * (1 - 0.9**20)))
    assert seen == [((5, 2), 5)] * 20


@pytest.mark.parametrize(
    ("augment", "error", "words"),
    [
        (lambda batch, generator: batch[1:], ValueError, "must return 5 rows.*got shape .4, 2."),
        (lambda batch, generator: None, TypeError, "must return a Tensor, got NoneType"),
        ("flip", TypeError, "augment must be a function .* got str"),
    ],
)
def test_an_augmentation_that_is_none_is_refused(
    augment: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quick(Quadratic(), augment=augment)


def test_drawn_batches_are_augmented_too() -> None:
    def draw(size: int, generator: torch.Generator) -> Tensor:
        return torch.ones(size, 2)

    batches = make_batches(draw, batch_size=3, seed=0, augment=lambda batch, _: -batch)
    assert batches.next().equal(-torch.ones(3, 2))


def test_clipping() -> None:
    objective = Quadratic()
    quick(objective, steps=3, clip_grad_norm=0.5)
    assert float(objective.center.detach().norm()) == pytest.approx(0.1 * 3 * 0.5, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_in_closed_form(decay: float) -> None:
    objective, center, average = Quadratic(), 0.0, 0.0
    result = quick(objective, steps=30, ema_decay=decay)
    for n in range(30):
        center += 0.1 * (1 - center)
        d = min(decay, (1 + n) / (10 + n)) if n > 0 else 0.0
        average = d * average + (1 - d) * center
    assert result.ema.center[0].item() == pytest.approx(average, rel=1e-5)


def test_average_copies_buffers_and_is_in_evaluation_mode() -> None:
    objective = Noisy()
    average = moving_average(objective, 0.9)
    objective.calls += 3
    average.update_parameters(objective)
    assert average.module.calls == 3
    assert not average.module.training
    assert average.module.tied.weight is average.module.first.weight


def test_every_row_once_per_epoch() -> None:
    batches = make_batches(torch.arange(10), batch_size=4, seed=1)
    drawn = torch.cat(
        [batches.next() for _ in range(10)]
    )  # four epochs, batches across their borders
    epochs = drawn.reshape(4, 10)
    assert all(epoch.sort().values.equal(torch.arange(10)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])


def test_batch_larger_than_the_data() -> None:
    batches = make_batches(torch.arange(3), batch_size=100, seed=1)
    assert batches.next().sort().values.tolist() == [0, 1, 2]
    assert quick(Quadratic(), batch_size=1000).step == 20


def test_function_as_data() -> None:
    def draw(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, 2, generator=generator)

    a, b, c = Quadratic(), Quadratic(), Quadratic()
    for objective, seed in ((a, 1), (b, 1), (c, 2)):
        fit(objective, draw, steps=5, batch_size=3, seed=seed, progress=False)
    assert a.center.equal(b.center)
    assert not a.center.equal(c.center)


def test_global_random_state_is_not_reseeded_and_validation_draws_none_of_it() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    quick(Quadratic(), validate=lambda ema: torch.randn(1), validate_every=3)
    assert torch.randn(3).equal(expected)


def test_best_checkpoint_holds_the_average_at_the_lowest_loss(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, math.nan, -math.inf, 1.0])
    seen = []

    def validate(ema: nn.Module) -> float:
        seen.append(ema.center.detach().clone())
        return next(losses)

    result = quick(Quadratic(), steps=12, validate=validate, validate_every=2, out=tmp_path)
    assert (result.best_step, result.best_loss) == (4, 1.0)
    load_weights(best := Quadratic(), tmp_path / "best.safetensors")
    assert best.center.equal(seen[1])
    load_weights(last := Quadratic(), tmp_path / "last.safetensors")
    assert last.center.equal(seen[5])
    validations = [line for line in log_of(tmp_path) if "val_loss" in line]
    assert [line["val_loss"] for line in validations] == [3.0, 1.0, 2.0, None, None, 1.0]
    assert [line["best"] for line in validations] == [True, True, False, False, False, False]


def test_patience() -> None:
    losses = iter([3.0, 1.0, 2.0, 1.0, 0.0])
    result = quick(
        Quadratic(), steps=100, validate=lambda ema: next(losses), validate_every=5, patience=2
    )
    assert (result.stopped, result.step, result.best_step) == ("patience", 20, 10)


def test_max_time_and_a_last_validation(tmp_path: Path) -> None:
    result = noisy_run(
        tmp_path, steps=10**6, seed=1, pause=0.002, max_time=0.2, validate_every=10**6
    )
    assert result.stopped == "max_time"
    assert 0 < result.step < 200
    assert result.best_step == result.step
    assert result.best is not None
    assert load_checkpoint(result.best)["progress"]["step"] == result.step
    again = noisy_run(
        tmp_path, steps=10**6, seed=1, pause=0.002, max_time=0.1, validate_every=10**6, resume=True
    )
    assert again.step > result.step


def nan_loss(step: int, loss: Tensor) -> Tensor:
    """Not a number at step 8."""
    return loss * (math.nan if step == 8 else 1.0)


def infinite_gradient(step: int, loss: Tensor) -> Tensor:
    """A finite loss with an infinite gradient at step 8."""
    return loss + ((loss - loss.detach()).sqrt() if step == 8 else 0.0)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [(nan_loss, "loss of step 8 is nan"), (infinite_gradient, "of step 8.*center")],
)
def test_trouble_is_raised_before_the_step(tmp_path: Path, trouble: Any, message: str) -> None:
    objective = Quadratic(trouble)
    with pytest.raises(TrainingError, match=message) as caught:
        quick(objective, out=tmp_path, validate_every=2)
    good = tmp_path / "last.safetensors"
    assert f"Last good checkpoint: {good}" in str(caught.value)
    assert load_checkpoint(good)["progress"]["step"] == 6
    assert torch.allclose(objective.center, torch.full((2,), 1 - 0.9**7))
    with pytest.raises(TrainingError, match="pass out="):
        quick(Quadratic(trouble))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    objective = Quadratic()

    def schedule(step: int) -> float:
        return math.inf if step == 3 else 1.0

    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    with pytest.raises(TrainingError, match="after step 4 the parameter center is not finite"):
        quick(objective, out=tmp_path, optimizer=optimizer, scheduler=scheduler, validate_every=2)
    assert load_checkpoint(tmp_path / "last.safetensors")["progress"]["step"] == 2


def test_solver_error_passes_with_a_note(tmp_path: Path) -> None:
    error = SolverError("stiff", status="step_underflow", t=0.5)

    def fail(step: int, loss: Tensor) -> Tensor:
        if step == 4:
            raise error
        return loss

    with pytest.raises(SolverError) as caught:
        quick(Quadratic(fail), out=tmp_path, validate_every=2)
    assert caught.value is error
    if sys.version_info >= (3, 11):
        assert str(tmp_path / "last.safetensors") in error.__notes__[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_the_run_after_its_step(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 3:
            signal.raise_signal(number)
        return loss

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    result = quick(Quadratic(interrupt), out=tmp_path)
    assert (result.stopped, result.signal, result.step, result.exit_code) == (
        "interrupted",
        number,
        3,
        128 + number,
    )
    assert load_checkpoint(tmp_path / "last.safetensors")["progress"]["step"] == 3
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(tmp_path: Path, ignored: signal.Signals) -> None:
    """As SIGINT is in a background job of a script; the other signal still ends the run."""
    (other,) = {signal.SIGINT, signal.SIGTERM} - {ignored}

    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 7:
            signal.raise_signal(ignored)
        if step == 9:
            signal.raise_signal(other)
        return loss

    signal.signal(ignored, signal.SIG_IGN)
    result = quick(Quadratic(interrupt), out=tmp_path)
    assert (result.stopped, result.signal, result.step) == ("interrupted", other, 9)
    assert load_checkpoint(tmp_path / "last.safetensors")["progress"]["step"] == 9
    assert signal.getsignal(ignored) is signal.SIG_IGN


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        quick(Quadratic(interrupt), out=tmp_path, validate_every=2)
    assert load_checkpoint(tmp_path / "last.safetensors")["progress"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("full", ["the log", "everything"])
def test_a_log_on_a_full_disk(tmp_path: Path, monkeypatch: Any, full: str) -> None:
    """The error names the file, and the step that could not be written down is saved if it can."""
    usual = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        is_full = mode == "a" or (full == "everything" and ".last.safetensors" in path.name)
        return usual(Path("/dev/full") if is_full else path, mode[:1].replace("x", "w") + mode[1:])

    monkeypatch.setattr(Path, "open", opened)
    end = r"Last good checkpoint: .*last" if full == "the log" else "No checkpoint was saved"
    message = rf"cannot write the log .*log.jsonl: No space left on device. Free space.*\. {end}"
    with pytest.raises(CheckpointError, match=message):
        quick(Quadratic(), out=tmp_path, log_every=7)
    monkeypatch.undo()
    if full == "the log":
        assert quick(Quadratic(), out=tmp_path, resume=True, steps=7).step == 7
    else:
        assert quick(Quadratic(), out=tmp_path).step == 20


def test_a_log_that_cannot_be_begun(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write the log .*log.jsonl: Is a directory"):
        quick(Quadratic(), out=tmp_path)


def test_optimizers_that_need_a_closure_are_refused() -> None:
    objective = Quadratic()
    optimizer = torch.optim.LBFGS(objective.parameters())
    with pytest.raises(
        TypeError, match=r"LBFGS, .*by a closure.*torch.optim.Adam.*step\(closure\)"
    ):
        quick(objective, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps the optimizer's step
    with pytest.raises(TypeError, match="by a closure"):
        quick(objective, optimizer=optimizer, scheduler=scheduler)


def test_in_another_thread() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(quick(Quadratic())))
    thread.start()
    thread.join()
    assert results[0].stopped == "steps"


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    quick(Quadratic(), progress=True, validate=lambda ema: 1.5, validate_every=5)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert ", val 1.5000" in shown
    assert "nfe" not in shown, "nothing was solved"
    flow = cnf.FFJORD(2, (4,), solver=cnf.Solver("rk4", steps=2))
    quick(cnf.MaximumLikelihood(flow), steps=2, progress=True)
    assert "nfe 8/" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    importlib.import_module("cnf.training")
    with pytest.raises(ImportError, match=r'needs tqdm: pip install "cnf\[examples\]"'):
        quick(Quadratic(), progress=True)
    with pytest.raises(ImportError, match="needs safetensors"):
        quick(Quadratic(), out=tmp_path)
    assert quick(Quadratic()).step == 20


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (torch.empty(0, 2), r"at least one row, got shape \(0, 2\)"),
        (torch.tensor(1.0), "at least one row"),
        (torch.ones(4, 2).index_fill(0, torch.tensor([1, 3]), math.nan), "2 of 4 rows: 1, 3"),
        (lambda count, generator: torch.ones(count + 1, 2), "must return 5 rows"),
    ],
)
def test_bad_data(train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Quadratic(), train, steps=1, batch_size=5, progress=False)


@pytest.mark.parametrize("train", [[1.0, 2.0], ([1.0],), 5, lambda count, generator: [1.0]])
def test_data_of_another_type(train: Any) -> None:
    with pytest.raises(TypeError, match="train"):
        fit(Quadratic(), train, steps=1, batch_size=5, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"validate_every": 0}, "validate_every"),
        ({"log_every": -1}, "log_every"),
        ({"patience": 0, "validate": float}, "patience"),
        ({"patience": 2}, "needs validate"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"resume": True}, "needs out"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(Quadratic(), **options)


def test_unfit_scheduler_and_loss() -> None:
    objective = Quadratic()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        quick(
            objective,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        )
    with pytest.raises(TypeError, match=r"scalar Tensor, got shape \(2,\)"):
        quick(Quadratic(lambda step, loss: loss.expand(2)))
    with pytest.raises(TypeError, match="scalar Tensor, got float"):
        quick(Quadratic(lambda step, loss: loss.item()))


def test_config_that_cannot_be_stored_is_refused_before_the_first_step(tmp_path: Path) -> None:
    objective = Quadratic()
    with pytest.raises(TypeError, match=r"config\.out is of type"):
        quick(objective, out=tmp_path, config={"out": tmp_path})
    assert objective.step == 0


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        quick(Quadratic(), out=tmp_path / "file" / "run")


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    quick(Quadratic(), out=tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a run.*resume=True"):
        quick(Quadratic(), out=tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert quick(Quadratic(), out=tmp_path, resume=True).step == 20


def test_an_objective_without_parameters_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(ValueError, match="no parameters"):
        fit(Constant(), torch.ones(4, 2), steps=1, batch_size=2, progress=False)


def test_an_optimizer_of_another_model_is_refused() -> None:
    mine, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer"):
        fit(mine, torch.ones(4, 2), steps=1, batch_size=2, optimizer=optimizer, progress=False)


class Regression(nn.Module):
    """(a x - y)^2, with a weight that may be annealed, and its parts told by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor, y: Tensor, *, beta: float = 1.0) -> Tensor:
        self.seen.append((len(x), beta))
        fit, size = (self.a * x - y).square().mean(), self.a.square()
        log_terms(fit=fit, size=size)
        return fit + beta * size


def test_pairs_stay_together() -> None:
    x = torch.randn(40)
    objective = Regression()
    fit(objective, (x, 3 * x), steps=200, batch_size=7, anneal={"beta": lambda step: 0.0},
        optimizer=torch.optim.SGD(objective.parameters(), lr=0.1), progress=False)  # fmt: skip
    assert objective.a.item() == pytest.approx(3.0, abs=1e-4)
    assert objective.seen == [(7, 0.0)] * 200


def test_drawn_pairs_are_augmented_in_the_samples_alone() -> None:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, generator=generator)
        return x, -x

    batches = make_batches(draw, batch_size=5, seed=0, augment=lambda x, generator: 2 * x)
    x, y = batches.next()
    assert x.equal(-2 * y)


def test_annealing_follows_the_step_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    x = torch.randn(8)
    seen = []
    for steps in (3, 6):
        objective = Regression()
        fit(objective, (x, x), steps=steps, batch_size=8, out=tmp_path, resume=steps > 3,
            anneal={"beta": linear(1.0, 0.0, 4)}, progress=False)  # fmt: skip
        seen += [beta for _, beta in objective.seen]
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_terms_are_logged_by_name(tmp_path: Path) -> None:
    x = torch.randn(8)
    fit(Regression(), (x, x), steps=2, batch_size=8, out=tmp_path, log_every=1, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["loss"] == pytest.approx(line["fit"] + line["size"], abs=1e-6)


def test_another_objective_is_not_resumed(tmp_path: Path) -> None:
    x = torch.randn(8, 2)
    for path in ("linear", "linear", "trigonometric"):
        objective = cnf.FlowMatching(cnf.FFJORD(2, (4,)), path=path)
        resume = (tmp_path / "last.safetensors").exists()
        if path == "linear":
            fit(objective, x, steps=2, batch_size=8, out=tmp_path, resume=resume, progress=False)
        else:
            with pytest.raises(CheckpointError, match=r"objective: .*Linear.*Trigonometric"):
                fit(objective, x, steps=3, batch_size=8, out=tmp_path, resume=True, progress=False)


def test_batches_of_no_data_have_no_size() -> None:
    with pytest.raises(ValueError, match="leave batch_size"):
        fit(Drawing(), None, steps=1, batch_size=2, progress=False)


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return (self.a - torch.randn(()).mean()).square()


def test_an_objective_that_draws_its_own_samples_resumes_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for parts in ((6,), (3, 6)):
        out = tmp_path / str(len(parts))
        torch.manual_seed(0)
        for steps in parts:
            objective = Drawing()
            fit(objective, None, steps=steps, out=out, resume=steps != parts[0], progress=False)
            torch.manual_seed(99)  # the checkpoint knows better
        ends.append(objective.a.item())
    assert ends[0] == ends[1] != 0.0


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), {}, ValueError, "as many rows each"),
        ((), {}, ValueError, "as many rows each, got shapes none"),
        ((torch.zeros(3), torch.full((3,), torch.nan)), {}, ValueError, "NaN"),
        (lambda n, g: (torch.zeros(n), torch.zeros(n + 1)), {}, ValueError, "must return 2 rows"),
        (None, {}, ValueError, "Regression is a function of data"),
        (
            torch.zeros(3),
            {"anneal": {"betta": float}},
            TypeError,
            r"anneal\['betta'\] is no argument",
        ),
        (torch.zeros(3), {"optimizer": torch.optim.Adam}, TypeError, "must be an optimiser"),
        (torch.zeros(3), {"batch_size": None}, ValueError, "batch_size must be a positive"),
        (torch.zeros(3), {"anneal": {"beta": 0.5}}, TypeError, "function of the step"),
    ],
)
def test_bad_data_and_schedules(
    train: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(Regression(), train, **{"steps": 1, "batch_size": 2, "progress": False, **options})
