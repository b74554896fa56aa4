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

__all__ = [
    "copies",
    "drew",
    "has_suspects",
    "is_foreign",
    "random_states",
    "refuse_unfit",
    "tracked",
    "versions",
    "writes_unseen",
]

_SUSPECTS = (
    _DropoutNd,
    _BatchNorm,
    nn.MultiheadAttention,
    nn.RReLU,
    nn.RNNBase,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


def has_suspects(root: nn.Module, skip: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether there are parts that `refuse_unfit` may refuse, as they stand or in another mode."""
    return bool(_suspects(root, skip))


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
    for part in _suspects(root, skip):
        if reason := _reason(part):
            path = next(name for name, other in root.named_modules() if other is part)
            raise ValueError(
                f"the module {path!r} of this {whole} ({type(part).__name__}) {reason}; {remedy}"
            )


def _suspects(module: nn.Module, skip: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The parts of a module that may be unfit, itself included, without what is to be skipped."""
    found: list[nn.Module] = [module] if isinstance(module, _SUSPECTS) else []
    for child in module._modules.values():
        if child is not None and not isinstance(child, skip):
            found += _suspects(child, skip)
    return found


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


def is_foreign(part: object) -> bool:
    """Whether it is of somebody else: what this package gives writes into no argument.

    Example:
        >>> is_foreign(nn.Linear(2, 2))
        True
    """
    return not type(part).__module__.startswith("cnf.")


def tracked(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Those that count how often they were written into: not those of inference mode."""
    return tuple(v for v in tensors if v is not None and not v.is_inference())


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often `tracked` tensors have been written into."""
    return [v._version for v in tensors]


def copies(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Tensors that a module may write into; in a compiled graph they cost nothing."""
    return tuple(None if v is None else v.clone() for v in tensors)
