"""The interface of a density on the plane: sampled, evaluated, and of known entropy.

The toy densities and `ImageDensity` implement it. They stand at the head of the pipeline: a flow
trained on samples of one can be scored against the truth, because E[log p_model(x)] <= -entropy
with equality only for the true density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlaneDensity", "Source"]


@dataclass(frozen=True)
class Source:
    """Random numbers of one dtype on one device, from one generator."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers uniform on [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def index(self, high: int, n: int) -> Tensor:
        """Draw n integers, uniform on 0, ..., high - 1."""
        return torch.randint(high, (n,), generator=self.generator, device=self.device)


class PlaneDensity(ABC):
    """A probability density p(x) on the plane.

    To implement one: set `name` and `entropy`, and write

    1. `draw(n, source)`: n independent samples, (n, 2), with all randomness taken from `source`;
    2. `log_density(x)`: log p at checked points x (B, 2), as (B,), differentiable in x where p is.

    `sample` and `log_prob` check their arguments and call these two.
    """

    name: str
    entropy: float  # the differential entropy -E[log p(x)], in nats

    @abstractmethod
    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Independent samples x ~ p.

        Args:
            n: number of samples, 0 or more.
            generator: source of randomness, on `device`. None takes a new one seeded by the
                operating system: the global generator is neither read nor moved, so pass a
                generator to repeat a draw.
            dtype: torch.float32 or torch.float64.
            device: where the samples are made.

        Returns:
            Samples (n, 2).

        Raises:
            TypeError: if n is no integer, or dtype is neither float32 nor float64.
            ValueError: if n is negative, or generator lives on another device.
        """
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(
                f"n must be an integer, got {n!r} of type {type(n).__name__}; pass int(n)"
            )
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"dtype must be torch.float32 or torch.float64, got {dtype}; "
                "cast the samples afterwards"
            )
        device = torch.device(device)
        if generator is None:
            generator = torch.Generator(device=device)
            generator.seed()
        elif generator.device.type != device.type:
            raise ValueError(
                f"generator is on {generator.device} but device is {device}; "
                f"make it with torch.Generator(device={device.type!r})"
            )
        return self.draw(n, Source(generator, dtype, device))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density log p(x), in nats.

        Args:
            x: points (*batch, 2), finite. Computed in the dtype of x, or in float32 if that is
                narrower.

        Returns:
            log p(x) (*batch,).

        Raises:
            TypeError: if x is no floating-point tensor.
            ValueError: if the last dimension of x is not 2, or x holds NaN or infinity.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"x must be a floating-point tensor, got {seen}; use torch.as_tensor(x).float()"
            )
        if x.dim() == 0 or x.shape[-1] != 2:
            raise ValueError(
                f"x must have shape (..., 2), got {tuple(x.shape)}; "
                f"{self.name} is a density on the plane"
            )
        points = x.reshape(-1, 2)  # (B, 2)
        bad = ~points.isfinite().all(-1)
        if bad.any():
            first = int(bad.nonzero()[0])
            count = f"{int(bad.sum())} of {len(points)} points"
            raise ValueError(
                f"x has non-finite values in {count} (first index {first}); remove them"
            )
        if x.dtype not in (torch.float32, torch.float64):
            points = points.float()
        return self.log_density(points).reshape(x.shape[:-1])
