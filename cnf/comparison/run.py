"""`compare_trace`: the measurements in their order, from a flow to its table."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cnf.checks import check_bool, check_count, check_number
from cnf.comparison.report import TraceComparison
from cnf.comparison.subject import Subject
from cnf.comparison.trial import Trial
from cnf.divergence import Divergence, as_divergence
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq
from cnf.transforms import CNF
from cnf.truncation import dequantized

__all__ = ["compare_trace"]

Estimators = Mapping[str, "str | Divergence"] | Sequence["str | Divergence"]


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
    in a module that has nothing but `forward`. Of a flow of integers it measures the flow of real
    numbers within, on one draw of the noise.

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
            flow, x = dequantized(flow, x, context, generator)
            if not any(isinstance(module, CNF) for module in flow.modules()):
                raise ValueError("the flow has no CNF, so no trace; build it with cnf.CNF(field)")
            subject = Subject(flow, x, context, solver, budget)
            named = _named(subject.estimators() if estimators is None else estimators)
            source = torch.default_generator if generator is None else generator
            seeds = torch.randint(2**62, (len(named),), generator=source, device=source.device)
            pairs = zip(named.items(), seeds.tolist(), strict=True)
            trials = [Trial(subject, name, divergence, seed) for (name, divergence), seed in pairs]
            comparison = _compare(subject, trials, draws, rounds, training=training)
    if verbose:
        print(comparison)  # noqa: T201
    return comparison


def _check_arguments(flow: Flow, x: Tensor, draws: int, rounds: int, budget: float) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be a cnf.Flow, got {type(flow).__name__}; unwrap it, as in model.module"
        )
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
    subject: Subject, trials: list[Trial], draws: int, rounds: int, *, training: bool
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
