"""`compare_trace`: what each way to compute the trace costs a flow, and how far off it is."""

from __future__ import annotations

import copy
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.audit.report import first_sentence
from cnf.checks import check_bool, check_count, check_number
from cnf.divergence import (
    BoundField,
    Divergence,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    as_divergence,
)
from cnf.fields.base import Constants
from cnf.fields.closed_form import offers
from cnf.flow import Flow
from cnf.memory import peak_memory
from cnf.ode import Solver, TorchDiffEq, record_solves
from cnf.ode.odeint import as_solver
from cnf.transforms import CNF

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TraceComparison", "TraceRow", "compare_trace"]

Estimators = Mapping[str, "str | Divergence"] | Sequence["str | Divergence"]

_NAN = float("nan")
_MEMORY = 4 * 2**30  # bytes that the graph of a training step may take
_TRAINING = 4  # a training step takes about as many log-likelihoods


@dataclass(frozen=True)
class TraceRow:
    """One way to compute the trace: its cost, and its error against the exact value.

    A number is NaN where it was not measured; the note says why.
    """

    name: str
    divergence: Divergence
    seconds: float = _NAN  # of a log-likelihood without gradient, median over the rounds
    training_seconds: float = _NAN  # of -log_prob.mean() and its gradient
    memory: float = _NAN  # peak of a log-likelihood above the start, in bytes
    training_memory: float = _NAN
    nfe: float = _NAN  # evaluations of the fields in a log-likelihood, mean over the draws
    training_nfe: float = _NAN  # in a training step, those of its backward pass too
    bias: float = _NAN  # mean over draws and rows of (log p - exact log p), in nats
    bias_error: float = _NAN  # the standard error of the bias, 0 where nothing is random
    std: float = _NAN  # of log p by the noise: root of the variance's mean over the rows
    draws: int = 0  # of the noise
    note: str = ""  # what was left out, and why


@dataclass(frozen=True)
class TraceComparison:
    """What `compare_trace` found: its rows, which `print` shows as a table and `plot` draws.

    Example:
        >>> row = TraceRow("exact", Exact(), 0.002, nfe=16, bias=0.0, bias_error=0.0, std=0.0)
        >>> TraceComparison((row,), "1 row of (2,)").rows[0].std
        0.0
    """

    rows: tuple[TraceRow, ...]
    setting: str  # what was measured, and how
    exact: str = "none"  # what the estimates were compared with

    def plot(self) -> Figure:
        """The noise of each estimator against its time, exact ones as lines; needs matplotlib."""
        from cnf.plotting import plot_trace

        return plot_trace(self)

    def __str__(self) -> str:
        lines = [_cells(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*_HEADS, *lines, strict=True)]
        notes = ["", "", *(row.note for row in self.rows)]
        table = [
            "  ".join([f"  {name:<{widths[0]}}", *map(str.rjust, cells, widths[1:]), note]).rstrip()
            for (name, *cells), note in zip([*_HEADS, *lines], notes, strict=True)
        ]
        return "\n".join([f"cnf.compare_trace: {self.setting}", *table, f"  exact: {self.exact}"])


_HEADS = (
    ("", "log p", "step", "log p", "step", "NFE", "NFE", "bias", "standard", "std"),
    ("", "ms", "ms", "MiB", "MiB", "log p", "step", "nats", "error", "nats"),
)


def _cells(row: TraceRow) -> list[str]:
    def show(value: float, style: str) -> str:
        return "-" if math.isnan(value) else "0" if value == 0 else f"{value:{style}}"

    times = [show(1e3 * s, ".4g") for s in (row.seconds, row.training_seconds)]
    memory = [show(b / 2**20, ".2f") for b in (row.memory, row.training_memory)]
    nfe = [show(n, ".4g") for n in (row.nfe, row.training_nfe)]
    errors = [show(row.bias, "+.1e"), show(row.bias_error, ".1e"), show(row.std, ".2g")]
    return [row.name, *times, *memory, *nfe, *errors]


