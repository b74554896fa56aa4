"""Importance sampling by a flow: the normaliser of a density, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import check_count
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq
from cnf.pareto import pareto_shape
from cnf.target import Target, check_target, log_density_of
from cnf.warn import warn

__all__ = ["ImportanceEstimate", "importance_sampling"]

FEW, SHARE = 10, 0.01  # effective samples, and their share, below which nothing can be trusted
HEAVY, USELESS = 0.5, 0.7  # shapes of the tail above which the variance, and all, is in doubt


@dataclass(frozen=True, eq=False)
class ImportanceEstimate:
    """What samples of a flow q tell of an unnormalised target p~ = Z p, for each condition.

        w_s = p~(x_s) / q(x_s),    x_s ~ q,  s = 1 ... S
        Z ~ mean(w),    ESS = (sum w)^2 / sum w^2

    Attributes:
        log_normalizer: log mean(w) (*batch,), in the mean below log Z by about stderr^2 / 2.
        stderr: its standard error (*batch,), by the delta method: sqrt((S / ESS - 1) / (S - 1)).
        effective_sample_size: ESS (*batch,), from 1 to S.
        free_energy: mean(-log w) (*batch,), an upper bound of -log Z in the mean.
        free_energy_stderr: its standard error (*batch,).
        pareto_shape: k of the tail of w (*batch,), see `cnf.pareto.pareto_shape`. Above 1/2 the
            variance of w may be infinite and `stderr` is too small; above 0.7 no figure can be
            trusted. NaN with fewer than 25 draws; with fewer than some hundreds it is uncertain.
        log_weights: log w (S, *batch), in float64 as all of these.
        samples: x (S, *batch, *event).
    """

    log_normalizer: Tensor
    stderr: Tensor
    effective_sample_size: Tensor
    free_energy: Tensor
    free_energy_stderr: Tensor
    pareto_shape: Tensor
    log_weights: Tensor
    samples: Tensor

    @classmethod
    def of(cls, log_weights: Tensor, samples: Tensor) -> ImportanceEstimate:
        """From the log-weights (S, *batch) of samples (S, *batch, *event)."""
        log_w = log_weights.double()
        count = len(log_w)
        log_sum = log_w.logsumexp(0)
        size = (2 * log_sum - (2 * log_w).logsumexp(0)).exp()
        return cls(
            log_normalizer=log_sum - math.log(count),
            # clamped where equal weights differ by their rounding
            stderr=((count / size - 1).clamp(min=0) / (count - 1)).sqrt(),
            effective_sample_size=size,
            free_energy=-log_w.mean(0),
            free_energy_stderr=log_w.std(0) / math.sqrt(count),
            pareto_shape=pareto_shape(log_w),
            log_weights=log_w,
            samples=samples,
        )

    @property
    def weights(self) -> Tensor:
        """w normalised to a sum of 1 (S, *batch), for means over p: sum_s w_s g(x_s)."""
        return self.log_weights.softmax(0)

    def __str__(self) -> str:
        """The estimates of one condition, or what those of several range over."""
        count = len(self.log_weights)
        lines = [
            ("log normalizer", _pair(self.log_normalizer, self.stderr)),
            ("free energy", _pair(self.free_energy, self.free_energy_stderr)),
            ("effective samples", f"{_span(self.effective_sample_size, '.1f')} of {count}"),
            ("Pareto shape", _span(self.pareto_shape, ".2f")),
        ]
        conditions = self.log_normalizer.numel()
        several = f"{conditions} conditions, lowest to highest\n" if conditions > 1 else ""
        return several + "\n".join(f"{name:<18} {value}" for name, value in lines)


def importance_sampling(
    flow: Flow,
    log_density: Target,
    samples: int,
    context: Tensor | None = None,
    *,
    batch_size: int = 10_000,
    solver: Solver | TorchDiffEq | None = None,
    generator: torch.Generator | None = None,
) -> ImportanceEstimate:
    """Estimate the normaliser of a density, log Z, by samples of a flow; without gradient.

        log Z = log E_q[p~(x) / q(x)]

    Divergences are exact, whatever the flow's own: the noise of an estimate would enter the weights
    through the exponential, and overstate Z. Weights are of use only where the flow covers all of
    the target; a mode that it misses is missing from Z, too, and no figure here tells of it.

    Args:
        flow: q, the flow to draw from.
        log_density: log p~, a function or module of x (N, *event), and of context (N, C) where some
            is given, that returns (N,). Minus infinity is a weight of zero.
        samples: S, how many to draw for each condition, 2 or more.
        context: conditions (*batch, C), or None.
        batch_size: draws at once, for each condition.
        solver: a solver, for this call.
        generator: source of randomness.

    Warns:
        RuntimeWarning: an effective sample size below 10 or below 1% of the samples, or weights
            whose largest have a Pareto shape above 1/2, with which the standard error means little.
            Where the flow's tails are far lighter than the target's, the draws may show nothing of
            it, and nothing warns.

    Raises:
        TypeError: an argument of a wrong kind; a flow of integers.
        ValueError: counts that are too small; weights that are not numbers, infinite, or all zero.

    Reference: Owen, Monte Carlo theory, methods and examples, chapter 9; Mueller et al., arXiv
    1808.03856; for the Pareto shape Vehtari et al., arXiv 1507.02646. The weights are not smoothed:
    the estimate of Z stays without bias.

    Example:
        >>> import cnf
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(cnf.transforms.Diagonal(2)))
        >>> estimate = importance_sampling(flow, lambda x: -x.square().sum(-1) / 2, 1000)
        >>> print(f"{estimate.log_normalizer:.4f}, and log(2 pi) is {math.log(2 * math.pi):.4f}")
        1.8379, and log(2 pi) is 1.8379
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
    if flow.transform.quantized:
        raise TypeError("flow is of integers, which have no density; use one of real numbers")
    check_target(log_density)
    check_count("samples", samples)
    check_count("batch_size", batch_size)
    if samples < 2:
        raise ValueError(f"samples={samples} must be 2 or more, for a standard error")
    drawn, log_weights = [], []
    with torch.no_grad():
        for start in range(0, samples, batch_size):
            x, log_q = flow.sample_and_log_prob(
                (min(batch_size, samples - start),),
                context,
                divergence="exact",
                solver=solver,
                generator=generator,
            )
            log_p = log_density_of(log_density, x, context, flow.event_shape)
            drawn.append(x)
            log_weights.append(log_p.double() - log_q.double())
    log_w = torch.cat(log_weights)
    _check_weights(log_w)
    estimate = ImportanceEstimate.of(log_w, torch.cat(drawn))
    _warn_of_doubt(estimate)
    return estimate


