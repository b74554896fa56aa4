"""The interface of a simulator whose posterior is known: p(x | c) of parameters x, given what c was
observed.

It stands at the head of the pipeline for conditional flows, as `PlaneDensity` does for others: a
flow q(x | c) trained on pairs is scored against the truth, since E[log q(x | c)] is at most
E[log p(x | c)].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cnf.data.density import Source

__all__ = ["Simulator", "check_rows"]


class Simulator(ABC):
    """A joint density p(x) p(c | x) with a known posterior p(x | c).

    To implement one: set `name`, `features` and `context`, and write

    1. `draw(n, source)`: n independent pairs, x (n, D) and c (n, C), with all randomness taken
       from `source`;
    2. `draw_posterior(c, n, source)`: n draws (n, B, D) from the posterior of each row of c (B, C);
    3. `posterior_log_density(x, c)`: log p(x | c) of x (..., D) and c (..., C) that broadcast.

    `sample`, `posterior_sample` and `posterior_log_prob` check their arguments and call these.
    """

    name: str
    features: int  # D, of the parameters
    context: int  # C, of an observation

    @abstractmethod
    def draw(self, n: int, source: Source) -> tuple[Tensor, Tensor]:
        """Draw n pairs, x (n, D) and c (n, C)."""

    @abstractmethod
    def draw_posterior(self, c: Tensor, n: int, source: Source) -> Tensor:
        """Draw (n, B, D) from the posteriors given c (B, C)."""

    @abstractmethod
    def posterior_log_density(self, x: Tensor, c: Tensor) -> Tensor:
        """Evaluate log p(x | c) at x (..., D) and c (..., C), whose batches broadcast."""

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Independent pairs x ~ p(x), c ~ p(c | x), as `cnf.training.fit` takes them.

        Args:
            n: number of pairs, 0 or more.
            generator: source of randomness, on `device`. None takes a new one seeded by the
                operating system.
            dtype: torch.float32 or torch.float64.
            device: where the pairs are made.

        Returns:
            Parameters x (n, D) and observations c (n, C).

        Raises:
            TypeError: if n is no integer, or dtype is neither float32 nor float64.
            ValueError: if n is negative, or generator lives on another device.
        """
        return self.draw(n, _source(n, generator, dtype, torch.device(device)))

    def posterior_sample(
        self, c: Tensor, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent draws from the exact posterior p(x | c), shaped as `flow.sample((n,), c)`.

        Args:
            c: observations (*batch, C), finite.
            n: number of draws for each, 0 or more.
            generator: source of randomness, on the device of c. None takes a new one seeded by the
                operating system.

        Returns:
            Parameters (n, *batch, D), of the dtype and on the device of c.

        Raises:
            TypeError: if c is no tensor of float32 or float64, or n no integer.
            ValueError: if the last dimension of c is not C, c is not finite or cannot be observed,
                n is negative, or generator lives on another device.
        """
        check_rows("c", c, self.context, self.name)
        source = _source(n, generator, c.dtype, c.device)
        x = self.draw_posterior(c.reshape(-1, self.context), n, source)  # (n, B, D)
        return x.reshape(n, *c.shape[:-1], self.features)

    def posterior_log_prob(self, x: Tensor, c: Tensor) -> Tensor:
        """Log-density of the posterior, log p(x | c), in nats.

        Args:
            x: parameters (..., D), finite.
            c: observations (..., C), finite, whose batch broadcasts against that of x; of the same
                dtype.

        Returns:
            log p(x | c), of the batch that both broadcast to.

        Raises:
            TypeError: if x or c is no tensor of float32 or float64.
            ValueError: if their shapes do not fit, they are not finite, or c cannot be observed.
        """
        check_rows("x", x, self.features, self.name)
        check_rows("c", c, self.context, self.name)
        try:
            batch = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"x of shape {tuple(x.shape)} and c of shape {tuple(c.shape)} do not broadcast; "
                f"expected (..., {self.features}) and (..., {self.context}) with one batch"
            ) from None
        return self.posterior_log_density(x, c).expand(batch)


def check_rows(name: str, x: Tensor, columns: int, owner: str) -> None:
    """Refuse what is not finite float32 or float64 of shape (..., columns).

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape, or values that are not finite.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a tensor of float32 or float64, got {seen}; "
            f"use torch.as_tensor({name}).float()"
        )
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (..., {columns}), as {owner} has it"
        )
    bad = ~x.reshape(-1, columns).isfinite().all(-1)
    if bad.any():
        raise ValueError(
            f"{name} has non-finite values in {int(bad.sum())} of {len(bad)} rows "
            f"(first index {int(bad.nonzero()[0])}); remove them"
        )


def _source(
    n: int, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Source:
    """The random numbers of a call, after a check of what was asked for."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an integer, got {n!r} of type {type(n).__name__}; pass int(n)")
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}; cast later")
    if generator is None:
        generator = torch.Generator(device=device)
        generator.seed()
    elif not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "use torch.Generator().manual_seed(seed)"
        )
    elif generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, but the samples are to be on {device}; "
            f"make it with torch.Generator(device={device.type!r})"
        )
    return Source(generator, dtype, device)