def compare_trace(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    estimators: Estimators | None = None,
    draws: int = 16,
    rounds: int = 5,
    budget: float = 30.0,
    solver: Solver | TorchDiffEq | None = None,
    generator: torch.Generator | None = None,
    training: bool = True,
    verbose: bool = True,
) -> TraceComparison:
    """Measure what each way to compute the trace costs a flow, and how far off it is.

        bias = mean (log p - exact log p),    std = sqrt(mean_i Var_e log p(x_i)),
        standard error of the bias = std / sqrt(draws B)

    over independent draws of the noise e and the B rows of x. For one constant Jacobian J over a
    time T, S = (J + J^T) / 2, a Rademacher probe has std = T sqrt(2 (||S||_F^2 - sum_i S_ii^2)).
    The exact value is that of `Exact()`: its row has no error by definition, and another exact row
    shows its difference. Times are medians of rounds in which all take turns, after a warm-up;
    memory is the peak of torch's allocator. Work is done on a copy: the flow, its gradients and
    torch's random state stay as they are.

    What would take too long is left out, with a note: the price of one product with the Jacobian
    is measured first. Without an affordable exact value the bias is NaN. Fields with closed forms
    use them: to see what Hutchinson's estimate costs by automatic differentiation, wrap the field
    in a module that has nothing but `forward`.

    Args:
        flow: the flow, trained or not.
        x: data (*batch, *event), at least one row.
        context: conditions (*batch, C), or broadcastable to it.
        estimators: what to compare, by name, or "exact", "hutchinson" and `Divergence`s in a
            sequence; None for `Exact` by closed form and by products, and `Hutchinson` and
            `HutchPlusPlus` with few and with more probes.
        draws: of the noise for each estimator, two or more.
        rounds: of timings.
        budget: seconds that a row may take, about; then it gets fewer draws and rounds.
        solver: the solver to use; None for the flow's own.
        generator: source of the noise's seeds; None for torch's global one (put back after).
        training: whether to measure training steps too.
        verbose: print the table.

    Returns:
        A `TraceComparison`.

    Raises:
        SolverError: the flow's solve cannot end.
        RuntimeError: torch cannot copy the flow.
        TypeError: flow is no `Flow`, x of a wrong dtype, an estimator of another kind.
        ValueError: no rows in x, a flow without a `CNF`, an unknown estimator, fewer than two
            draws; and what `log_prob` raises for x and context.

    Example:
        >>> import cnf
        >>> flow = cnf.FFJORD(2, hidden=(8,))
        >>> table = compare_trace(flow, torch.randn(16, 2), rounds=1, verbose=False)
        >>> [row.name for row in table.rows[:3]]
        ['exact, closed form', 'exact, by products', 'Hutchinson, 1 probe']
        >>> table.rows[0].std, table.rows[2].std > 0
        (0.0, True)
    """
    _check_arguments(flow, x, draws, rounds, budget)
    check_bool("training", training)
    with torch.random.fork_rng([x.device] if x.is_cuda else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the exact divergence takes")  # priced below
        with torch.inference_mode(False), torch.enable_grad():
            subject = _Subject(flow, x, context, solver, budget)
            named = _named(subject.estimators() if estimators is None else estimators)
            source = torch.default_generator if generator is None else generator
            seeds = torch.randint(2**62, (len(named),), generator=source, device=source.device)
            pairs = zip(named.items(), seeds.tolist(), strict=True)
            trials = [_Trial(subject, name, divergence, seed) for (name, divergence), seed in pairs]
            comparison = _compare(subject, trials, draws, rounds, training=training)
    if verbose:
        print(comparison)  # noqa: T201
    return comparison


def _check_arguments(flow: Flow, x: Tensor, draws: int, rounds: int, budget: float) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be a cnf.Flow, got {type(flow).__name__}; unwrap it, as in model.module"
        )
    if not any(isinstance(module, CNF) for module in flow.modules()):
        raise ValueError("the flow has no CNF, so no trace; build it with cnf.CNF(field)")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, nothing to measure; pass one row or more")
    check_count("draws", draws)
    check_count("rounds", rounds)
    if draws < 2:
        raise ValueError(f"draws={draws} must be two or more, to have a standard deviation")
    check_number("budget", budget)
    if not budget > 0:
        raise ValueError(f"budget={budget} must be a positive number of seconds")


