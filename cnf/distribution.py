"""A flow, given context, as a `torch.distributions.Distribution`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, kl, register_kl

from cnf.support import is_real

if TYPE_CHECKING:
    from torch.types import _size as _Size

    from cnf.flow import Flow

__all__ = ["FlowDistribution"]

_KL_SAMPLES = 256


class FlowDistribution(Distribution):
    """p(x | context) of a flow, with everything that code for torch distributions asks.

    `torch.distributions.kl_divergence` with any other distribution is a Monte Carlo estimate from
    256 samples of its first argument (reparameterised where that can be).

    Args:
        flow: the flow.
        context: conditions (*batch, C), or None.
        choices: `divergence=`, `solver=`, `generator=` for every call.

    Example:
        >>> import cnf
        >>> q = cnf.FFJORD(2).distribution()
        >>> x = q.rsample((7,))
        >>> q.log_prob(x).shape, q.has_rsample
        (torch.Size([7]), True)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's interface

    def __init__(self, flow: Flow, context: Tensor | None = None, **choices: Any) -> None:
        self.flow = flow
        self.context = context
        self.choices = choices
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(flow.event_shape), validate_args=False)
        _register_kl()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register_kl()

    def __repr__(self) -> str:
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return f"FlowDistribution(batch_shape={batch}, event_shape={event})"

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples have a gradient: those of integers have none."""
        return not self.flow.transform.quantized

    @property
    def support(self) -> constraints.Constraint | None:
        """Where the density is above zero, which the end of the transform says: all of R^D, an
        interval or half-line (`cnf.transforms.Interval`), integers. Where only the flow itself
        can tell, as of a bounded base, its `check` computes the density.
        """
        known = is_real(self.flow.base.support) or self.flow.transform.quantized
        own = self.flow.transform.codomain(tuple(self.event_shape)) if known else None
        return _Positive(self) if own is None else own

    def expand(
        self, batch_shape: _Size, _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        """The same distribution over a larger batch."""
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.choices, new.context = self.flow, self.choices, self.context
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, self.context.shape[-1])
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of value (*sample, *batch, *event), (*sample, *batch)."""
        return self.flow.log_prob(self._broadcast(value), self.context, **self.choices)

    def _broadcast(self, value: Tensor) -> Tensor:
        """Value against the batch (*sample, *batch, *event)."""
        self.flow._check_shape(value)
        n = value.ndim - len(self.event_shape)
        try:
            batch = torch.broadcast_shapes(value.shape[:n], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value has shape {tuple(value.shape)}, expected (*sample, *batch, *event) with "
                f"batch {tuple(self.batch_shape)} and event {tuple(self.event_shape)}"
            ) from None
        return value.expand(*batch, *self.event_shape)

    def rsample(self, sample_shape: _Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised samples (*sample, *batch, *event)."""
        choices = {k: v for k, v in self.choices.items() if k != "divergence"}
        return self.flow.rsample(self._shape(sample_shape), self.context, **choices)

    def rsample_and_log_prob(
        self,
        sample_shape: _Size = torch.Size(),  # noqa: B008
    ) -> tuple[Tensor, Tensor]:
        """Reparameterised samples and their log-densities (*sample, *batch), from one solve."""
        shape = self._shape(sample_shape)
        return self.flow.rsample_and_log_prob(shape, self.context, **self.choices)

    def _shape(self, sample_shape: _Size) -> tuple[int, ...]:
        """What the flow has to draw: without context, the batch is repetition too."""
        return tuple(sample_shape) + (tuple(self.batch_shape) if self.context is None else ())

    def sample(self, sample_shape: _Size = torch.Size()) -> Tensor:  # noqa: B008
        """Samples (*sample, *batch, *event), without gradient."""
        choices = {k: v for k, v in self.choices.items() if k != "divergence"}
        return self.flow.sample(self._shape(sample_shape), self.context, **choices)


class _Positive(constraints.Constraint):
    """Where a flow's density is above zero, by computing it."""

    def __init__(self, distribution: FlowDistribution) -> None:
        super().__init__()
        self.distribution = distribution
        self.event_dim = len(distribution.event_shape)

    def __repr__(self) -> str:
        return "PositiveDensity()"

    def check(self, value: Tensor) -> Tensor:
        """Whether log p > -inf (*sample, *batch); not so for NaN."""
        d = self.distribution
        x = d._broadcast(value)
        with torch.no_grad():
            return d.flow.log_prob(x, d.context, on_nonfinite="nan", **d.choices) > -torch.inf


def _monte_carlo_kl(p: Distribution, q: Distribution) -> Tensor:
    """E_p[log p - log q] (*batch,), from samples of p."""
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"the distributions have the event shapes {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}; make dimensions part of the event with Independent"
        )
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p = p if p.batch_shape == batch else p.expand(batch)
    shape = torch.Size((_KL_SAMPLES,))
    if isinstance(p, FlowDistribution) and p.has_rsample:
        x, log_prob = p.rsample_and_log_prob(shape)
    else:
        x = p.rsample(shape) if p.has_rsample else p.sample(shape)
        log_prob = p.log_prob(x)
    return (log_prob - q.log_prob(x)).mean(0)


@cache
def _register_kl() -> None:
    """Tell torch's `kl_divergence` about flows, when the first one becomes a distribution."""
    for pair in (
        (FlowDistribution, FlowDistribution),
        (FlowDistribution, Distribution),
        (Distribution, FlowDistribution),
    ):
        if pair not in kl._KL_REGISTRY:
            register_kl(*pair)(_monte_carlo_kl)
