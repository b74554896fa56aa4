"""Draws of noise from a generator of whatever device, also by code that takes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Seeded", "draw"]


def draw(
    sampler: Callable[..., Tensor], *args: Any, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """sampler(*args), of the dtype and device of `like`; drawn on the generator's device.

    Args:
        sampler: `torch.rand`, `torch.randn` or `torch.randint`.
        args: its positional arguments.
        like: a tensor of the wanted dtype and device.
        generator: source of randomness, None for torch's global one.

    Example:
        >>> draw(torch.rand, (2, 3), like=torch.zeros(()).double(), generator=None).dtype
        torch.float64
    """
    try:
        return _drawn(sampler, args, like, generator)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
    raise RuntimeError(
        "noise is drawn under torch.func.vmap, which must be told whether the samples share it: "
        "use torch.func.vmap(..., randomness='different'), or 'same'; log_prob draws none with "
        "divergence='exact'"
    )


def _drawn(
    sampler: Callable[..., Tensor],
    args: Sequence[Any],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    if generator is None:  # a keyword of None stops torch.compile where a shape is symbolic
        return sampler(*args, dtype=like.dtype, device=like.device)
    drawn = sampler(*args, dtype=like.dtype, device=generator.device, generator=generator)
    return drawn.to(like.device)


class Seeded(TorchDispatchMode):
    """A block in which random operations of this thread draw from a generator, whoever calls them.

    Code that takes no generator, such as torch's distributions, is seeded without a touch of the
    global generator, and so in any thread.

    Args:
        generator: of the device of the draws.

    Example:
        >>> with Seeded(torch.Generator().manual_seed(0)):
        ...     x = torch.distributions.Gamma(1.0, 1.0).sample()
        >>> with Seeded(torch.Generator().manual_seed(0)):
        ...     torch.equal(x, torch.distributions.Gamma(1.0, 1.0).sample())
        True
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation; a random one with the generator."""
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if not _takes_generator(func) and func._overloadname == "default":
                func = getattr(func.overloadpacket, "generator", func)
            if not _takes_generator(func):
                raise NotImplementedError(
                    f"{func} draws random numbers and takes no generator; sample without generator="
                )
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)
