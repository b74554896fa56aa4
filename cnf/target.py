"""A target: a density known up to its normaliser, as users give it, called and checked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cnf.transforms.context import expand_context

__all__ = ["Target", "check_target", "log_density_of"]

Target = Callable[..., Tensor]
"""log_density(x) or log_density(x, context): x (N, *event), context (N, C) -> (N,)."""


def check_target(log_density: Target) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: not a function or module.
    """
    if not callable(log_density):
        raise TypeError(
            "log_density must be a function or module of x (N, *event) that returns (N,), got "
            f"{type(log_density).__name__}"
        )


def log_density_of(
    log_density: Target, x: Tensor, context: Tensor | None, event_shape: tuple[int, ...]
) -> Tensor:
    """log_density at samples, (*batch,).

    Args:
        log_density: is called once, with all samples in one batch dimension; with context, too,
            where some is given.
        x: samples (*batch, *event).
        context: (..., C), broadcastable to the batch, or None.
        event_shape: of a sample.

    Raises:
        TypeError: a result that is not a tensor.
        ValueError: a result of another shape than (N,).
    """
    batch = x.shape[: x.ndim - len(event_shape)]
    flat = x.reshape(batch.numel(), *event_shape)
    if context is None:
        values = log_density(flat.clone())  # it may write into its arguments
    else:
        rows = expand_context(context, batch).reshape(len(flat), context.shape[-1])
        values = log_density(flat.clone(), rows.clone())
    if not isinstance(values, Tensor):
        raise TypeError(
            f"log_density returned a {type(values).__name__}, expected a tensor of shape "
            f"({len(flat)},)"
        )
    if values.shape != (len(flat),):
        raise ValueError(
            f"log_density returned shape {tuple(values.shape)} for x of shape "
            f"{tuple(flat.shape)}, expected one number a sample, ({len(flat)},); sum over the "
            "sample's dimensions"
        )
    return values.reshape(batch)
