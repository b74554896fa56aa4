"""FFJORD: a flow of neural ODEs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributions import Distribution

from cnf.base import Base, base_for
from cnf.checks import check_count
from cnf.divergence import Divergence
from cnf.fields import MLPField
from cnf.fields.base import event_shape_of
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq
from cnf.transforms import CNF, Compose, Transform
from cnf.transforms.times import Time, check_end_times, own_copy

__all__ = ["FFJORD", "cnf_blocks"]


class FFJORD(Flow):
    """A free-form continuous flow: one or more neural ODEs from a normal density to the data.

        dx/dt = f(t, x, context),    log p(x) = log p_0(z) - int_0^1 div f dt

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        hidden: widths of the hidden layers of each field.
        blocks: number of CNF blocks, one after the other.
        context: number of context features, 0 for none.
        divergence: "exact", "hutchinson" (FFJORD's estimator), or a `Divergence`; None for the
            exact one where the field has a closed form (`MLPField` with one or two hidden layers),
            which costs no more than the estimate, and Hutchinson's elsewhere.
        solver: the choices of the solve; None for `Solver()`.
        field: what makes a field, called as field(features, hidden, context=..., **options):
            `MLPField`, `ConcatSquashField`, or your own.
        base: base density; None for the standard normal.
        times: (base, data) times of each block; an `nn.Parameter` () is learned, by each block for
            itself.
        options: passed to `field`, such as activation="softplus".

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a size that is not positive, or a choice that is not known.

    Reference: Grathwohl et al., arXiv 1810.01367.

    Example:
        >>> import torch
        >>> flow = FFJORD(2, hidden=(32, 32))
        >>> loss = -flow.log_prob(torch.randn(16, 2)).mean()
        >>> loss.backward()
        >>> flow.sample((1000,)).shape
        torch.Size([1000, 2])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        blocks: int = 1,
        context: int = 0,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        field: Callable[..., nn.Module] = MLPField,
        base: Base | Distribution | None = None,
        times: tuple[Time, Time] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        event_shape = event_shape_of(features)
        steps = cnf_blocks(
            features,
            hidden,
            blocks=blocks,
            context=context,
            divergence=divergence,
            solver=solver,
            field=field,
            times=times,
            **options,
        )
        base = base_for(event_shape, base)
        super().__init__(base, steps[0] if blocks == 1 else Compose(*steps))


def cnf_blocks(
    features: int | Sequence[int],
    hidden: Sequence[int],
    *,
    blocks: int,
    context: int,
    divergence: str | Divergence | None,
    solver: Solver | TorchDiffEq | None,
    field: Callable[..., nn.Module],
    times: tuple[Time, Time],
    **options: Any,
) -> list[Transform]:
    """CNFs in a row, each with a field of its own; see `FFJORD`."""
    check_count("blocks", blocks)
    if isinstance(field, nn.Module) or not callable(field):
        raise TypeError(
            f"field must make fields, called as field(features, hidden, context=...), such as "
            f"cnf.MLPField; got {type(field).__name__}; for a ready field use "
            "cnf.Flow(cnf.StandardNormal(...), cnf.CNF(field))"
        )
    return [
        CNF(
            field(features, hidden, context=context, **options),
            divergence,
            solver,
            event_dims=len(event_shape_of(features)),
            times=own_copy(check_end_times(times)),
        )
        for _ in range(blocks)
    ]