def _named(estimators: Estimators) -> dict[str, Divergence]:
    """The divergences by name; in a sequence they are named by what they are."""
    if isinstance(estimators, (str, Divergence)):
        estimators = [estimators]
    if isinstance(estimators, Mapping):
        pairs = [(str(name), as_divergence(each)) for name, each in estimators.items()]
    elif isinstance(estimators, Sequence):
        pairs = [
            (each if isinstance(each, str) else repr(each), as_divergence(each))
            for each in estimators
        ]
    else:
        raise TypeError(
            "estimators must be divergences by name, such as {'exact': cnf.Exact()}, or a sequence "
            f"of them, got {type(estimators).__name__}"
        )
    named = dict(pairs)
    if not named or len(named) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"estimators={names} must be one or more, each once; or name them")
    return named


def _compare(
    subject: _Subject, trials: list[_Trial], draws: int, rounds: int, *, training: bool
) -> TraceComparison:
    exact, how = subject.exact()
    for trial in trials:
        trial.attempt(lambda trial=trial: trial.estimate(exact, draws))  # type: ignore[misc]
    if training and subject.parameters:
        for trial in trials:
            trial.attempt(trial.first_step)
    order = list(trials)
    shuffle = random.Random(0).shuffle  # noqa: S311
    for _ in range(rounds):
        shuffle(order)
        for trial in order:
            trial.attempt(trial.time)
    rows = subject.x.numel() // subject.dims
    methods = ", ".join(dict.fromkeys(part.solver.method for part in subject.cnfs))
    setting = (
        f"{rows} x {subject.event}, {methods}, {subject.x.device.type}, "
        f"threads {torch.get_num_threads()}, draws {draws}, rounds {rounds}"
    )
    if training and not subject.parameters:
        setting += ", no parameters to train"
    return TraceComparison(tuple(trial.row() for trial in trials), setting, how)


class _Scout(Divergence):
    """No divergence, but a note of where each solve first asked for it."""

    def __init__(self) -> None:
        self.points: list[tuple[BoundField, tuple[Tensor, Tensor, Tensor | None]]] = []
        self.fresh = False

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Nothing; a solve begins."""
        self.fresh = True

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and zeros (B,)."""
        if self.fresh:
            self.points.append((field, (t.detach(), x.detach(), context)))
            self.fresh = False
        with torch.enable_grad():  # a field may be the gradient of something
            dx = field(t, x.detach().requires_grad_(), context).detach()
        return dx, x.new_zeros(len(x))


class _WithoutForms:
    """A field as a function alone, whose divergence takes products."""

    def __init__(self, field: BoundField) -> None:
        self.field = field

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        dx: Tensor = self.field(t, x, context)
        return dx


