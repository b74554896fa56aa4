"""What a context may be, and how it meets the batch; for transforms and flows alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnf.checks import check_dense

__all__ = ["check_context", "expand_context"]


def check_context(context: Tensor) -> None:
    """Refuse what is not a tensor (..., C).

    Raises:
        TypeError: not a tensor, or a sparse one.
        ValueError: a tensor without dimensions.
    """
    if not isinstance(context, Tensor):
        raise TypeError(
            f"context must be a tensor (*batch, C), got {type(context).__name__}; "
            "use torch.as_tensor(context)"
        )
    check_dense(context, "context")
    if context.ndim == 0:
        raise ValueError("context must have the shape (..., C), got a tensor without dimensions")


def expand_context(context: Tensor, batch: Sequence[int]) -> Tensor:
    """Context (..., C) broadcast against the batch: (*batch, C).

    Raises:
        TypeError: not a tensor.
        ValueError: a shape that does not broadcast.

    Example:
        >>> import torch
        >>> expand_context(torch.randn(4, 3), (10, 4)).shape
        torch.Size([10, 4, 3])
    """
    check_context(context)
    try:
        return context.expand(*batch, context.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"context of shape {tuple(context.shape)} does not broadcast against the batch "
            f"{tuple(batch)}; expected (*batch, C)"
        ) from None
