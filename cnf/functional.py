"""Modules called with other tensors than their own, and values beneath torch.func's wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["batched", "called_with", "named_tensors", "plain"]


def named_tensors(module: nn.Module, *, buffers: bool = True) -> dict[str, Tensor]:
    """The parameters and buffers of each submodule, by one name for each.

    `named_parameters` leaves out the second name of a parameter that two submodules hold.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> other.weight = one.weight
        >>> list(named_tensors(nn.Sequential(one, other, one)))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, part in module.named_modules()
        for own in (part._parameters, part._buffers if buffers else {})
        for name, tensor in own.items()
        if tensor is not None
    }


def called_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    arguments: Sequence[Any],
    choices: Mapping[str, Any] | None = None,
) -> Any:
    """module(*arguments, **choices) with tensors, by the names of `named_tensors`, for its own.

    `torch.func.functional_call` finds the other names of a tensor by itself; but of a submodule at
    two places it swaps the same tensor twice, and leaves the lent one behind.

    Example:
        >>> part = nn.Linear(1, 1)
        >>> module, weight = nn.Sequential(part, part), part.weight
        >>> lent = {name: torch.zeros_like(p) for name, p in named_tensors(module).items()}
        >>> called_with(module, lent, (torch.ones(1, 1),)).item(), part.weight is weight
        (0.0, True)
    """
    return torch.func.functional_call(
        module, dict(tensors), tuple(arguments), dict(choices or {}), tie_weights=False
    )


def plain(x: Tensor) -> Tensor:
    """The tensor beneath the wrappers of torch.func, whose values can be read.

    Under `torch.func.vmap` it holds the values of all samples, with the mapped dimension somewhere:
    a decision that is taken on its largest value is one decision for the whole batch.

    Example:
        >>> seen = []
        >>> _ = torch.func.vmap(lambda x: (seen.append(plain(x).max().item()), x)[1])(torch.ones(3))
        >>> seen
        [1.0]
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def batched(x: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over x, so that no single sample of it can be looked at.

    Example:
        >>> batched(torch.ones(1)), torch.func.vmap(lambda x: x * batched(x))(torch.ones(1))
        (False, tensor([1.]))
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False