class _Subject:
    """A copy of the flow, its data, and what one product with the Jacobian costs in it."""

    def __init__(
        self,
        flow: Flow,
        x: Tensor,
        context: Tensor | None,
        solver: Solver | TorchDiffEq | None,
        budget: float,
    ) -> None:
        self.flow = copy.deepcopy(flow)
        self.flow.zero_grad()
        self.x = x.clone().detach()
        self.context = None if context is None else context.clone().detach()
        self.event = self.flow.event_shape
        self.dims = math.prod(self.event)
        self.budget = budget
        self.cnfs = [part for part in self.flow.modules() if isinstance(part, CNF)]
        for part in self.cnfs:
            part.solver = as_solver(solver or part.solver)
        self.parameters = [p for p in self.flow.parameters() if p.requires_grad]
        self.closed = all(offers(part.field, "closed_form") for part in self.cnfs)
        self.closed_estimate = all(offers(p.field, "closed_quadratic_form") for p in self.cnfs)
        self.product_seconds = self.product_memory = 0.0
        self._price()

    @torch.no_grad()
    def log_prob(self, divergence: Divergence, generator: torch.Generator | None = None) -> Tensor:
        """log p (*batch,), without gradient."""
        return self.flow.log_prob(self.x, self.context, divergence=divergence, generator=generator)

    def step(self, divergence: Divergence) -> None:
        """A training step's gradient, of parameters alone: those of others stay untouched."""
        loss = -self.flow.log_prob(self.x, self.context, divergence=divergence).mean()
        gradient = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        gradient[0].sum().item()  # waits for the device

    def estimators(self) -> dict[str, Divergence]:
        """What is compared by default, each with its most common settings."""
        few = max(1, min(16, self.dims // 2))
        found: dict[str, Divergence] = {}
        if self.closed:
            found["exact, closed form"] = Exact()
        found["exact, by products"] = Exact(closed_form=False)
        found["Hutchinson, 1 probe"] = Hutchinson()
        found["Hutchinson, 16 probes"] = Hutchinson(probes=16)
        found["Hutchinson, 1 Gaussian"] = Hutchinson("gaussian")
        found[f"Hutchinson, {few} orthogonal"] = Hutchinson("orthogonal", few)
        if self.dims > 1:
            rank = min(4, self.dims // 2)
            found[f"Hutch++, rank {rank}"] = HutchPlusPlus(rank, 2 * rank)
        return found

    def products(self, divergence: Divergence) -> int:
        """How many products an evaluation takes, as far as that is known."""
        if isinstance(divergence, Exact):
            return 0 if divergence.closed_form and self.closed else self.dims
        if isinstance(divergence, Hutchinson):
            return 0 if self.closed_estimate else divergence.probes
        if isinstance(divergence, HutchPlusPlus):
            return 2 * divergence.rank + divergence.probes
        return 0

    def exact(self) -> tuple[Tensor | None, str]:
        """The exact log p (*batch,), and where it is from; None where it costs too much."""
        seconds = self.product_seconds * self.products(Exact())
        if seconds > self.budget:
            return None, (
                f"none, so no bias: about {seconds:.2g} s for one value, more than "
                f"budget={self.budget:g}"
            )
        value = self.log_prob(Exact()).double()
        return value, "closed form" if self.closed else f"{self.dims} products an evaluation"

    def _price(self) -> None:
        """Let the flow judge x; then what a product costs in a log-likelihood and its graph."""
        scout, solvers = _Scout(), [part.solver for part in self.cnfs]
        for part in self.cnfs:
            if isinstance(part.solver, Solver):
                part.solver = replace(part.solver, compile=False)
        with record_solves() as solves:
            self.log_prob(scout)
        for part, solver in zip(self.cnfs, solvers, strict=True):
            part.solver = solver
        batch = min(self.dims, 64 if self.x.is_cuda else 4)
        some = Hutchinson(probes=batch)
        kept = any(solver.gradient == "backprop" for solver in solvers)  # the whole path's graph
        for (asked, at), solve in zip(scout.points, solves, strict=True):
            run = partial(some, _WithoutForms(asked), *at, some.sample_noise(at[1]))
            with torch.no_grad():
                run()
                seconds = _seconds(lambda run=run: run()[1].sum().item())  # type: ignore[misc]
            self.product_seconds += seconds * solve.nfe / batch
            evaluations = solve.nfe if kept else max(1, solve.nfe // max(1, solve.accepted))
            self.product_memory += _peak(run, self.x.device) * evaluations / batch


@dataclass
class _Trial:
    """One estimator on its way to a row."""

    subject: _Subject
    name: str
    divergence: Divergence
    seed: int
    found: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    training_times: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: float = 0.0  # seconds
    alive: bool = True

    def attempt(self, part: Callable[[], None]) -> None:
        """Measure a part, unless this or an earlier one fails; the other rows still hold."""
        if not self.alive:
            return
        try:
            part()
        except (RuntimeError, ValueError) as error:  # a rank above D, memory, a solve that fails
            self.notes.append(first_sentence(error))
            self.alive = False

    def estimate(self, exact: Tensor | None, draws: int) -> None:
        """Values for draw after draw: NFE, bias, standard deviation, and memory."""
        seconds = self.subject.product_seconds * self.subject.products(self.divergence)
        if seconds > self.subject.budget / 3:  # a value, its memory, its time
            self.notes.append(f"left out: about {seconds:.2g} s a log-likelihood; raise budget")
            self.alive = False
            return
        generator = torch.Generator(self.subject.x.device).manual_seed(self.seed)
        like = self.subject.x.reshape(-1, *self.subject.event)[:1]
        noisy = self.divergence.sample_noise(like, generator) is not None
        values, nfe = [], []
        for i in range(draws if noisy else 1):
            start = time.perf_counter()
            with record_solves() as solves:
                values.append(self.subject.log_prob(self.divergence, generator).double())
            nfe.append(sum(solve.nfe for solve in solves))
            self.spent += (time.perf_counter() - start) * (i > 0)  # the first may compile
            if i > 0 and self.spent > self.subject.budget / 3:
                break
        if noisy and len(values) < draws:
            self.notes.append(f"{len(values)} draws within budget")
        self._judge(torch.stack(values), exact, noisy=noisy)
        self.found["nfe"] = sum(nfe) / len(nfe)
        log_prob = lambda: self.subject.log_prob(self.divergence)  # noqa: E731
        self.found["memory"] = _peak(log_prob, self.subject.x.device)

    def _judge(self, values: Tensor, exact: Tensor | None, *, noisy: bool) -> None:
        """Bias and standard deviation of log p (draws, *batch)."""
        std = values.var(0).mean().sqrt().item() if noisy else 0.0
        self.found |= {"std": std, "draws": len(values)}
        if isinstance(self.divergence, Exact) and self.divergence == Exact():
            self.found |= {"bias": 0.0, "bias_error": 0.0}
        elif exact is not None:
            self.found["bias"] = (values - exact).mean().item()
            self.found["bias_error"] = std / math.sqrt(values.numel())

    def first_step(self) -> None:
        """The warm-up of the training step, its NFE and memory; unless it takes too much."""
        subject, bytes_ = self.subject, self.subject.product_memory
        seconds = _TRAINING * _seconds(lambda: subject.log_prob(self.divergence).sum().item())
        bytes_ *= subject.products(self.divergence)
        if self.spent + 3 * seconds > subject.budget or bytes_ > _MEMORY:
            what = f"{bytes_ / 2**30:.2g} GiB" if bytes_ > _MEMORY else f"{seconds:.2g} s"
            self.notes.append(f"no training step: about {what}")
            return
        with record_solves() as solves:
            subject.step(self.divergence)
        self.found["training_nfe"] = float(sum(solve.nfe for solve in solves))
        memory = _peak(lambda: subject.step(self.divergence), subject.x.device)
        self.found["training_memory"] = memory

    def time(self) -> None:
        """One round; none where the budget is spent."""
        if self.times and self.spent > self.subject.budget:
            return
        self.times.append(_seconds(lambda: self.subject.log_prob(self.divergence).sum().item()))
        self.spent += self.times[-1]
        if "training_nfe" in self.found:
            self.training_times.append(_seconds(lambda: self.subject.step(self.divergence)))
            self.spent += self.training_times[-1]

    def row(self) -> TraceRow:
        """What was measured."""
        times = {"seconds": self.times, "training_seconds": self.training_times}
        self.found |= {name: median(each) for name, each in times.items() if each}
        return TraceRow(self.name, self.divergence, **self.found, note="; ".join(self.notes))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak(run: Callable[[], object], device: torch.device) -> float:
    """The peak of memory in bytes; NaN where it is not known."""
    try:
        return float(peak_memory(run, device)[1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # another profiler is at work, or another kind of device
        return _NAN
