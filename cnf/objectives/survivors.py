"""Losses over the samples whose solves end, for solvers with `on_failure="nan"`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cnf.checks import tracing
from cnf.errors import TrainingError
from cnf.objectives.terms import log_terms
from cnf.ode import Solver, TorchDiffEq
from cnf.transforms.context import expand_context
from cnf.transforms.continuous import CNF

__all__ = ["of_survivors"]

_SHARE = 0.5  # of the samples, which may fail
_RETRIES = 5  # evaluations of what is left: an estimator's new noise may make others fail

Evaluate = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


def of_survivors(
    evaluate: Evaluate,
    flow: nn.Module,
    x: Tensor,
    context: Tensor | None,
    solver: Solver | TorchDiffEq | None = None,
) -> tuple[Tensor, ...]:
    """evaluate(x, context), without the samples that a solver with on_failure="nan" gives up.

    Where some fail, the others are evaluated again without them. Leaving their NaN out of the mean
    would not do: in the layers behind the solve it meets the zero gradient, and 0 NaN = NaN. The
    number of failures is logged as `failed_samples`. Other solvers cost nothing.

    Args:
        evaluate: gives values (*batch, ...), of which the first (*batch,) is NaN for failures.
        flow: holds the solvers.
        x: samples (*batch, *event).
        context: (..., C), broadcastable to the batch, or None.
        solver: that of this call, None for the flow's own.

    Returns:
        The values (*batch, ...), or (N, ...) for the N samples that do not fail.

    Raises:
        TrainingError: more than half of the samples fail.
    """
    found = evaluate(x, context)
    if tracing() or not _gives_up(flow, solver):
        return found
    total = found[0].numel()
    for _ in range(_RETRIES):
        good = ~found[0].detach().isnan()
        left = int(good.sum())
        if total - left > _SHARE * total:
            break
        if left == good.numel():
            log_terms(failed_samples=found[0].new_tensor(float(total - left)))
            return found
        context = None if context is None else expand_context(context, good.shape)[good]
        x = x[good]
        found = evaluate(x, context)
    raise TrainingError(
        f"the solver gave up {total - left} of the {total} samples of the batch: at most "
        f"{_SHARE:.0%} may fail, in at most {_RETRIES} solves; Solver(on_failure='raise') tells "
        "the cause, a lower learning rate, clip_grad_norm or a regularizer prevents it"
    )


def _gives_up(flow: nn.Module, solver: Solver | TorchDiffEq | None) -> bool:
    """Whether a solver makes the samples that fail NaN."""
    if solver is not None:
        return getattr(solver, "on_failure", "raise") == "nan"
    used = (part.solver for part in flow.modules() if isinstance(part, CNF))
    return any(getattr(solver, "on_failure", "raise") == "nan" for solver in used)
