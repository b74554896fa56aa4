"""Reverse Kullback-Leibler divergence: a flow fitted to a density known up to its normaliser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cnf.checks import check_choice, check_count, check_number, tracing
from cnf.divergence import Divergence
from cnf.flow import Flow, _choices
from cnf.functional import called_with, named_tensors
from cnf.objectives.survivors import of_survivors
from cnf.objectives.terms import log_terms
from cnf.ode import Solver, TorchDiffEq
from cnf.target import Target, check_target, log_density_of
from cnf.transforms.base import Choices, over_samples
from cnf.warn import warn

__all__ = ["ReverseKL"]

GRADIENTS = ("reparameterised", "path")


class ReverseKL(nn.Module):
    """The free energy of a flow q for an unnormalised target p~ = Z p, from samples of the flow.

        F = E_q[log q(x) - beta log p~(x)]
        F = KL(q || p) - log Z   at beta = 1, so F >= -log Z, with equality only for q = p

    It needs no data. With context the mean is over conditions, too: amortised inference. beta < 1
    flattens the target while the flow finds its modes, see `cnf.training.linear`:

        fit(objective, None, ..., anneal={"beta": cnf.training.linear(0.01, 1.0, 1000)})

    The gradient is that of x = f(z) in either mode:

    - "reparameterised" differentiates all of the mean, in one pass through the flow;
    - "path" holds the parameters of log q fixed, leaving out a term whose mean is zero. At q = p it
      has no variance, so that the flow settles there. It costs a second pass, x to z; its value is
      the same. Context counts as parameters of q. A flow whose two directions disagree, as those of
      `BatchNorm` do in train(), must not be trained by it.

    The term left out is the flow's own: parameters of `log_density` get the same gradient in both.
    Those that require one are trained with the flow, as in an evidence lower bound; freeze them
    with `requires_grad_(False)` where the target is given.

    Where a solver has on_failure="nan", the mean is over the samples whose solves end, and the
    number of the others is logged as failed_samples.

    Hutchinson's estimate of a divergence leaves mean and gradient unbiased, here where log q enters
    linearly; in importance weights it does not, see `importance_sampling`.

    Args:
        flow: q, the flow to train, of real numbers.
        log_density: log p~, a function or module of x (N, *event), and of context (N, C) where the
            objective is given some, that returns (N,) and is differentiable in x.
        samples: draws a step, for each condition.
        gradient: "reparameterised" or "path".

    Warns:
        RuntimeWarning: a target without gradient in x.

    Raises:
        TypeError: an argument of a wrong kind; a flow of integers.
        ValueError: a choice that is not known; in a call, a target that is not finite at a sample,
            or that returns another shape.

    Reference: Rezende and Mohamed, arXiv 1505.05770; for path gradients Roeder et al., arXiv
    1703.09194, and of continuous flows Vaitl et al., arXiv 2206.09016.

    Example:
        >>> import cnf
        >>> from cnf.data import potential
        >>> objective = ReverseKL(cnf.PlanarFlow(2), potential(1).log_density)
        >>> loss = objective(beta=0.5)
        >>> loss.backward()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        flow: Flow,
        log_density: Target,
        *,
        samples: int = 256,
        gradient: str = "reparameterised",
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
        if flow.transform.quantized:
            raise TypeError(
                "flow is of integers, whose samples have no gradient; use one of real numbers, "
                "without a dequantization"
            )
        check_target(log_density)
        check_count("samples", samples)
        check_choice("gradient", gradient, GRADIENTS)
        self.flow = flow
        self.log_density = log_density
        self.samples = samples
        self.gradient = gradient

    def extra_repr(self) -> str:
        """The choices."""
        return f"samples={self.samples}, gradient={self.gradient!r}"

    def forward(
        self,
        context: Tensor | None = None,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """An estimate of the free energy, a scalar; unbiased, and so is its gradient.

        Args:
            context: conditions (*batch, C), or None.
            beta: weight of the target, 0 or more.
            generator: source of the samples, and of the estimator's noise.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.
        """
        check_number("beta", beta)
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta={beta!r} must be 0 or more and finite; the target itself is 1")
        if context is not None and not self.flow.transform.takes_context:
            raise ValueError(
                "ReverseKL draws its own samples, and takes conditions for flows with context; got "
                f"a tensor of shape {tuple(context.shape)} for a flow without: call "
                "it with nothing, fit(objective, None, ...)"
            )
        choices = _choices(divergence, solver, generator)
        carry = self._path if self.gradient == "path" else self.flow._carry

        def evaluate(z: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
            x, log_q = carry(z, context, choices)
            return (log_q, x) if context is None else (log_q, x, context)

        z = self.flow._draw((self.samples,), context, generator)
        log_q, x, *rows = of_survivors(evaluate, self.flow, z, context, solver)
        own = rows[0] if rows else None
        log_p = log_density_of(self.log_density, x, own, self.flow.event_shape)
        _check_finite(log_p)
        _warn_of_no_gradient(log_p, x)
        entropy, energy = -log_q.mean(), -log_p.mean()
        log_terms(free_energy=energy - entropy, entropy=entropy)
        return beta * energy - entropy

    def _path(self, z: Tensor, context: Tensor | None, choices: Choices) -> tuple[Tensor, Tensor]:
        """Samples x (S, *batch, *event), and log q(x) (S, *batch) with the gradient of x alone."""
        x = self.flow.transform.forward(z, context, **choices)
        failed = over_samples(0 * x.detach(), x.ndim - len(self.flow.event_shape))
        if not tracing() and failed.isnan().any():
            return x, failed  # to be left out first: no density can be had of NaN
        fixed = {name: p.detach() for name, p in named_tensors(self.flow, buffers=False).items()}
        given = None if context is None else context.detach()
        return x, called_with(self.flow, fixed, (x, given), choices)


def _warn_of_no_gradient(log_p: Tensor, x: Tensor) -> None:
    """Tell of a target that says nothing of where the flow should go."""
    if x.requires_grad and torch.is_grad_enabled() and not log_p.requires_grad and not tracing():
        warn(
            "log_density has no gradient in x, so the flow will only spread; write it with "
            "operations of PyTorch, without .detach(), no_grad or NumPy (of a constant density "
            "this is as it should be)"
        )


def _check_finite(log_p: Tensor) -> None:
    """Refuse a free energy that is infinite or not a number for the target's sake."""
    if log_p.is_meta or tracing():
        return
    bad = ~log_p.detach().isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"log_density is not finite at {int(bad.sum())} of {bad.numel()} samples of the flow; "
            "give the flow the support of the target, as cnf.Compose(flow.transform, "
            "cnf.transforms.Interval(low, high)) does where that is bounded"
        )
