"""How time enters a network, and how a field is evaluated at a time of each sample's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cnf.fields.closed_form import written_for

__all__ = ["at_own_times", "check_frequencies", "takes_batched_time", "time_features"]


def time_features(t: Tensor, frequencies: int) -> Tensor:
    """tau(t) = (t, sin(pi k t), cos(pi k t)), k = 1 ... frequencies.

    () -> (1 + 2 frequencies,), or of a time a sample (B,) -> (B, 1 + 2 frequencies). The
    frequencies begin at half a period, so that t = 0 and t = 1 are told apart.
    """
    t = t.unsqueeze(-1)
    if not frequencies:
        return t
    k = torch.arange(1, frequencies + 1, dtype=t.dtype, device=t.device)
    angle = math.pi * k * t
    return torch.cat((t, angle.sin(), angle.cos()), -1)


def at_own_times(
    field: Callable[..., Tensor], t: Tensor, x: Tensor, context: Tensor | None = None
) -> Tensor:
    """f(t_i, x_i, context_i) of each sample at its own time, t (B,): (B, *event).

    A field that says `batched_time` gets the times as they are; any other sees each sample as a
    batch of one at a time (), through `torch.func.vmap`, which takes longer.

    Raises:
        ValueError: a field that vmap does not allow.

    Example:
        >>> t, x = torch.tensor([0.0, 1.0]), torch.ones(2, 3)
        >>> at_own_times(lambda t, x: t * x, t, x).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    given = (x,) if context is None else (x, context)
    if takes_batched_time(field):
        return field(t, *given)

    if not t.shape[0]:  # vmap asks for one sample at least
        return field(t.sum(), *given)

    def single(t: Tensor, *given: Tensor) -> Tensor:
        return field(t, *(part.unsqueeze(0) for part in given)).squeeze(0)

    try:
        return torch.func.vmap(single)(t, *given)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            "the field must be evaluated at one time a sample, by torch.func.vmap, which it does "
            f"not allow ({str(error).splitlines()[0]}); write it with out-of-place operations and "
            "without .item(), or let it take t of shape (B,) and set batched_time = True"
        ) from error


def takes_batched_time(field: object) -> bool:
    """Whether a field says `batched_time`, in the class that last wrote its values."""
    own = written_for(field, ["batched_time"], ("forward", "derivative", "__call__"))
    return own and bool(getattr(field, "batched_time", False))


def check_frequencies(frequencies: int) -> None:
    """Refuse what is not a number of frequencies.

    Raises:
        ValueError: not an integer, or below 0.
    """
    if isinstance(frequencies, bool) or not isinstance(frequencies, int) or frequencies < 0:
        raise ValueError(f"frequencies={frequencies!r} must be a number, 0 for t alone")
