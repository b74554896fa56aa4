"""Flow matching: a field learned by regression, without solving an ODE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from cnf.fields.time import at_own_times
from cnf.flow import Flow
from cnf.objectives.couplings import Coupling, as_coupling
from cnf.objectives.paths import Path, as_path
from cnf.objectives.terms import log_terms
from cnf.objectives.time_sampling import TimeSampling, as_sampling
from cnf.transforms.base import Choices, Compose, Transform
from cnf.transforms.context import expand_context
from cnf.transforms.continuous import CNF
from cnf.transforms.times import as_number
from cnf.warn import warn

__all__ = ["FlowMatching"]


class FlowMatching(nn.Module):
    """The mean squared distance of a flow's field from the velocity of paths from base to data.

        loss = E |f(t, x_t, context) - dx_t/dt|^2 / D,    x_t = alpha(t) x_1 + sigma(t) x_0

    over data x_1, base samples x_0 coupled with them, and times t. Its minimum is the field whose
    flow carries the base to the data along these paths, found without a solve; `log_prob`, `sample`
    and all else of the flow are as ever. The flow may be of any base, and its transform a `CNF` or
    a `Compose` with one `CNF` among other transforms: these are passed as they are (integers get
    their noise) and learn nothing here.

    Args:
        flow: the flow whose field is trained.
        coupling: "independent", "optimal-transport" (in groups of 128), or a function
            (x0, x1, context, generator=) -> for each data sample the index of its base sample (B,);
            see `cnf.objectives.couplings`.
        path: "linear", "variance-preserving", "trigonometric", or a `Path`; see
            `cnf.objectives.paths`.
        time_sampling: "stratified" and "uniform", both uniform in the mean; "log-uniform", near the
            data, for fine structure and likelihood; "logit-normal", in the middle; or a function
            (n, like=, generator=) -> times (n,) in [0, 1]; see `cnf.objectives.time_sampling`.

    Warns:
        RuntimeWarning: parameters outside the field that require grad: they get zeros.

    Raises:
        TypeError: not a Flow, or a transform without exactly one `CNF` in a row of others.
        ValueError: a choice that is not known, end times that are equal.

    Reference: Lipman et al., arXiv 2210.02747; Tong et al., arXiv 2302.00482; Albergo and
    Vanden-Eijnden, arXiv 2209.15571.

    Example:
        >>> import cnf, torch
        >>> flow = cnf.FFJORD(2)
        >>> objective = FlowMatching(flow, coupling="independent", path="linear")
        >>> loss = objective(torch.randn(16, 2))
        >>> loss.backward()
        >>> flow.log_prob(torch.randn(16, 2)).shape
        torch.Size([16])
    """

    def __init__(
        self,
        flow: Flow,
        *,
        coupling: str | Coupling = "independent",
        path: str | Path = "linear",
        time_sampling: str | TimeSampling = "stratified",
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow, got {type(flow).__name__}")
        self.flow = flow
        self.coupling = as_coupling(coupling)
        self.path = as_path(path)
        self.time_sampling = as_sampling(time_sampling)
        cnf = _parts(flow)[1]
        _span(cnf)
        if hidden := sum(isinstance(part, CNF) for part in flow.modules()) - 1:
            raise _not_one(1 + hidden)
        known = {id(p) for p in _trained(cnf)}
        named = [(name, p) for name, p in flow.named_parameters() if p.requires_grad]
        if others := [name for name, p in named if id(p) not in known]:
            some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            warn(
                f"flow matching trains the field alone: {len(others)} other parameters of the flow "
                f"({some}) get zeros as their gradient; freeze them by requires_grad_(False), or "
                "train them by likelihood"
            )

    def extra_repr(self) -> str:
        """The choices, for `print`."""
        return f"coupling={self.coupling}, path={self.path}, time_sampling={self.time_sampling}"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            x: data (*batch, *event).
            context: conditions (*batch, C), or broadcastable to it; None where the flow has none.
            generator: source of base samples, times, and noise of all kinds.

        Raises:
            TypeError: x of a wrong dtype.
            ValueError: x or context of a wrong shape, or not finite.
        """
        self.flow._check_shape(x)
        self.flow._check_values(x, context, {})
        context = self._of_rows(context, x)
        x0, x1 = self._ends(x, context, generator)
        cnf = _parts(self.flow)[1]
        context = cnf._batch_context(context if cnf.takes_context else None, x1.shape[:1], x1)
        x0 = x0[_indices(self.coupling(x0, x1, context, generator=generator), x1)]
        s = _times(self.time_sampling(len(x1), like=x1, generator=generator), x1)  # (B,)
        start, span = _span(cnf)
        x_s, velocity = self.path(s, x0, x1)
        dx = at_own_times(cnf.field, start + span * s, x_s, context)
        _check_derivative(dx, x_s)
        loss = (span * dx - velocity).square().mean()
        log_terms(flow_matching=loss)
        return self._with_zeros(loss, cnf)

    def _of_rows(self, context: Tensor | None, x: Tensor) -> Tensor | None:
        """Context of every sample (B, C), with the gradient of what it was computed from."""
        if context is None:
            return None
        if not self.flow.transform.takes_context:
            raise ValueError(
                f"context of shape {tuple(context.shape)} was given, but the flow takes none; "
                "leave context out, or build the flow with context="
            )
        batch = x.shape[: x.ndim - len(self.flow.event_shape)]
        return expand_context(context, batch).reshape(batch.numel(), context.shape[-1])

    @torch.no_grad()
    def _ends(
        self, x: Tensor, context: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Samples at the base and at the data end of the CNF (B, *event); context (B, C)."""
        before, cnf, after = _parts(self.flow)
        batch = x.shape[: x.ndim - len(self.flow.event_shape)]
        x1 = x.reshape(batch.numel(), *self.flow.event_shape)
        x0 = self.flow.base.rsample((len(x1),), generator)
        for transform in reversed(after):
            own = context if transform.takes_context else None
            x1 = transform.inverse(x1, own, **_noise(generator))
        for transform in before:
            own = context if transform.takes_context else None
            x0 = transform.forward(x0, own, **_noise(generator))
        cnf._check_state(x1)
        return x0.to(x1.dtype), x1

    def _with_zeros(self, loss: Tensor, cnf: CNF) -> Tensor:
        """The same loss, of which all parameters are part, as DDP wants it."""
        known = {id(p) for p in _trained(cnf)}
        for parameter in self.flow.parameters():
            if parameter.requires_grad and id(parameter) not in known:
                loss = loss + 0.0 * parameter.sum()
        return loss


def _noise(generator: torch.Generator | None) -> Choices:
    return {} if generator is None else {"generator": generator}


def _row(transform: Transform) -> Iterator[Transform]:
    """The transforms that one is made of, base to data."""
    if isinstance(transform, Compose):
        for part in transform:
            yield from _row(part)
    else:
        yield transform


def _parts(flow: Flow) -> tuple[list[Transform], CNF, list[Transform]]:
    """What stands before the CNF of a flow, the CNF, and what stands behind it."""
    row = list(_row(flow.transform))
    found = [i for i, part in enumerate(row) if isinstance(part, CNF)]
    if len(found) != 1:
        raise _not_one(sum(isinstance(part, CNF) for part in flow.modules()))
    return row[: found[0]], cast(CNF, row[found[0]]), row[found[0] + 1 :]


def _not_one(total: int) -> TypeError:
    seen = {0: "none", 1: "one within another transform than Compose"}.get(
        total, f"{total} of them"
    )
    return TypeError(
        f"flow matching trains the field of one CNF in a row of transforms; the flow has {seen}: "
        "use cnf.FFJORD(..., blocks=1) or cnf.Flow(base, cnf.CNF(field)), or train this flow by "
        "cnf.MaximumLikelihood"
    )


def _trained(cnf: CNF) -> Iterable[nn.Parameter]:
    """The parameters that flow matching trains."""
    return cnf.field.parameters() if isinstance(cnf.field, nn.Module) else ()


def _span(cnf: CNF) -> tuple[float, float]:
    """The base time of a CNF, and the data time less it."""
    start, end = (as_number(t) for t in cnf.times)
    if start == end:
        raise ValueError(
            f"the CNF's times are both {start}: there is no path between them; use times=(0.0, 1.0)"
        )
    return start, end - start


def _indices(index: object, x: Tensor) -> Tensor:
    """What a coupling gave, refused unless it is an index for each sample."""
    if not isinstance(index, Tensor) or index.shape != x.shape[:1] or index.dtype != torch.int64:
        raise TypeError(
            "coupling must return the index of a base sample for each data sample, int64 of shape "
            f"({len(x)},), got {_seen(index)}"
        )
    return index


def _times(t: object, x: Tensor) -> Tensor:
    """What a time sampling gave, refused unless it is a time for each sample."""
    if not isinstance(t, Tensor) or t.shape != x.shape[:1] or not t.is_floating_point():
        raise TypeError(
            f"time_sampling must return times in [0, 1] of shape ({len(x)},), got {_seen(t)}"
        )
    return t.to(x)


def _seen(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _check_derivative(dx: object, x: Tensor) -> None:
    """Refuse what a field gives if it is no derivative of x."""
    if not isinstance(dx, Tensor) or dx.shape != x.shape:
        raise ValueError(
            f"the vector field must return dx of the shape of x, {tuple(x.shape)}, got {_seen(dx)}"
        )
