"""Why a solve failed: the cause, where, which samples, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import exporting
from cnf.errors import SolverError
from cnf.functional import batched, plain
from cnf.ode.control import Tolerance
from cnf.ode.stats import SolveStats

__all__ = ["Failure", "largest", "samples_of"]

_BLOW_UP = 1e6  # growth of the largest state that no useful flow shows

_REMEDIES = {
    "non_finite_field": "check the weights and inputs for NaN or Inf and the field for divisions, "
    "logarithms or overflow; a lower learning rate or gradient clipping prevents it in training",
    "blow_up": "the solution leaves every bound in finite time; bound the field (for example by "
    "tanh layers), regularise it, or shorten the time span",
    "step_underflow": "the field is stiff or discontinuous there; regularise it or use smooth "
    "activations, loosen rtol and atol, or use float64",
    "tolerance_below_resolution": "the tolerance asks for errors smaller than the rounding of the "
    "state; loosen rtol and atol, or use float64",
    "too_many_steps": "the field is stiff (in training, after too high a learning rate), random "
    "(dropout, noise drawn in it), or the tolerance tight; lower the learning rate, regularise the "
    "field, loosen rtol and atol, or raise {limit}",
}

_WHAT = {
    "non_finite_field": "the vector field returned NaN or Inf",
    "blow_up": "the state blew up",
    "step_underflow": "the step size fell below the resolution of time",
    "tolerance_below_resolution": "no step can meet the tolerance in this dtype",
    "too_many_steps": "the limit of steps was reached",
}


def samples_of(bad: Tensor) -> list[int]:
    """The indices of the true entries of a mask, flattened; none under vmap, which hides them."""
    return [] if batched(bad) else [int(i) for i in plain(bad).reshape(-1).nonzero().reshape(-1)]


def largest(x: Tensor) -> Tensor:
    """The largest |x|, a tensor (); 0 for an empty one, and where no failure can be told."""
    return x.new_zeros(()) if exporting() or not x.numel() else x.detach().abs().max()


def _finite(tensors: Iterable[Tensor]) -> bool:
    return not any(_any(~tensor.isfinite()) for tensor in tensors)


def _any(mask: Tensor) -> bool:
    return bool(plain(mask).any())


@dataclass
class Failure:
    """Tells the causes of failure apart, from what the solve last saw.

    Attributes:
        limit: name of the limit of steps, an argument of the solver.
        bound: its value.
        stats: its statistics.
        start: largest |x| at the start, a tensor () so that only a failure waits for its value.
        batch_dims: leading dimensions that index samples.
        tolerance: the error norm, None for fixed steps.
    """

    limit: str
    bound: int
    stats: SolveStats
    start: Tensor
    batch_dims: int
    tolerance: Tolerance | None = None

    def error(
        self,
        status: str,
        t: float,
        dt: float,
        x: Tensor,
        slopes: list[Tensor],
        errors: Tensor | None = None,
        numbers: Tensor | None = None,
        total: int | None = None,
    ) -> SolverError:
        """The error to raise.

        Args:
            status: what the loop saw, refined here by what x and slopes show.
            t: time reached.
            dt: step tried last.
            x: state reached.
            slopes: derivatives at the stages tried last, those of the quadratures included.
            errors: error estimate per sample of the step tried last.
            numbers: the samples that x holds (N,), where it does not hold all.
            total: number of samples, where x does not hold all.
        """
        status, bad = self._cause(status, x, slopes, errors)
        what = _WHAT[status]
        if status == "non_finite_field" and _finite(k for k in slopes if k.shape == x.shape):
            what = "the divergence of the vector field, or another quadrature, is NaN or Inf"
        samples = samples_of(bad)
        if numbers is not None:
            samples = numbers[samples].tolist()
        self.stats.status = status
        limit = f" ({self.limit}={self.bound})" if status == "too_many_steps" else ""
        remedy = _REMEDIES[status].format(limit=self.limit)
        n = total or bad.numel()
        who = f"{len(samples)} of {n} samples at fault, first indices {samples[:10]}"
        if batched(bad):
            who = "at least one sample at fault, which torch.func.vmap hides"
        return SolverError(
            f"{what} at t={t:.6g}{limit} [status {status}; method {self.stats.method}, "
            f"span {self.stats.t0:g} to {self.stats.t1:g}, last step {dt:.3g}, "
            f"{self.stats.nfe} evaluations; {who}]. Remedy: {remedy}.",
            status=status,
            t=t,
            dt=dt,
            nfe=self.stats.nfe,
            samples=samples,
        )

    def _cause(
        self, status: str, x: Tensor, slopes: list[Tensor], errors: Tensor | None
    ) -> tuple[str, Tensor]:
        sizes = self._per_sample(x.detach().abs()).amax(-1)
        bound = _BLOW_UP * self.start.clamp(min=1.0)
        grown = ~(sizes <= bound.clamp(max=1e-3 * torch.finfo(x.dtype).max))
        if _any(grown):
            return "blow_up", grown
        bad = torch.zeros_like(grown)
        for k in slopes:
            bad |= ~self._per_sample(k.detach()).isfinite().all(-1)
        if _any(bad):
            return "non_finite_field", bad
        if errors is None:
            return status, torch.ones_like(bad)
        worst = errors.reshape(bad.shape) >= 0.5 * errors.max()  # who holds the step down
        roundings = 4 if status == "too_many_steps" else 16
        if self.tolerance is not None and _any(worst & self._below(roundings, x, sizes)):
            return "tolerance_below_resolution", worst
        return status, worst

    def _below(self, roundings: int, x: Tensor, sizes: Tensor) -> Tensor:
        """Samples of which a few roundings are as large as the tolerance; sizes are max |x|."""
        if self.tolerance is None:
            return torch.zeros_like(sizes, dtype=torch.bool)
        allowed = sizes * self.tolerance.rtol + self.tolerance.atol
        return allowed < roundings * torch.finfo(x.dtype).eps * sizes

    def _per_sample(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1).flatten(self.batch_dims)  # (*batch, *event) -> (*batch, D)