def _check_weights(log_w: Tensor) -> None:
    """Refuse weights (S, *batch) that have no mean, or none above zero."""
    bad = log_w.isnan() | (log_w == math.inf)
    if bad.any():
        raise ValueError(
            f"log_density(x) - log q(x) is NaN or infinite at {int(bad.sum())} of {bad.numel()} "
            "samples; log_density must be a number or minus infinity wherever the flow has samples"
        )
    if (log_w == -math.inf).all(0).any():
        raise ValueError(
            f"all {len(log_w)} samples have a log_density of minus infinity: the flow has no "
            "sample in the support of the target; train it first, by cnf.ReverseKL"
        )


def _warn_of_doubt(estimate: ImportanceEstimate) -> None:
    """Warn of weights so unequal that the standard error cannot be believed."""
    count = len(estimate.log_weights)
    if not estimate.effective_sample_size.numel():
        return
    least = estimate.effective_sample_size.min().item()
    heaviest = estimate.pareto_shape.nan_to_num(nan=-math.inf).max().item()
    if least < max(FEW, SHARE * count):
        warn(
            f"the effective sample size is {least:.1f} of {count}: neither log Z nor its standard "
            "error can be trusted; draw more samples or train the flow further"
        )
    elif heaviest > HEAVY:
        what = (
            "no figure of this estimate can be trusted"
            if heaviest > USELESS
            else "their variance may be infinite and the standard error of log Z too small"
        )
        warn(
            f"the largest of {count} weights have a Pareto shape of {heaviest:.2f}, above {HEAVY}: "
            f"{what}; use a flow with tails as heavy as the target's, such as one with a Student-t "
            "base, or train it further (with few draws the shape itself is uncertain: draw more)"
        )


def _pair(values: Tensor, errors: Tensor) -> str:
    return f"{_span(values, '.4f')} +- {_span(errors, '.4f')}"


def _span(values: Tensor, form: str) -> str:
    """A number, or the range of several."""
    if not values.numel():
        return "none"
    low, high = format(values.min().item(), form), format(values.max().item(), form)
    return low if values.numel() == 1 else f"{low} to {high}"
