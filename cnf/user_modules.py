"""What a module that a user hands over may not do: be random, mix samples, write into arguments.

A field or a conditioner is a function of its arguments, of each sample by itself. What can be seen
to be none is refused; where writing cannot be seen, the module is given copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cnf.checks import tracing

__all__ = ["copies", "drew", "random_states", "refuse_unfit", "versions", "writes_unseen"]

_SUSPECTS = (
    _DropoutNd,
    _BatchNorm,
    nn.MultiheadAttention,
    nn.RReLU,
    nn.RNNBase,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_HARMLESS = frozenset(
    kind
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and not issubclass(kind, _SUSPECTS)
)
"""Classes that need no second look: this is asked of every part of a layer at every call."""


def refuse_unfit(
    root: nn.Module, whole: str, remedy: str, skip: tuple[type[nn.Module], ...] = ()
) -> None:
    """Refuse a module with parts that are random, or mix the samples of a batch, as they stand.

    Args:
        root: the module; it is no suspect itself where it is of a class in `skip`.
        whole: what it is, for the message.
        remedy: what to do, for the message.
        skip: kinds of parts that look after themselves.

    Raises:
        ValueError: naming the part.

    Example:
        >>> refuse_unfit(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "field", "leave it out")
        >>> refuse_unfit(nn.Sequential(nn.BatchNorm1d(2)), "field", "leave it out")
        Traceback (most recent call last):
        ValueError: the module '0' of this field (BatchNorm1d) normalizes over the batch and so ...
    """
    found = _first_unfit(root, skip)
    if found is None:
        return
    path = next((name for name, part in root.named_modules() if part is found), "")
    raise ValueError(
        f"the module {path!r} of this {whole} ({type(found).__name__}) {_reason(found)}; {remedy}"
    )


def _first_unfit(module: nn.Module, skip: tuple[type[nn.Module], ...]) -> nn.Module | None:
    """The first part that is unfit; `module.modules()` takes thrice as long."""
    if type(module) not in _HARMLESS and isinstance(module, _SUSPECTS) and _reason(module):
        return module
    for child in module._modules.values():
        if child is None or (skip and isinstance(child, skip)):
            continue
        found = _first_unfit(child, skip)
        if found is not None:
            return found
    return None


def _reason(part: nn.Module) -> str:
    """Why a module is no function of each sample alone, or nothing."""
    if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
        return "normalizes over the batch and so mixes samples"
    if isinstance(part, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return "pools over random regions" if part._random_samples is None else ""
    if not part.training:
        return ""
    if isinstance(part, nn.RReLU):
        return "is random in training mode"
    rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0)
    if isinstance(part, nn.RNNBase) and part.num_layers == 1:
        rate = 0  # there is dropout between layers alone
    return "drops at random in training mode" if rate > 0 else ""


def random_states(x: Tensor) -> list[Tensor]:
    """The state of torch's global random numbers, where x lives too."""
    states = [torch.get_rng_state()]
    if x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device))
    return states


def drew(before: Sequence[Tensor], x: Tensor) -> bool:
    """Whether somebody has drawn from torch's global random numbers since."""
    return not all(torch.equal(a, b) for a, b in zip(before, random_states(x), strict=True))


def writes_unseen(x: Tensor) -> bool:
    """Whether nothing shows that x was written into: its version counter tells in eager mode."""
    return tracing() or x.is_inference()


def versions(*tensors: Tensor | None) -> list[int]:
    """How often tensors have been written into; those of inference mode do not say."""
    return [v._version for v in tensors if v is not None and not v.is_inference()]


def copies(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Tensors that a module may write into; in a compiled graph they cost nothing."""
    return tuple(None if v is None else v.clone() for v in tensors)
