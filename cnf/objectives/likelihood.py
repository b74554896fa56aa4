"""Maximum likelihood, plain or with a path that is kept simple."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.checks import check_choice, tracing
from cnf.flow import Flow
from cnf.objectives.survivors import of_survivors
from cnf.objectives.terms import log_terms
from cnf.regularizers import Regularizer
from cnf.transforms.continuous import CNF
from cnf.transforms.regularization import check_regularization
from cnf.warn import warn

__all__ = ["MaximumLikelihood"]

UNITS = ("nats", "bits_per_dim")


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a batch, in nats or in bits for each dimension.

        loss = 1/B sum_i (-log p(x_i | context_i) + sum_k weight_k R_k(x_i)),
        R_k(x) = int g_k(t, x(t)) |dt|,    divided by D log 2 for "bits_per_dim"

    Regularisers make the path of a continuous flow one that a solver follows in few steps. Each is
    integrated in the same solve, summed over all CNFs, and logged by its name without its weight;
    the likelihood is logged as negative_log_likelihood, in the unit.

    Args:
        flow: the flow to train.
        unit: "nats", or "bits_per_dim", in which image models are compared: of a flow of integers
            a bound of their codelength, see `Flow.bits_per_dim`. The gradient is scaled with the
            loss, and so must be a limit of its norm.
        regularizers: of `cnf.KineticEnergy`, `cnf.JacobianFrobenius` (RNODE has both),
            `cnf.TaylorDerivative`, `cnf.HJBResidual`, or your own; see `cnf.Regularizer`.
        steer: STEER's b. Every CNF ends at a time drawn uniformly within b of its end, the base
            time, once a batch: then the path is of use at all these times, and less stiff. Only
            here: `flow.log_prob` has the true end.

    Where a solver has on_failure="nan", the mean is over the samples whose solves end, and the
    number of the others is logged as failed_samples.

    Warns:
        RuntimeWarning: a mean log-probability of integers above 0, where a solver computes it: once
            for each objective.

    Raises:
        TrainingError: in a call, a solver with on_failure="nan" gives up more than half of x.
        TypeError: not a Flow; a regulariser that is none, or not for the flow's fields.
        ValueError: a unit that is not known; regularisers or a steer for a flow without a CNF; two
            of one name; a steer that is negative or not below the span of the times.

    Reference: RNODE, Finlay et al., arXiv 2002.02798; STEER, Ghosh et al., arXiv 2006.10711.

    Example:
        >>> import cnf, torch
        >>> flow, x = cnf.FFJORD(2), torch.randn(16, 2)
        >>> MaximumLikelihood(flow)(x).shape
        torch.Size([])
        >>> rnode = [cnf.KineticEnergy(0.01), cnf.JacobianFrobenius(0.01)]
        >>> MaximumLikelihood(flow, regularizers=rnode, steer=0.25)(x).shape
        torch.Size([])
    """

    def __init__(
        self,
        flow: Flow,
        *,
        unit: str = "nats",
        regularizers: Sequence[Regularizer] = (),
        steer: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
        check_choice("unit", unit, UNITS)
        check_regularization(flow.transform, regularizers, steer)
        self.flow = flow
        self.unit = unit
        self.regularizers = tuple(regularizers)
        self.steer = steer
        self._warned = False

    def extra_repr(self) -> str:
        """The unit, and how the path is kept simple."""
        parts = [f"unit={self.unit!r}"]
        parts += [f"regularizers={self.regularizers}"] if self.regularizers else []
        parts += [f"steer={self.steer}"] if self.steer else []
        return ", ".join(parts)

    def forward(self, x: Tensor, context: Tensor | None = None, **choices: Any) -> Tensor:
        """The loss, a scalar.

        Args:
            x: batch (B, *event).
            context: (B, C) or None.
            choices: `divergence=`, `solver=`, `generator=` for this call.
        """

        def evaluate(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
            if not (self.regularizers or self.steer):
                return (self.flow.log_prob(x, context, **choices),)
            return self.flow.log_prob_and_integrals(
                x, context, regularizers=self.regularizers, steer=self.steer, **choices
            )

        log_prob, *rest = of_survivors(evaluate, self.flow, x, context, choices.get("solver"))
        loss = self._likelihood(log_prob)
        integrals = rest[0].unbind(-1) if rest else ()
        for regularizer, integral in zip(self.regularizers, integrals, strict=True):
            mean = integral.mean()
            log_terms(**{regularizer.name: mean})
            if regularizer.weight:
                loss = loss + self._in_unit(regularizer.weight * mean)
        return loss

    def _likelihood(self, log_prob: Tensor) -> Tensor:
        """The mean negative log-likelihood, in the unit."""
        nats = -log_prob.mean()
        if self._solved_integers and not (self._warned or tracing()) and nats.detach() < 0:
            self._warned = True
            warn(
                f"the mean log-probability of a batch of integers is {-nats.item():.4g} nats, and "
                "none is above 0: the steps of the solver are too coarse for what the field has "
                "become; use an adaptive method, tighter tolerances or more steps"
            )
        loss = self._in_unit(nats)
        log_terms(negative_log_likelihood=loss)
        return loss

    @torch.no_grad()
    def outside(self, x: Tensor, context: Tensor | None = None) -> str:
        """A sentence on the rows of a batch (B, *event) with log p = -inf; "" where there is none.

        Example:
            >>> import cnf, torch
            >>> flow = cnf.Flow(cnf.StandardNormal(1), cnf.transforms.Interval(0, 1))
            >>> MaximumLikelihood(flow).outside(torch.tensor([[0.5], [1.5]]))[:27]
            '1 of 2 samples of the batch'
        """
        rows = (self.flow.log_prob(x, context) == -torch.inf).flatten()
        if not rows.any():
            return ""
        return (
            f"{int(rows.sum())} of {len(rows)} samples of the batch lie outside the support of the "
            f"flow (first index {int(rows.nonzero()[0])}), where its density is zero. Remove them, "
            "or widen the support, such as levels= of a dequantization or the ends of an Interval."
        )

    @property
    def _solved_integers(self) -> bool:
        """Whether all data are integers, whose probability a solver computes."""
        levels = self.flow.transform.levels
        if levels is None or (isinstance(levels, tuple) and None in levels):
            return False
        return any(isinstance(part, CNF) for part in self.flow.transform.modules())

    def _in_unit(self, nats: Tensor) -> Tensor:
        """Nats in the unit of the loss."""
        if self.unit == "nats":
            return nats
        return nats / (math.prod(self.flow.event_shape) * math.log(2))
