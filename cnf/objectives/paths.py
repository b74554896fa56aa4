"""Probability paths of flow matching: how a sample moves from the base to the data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import check_choice, check_number

__all__ = ["PATHS", "Linear", "Path", "Trigonometric", "VariancePreserving", "as_path"]


class Path(ABC):
    """x_t = alpha(t) x_1 + sigma(t) x_0, from a base sample x_0 at t = 0 to a data sample x_1.

    To add one, inherit, and write `coefficients`. Its ends must be (nearly) alpha = 0, sigma = 1 at
    t = 0, and alpha = 1, sigma = 0 at t = 1.
    """

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives in t, each of the shape of t, for t in [0, 1]."""

    def __call__(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity dx_t/dt = alpha'(t) x_1 + sigma'(t) x_0, both (B, *event).

        Args:
            t: a time of each sample (B,).
            x0: base samples (B, *event).
            x1: data samples (B, *event).
        """
        shape = (-1, *[1] * (x1.ndim - 1))
        alpha, sigma, d_alpha, d_sigma = (c.reshape(shape) for c in self.coefficients(t))
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


@dataclass(frozen=True)
class Linear(Path):
    """The straight path: x_t = (1 - t) x_0 + t x_1, with the velocity x_1 - x_0.

    Reference: Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003.

    Example:
        >>> x, velocity = Linear()(torch.tensor([0.25]), torch.zeros(1, 1), torch.ones(1, 1))
        >>> x.item(), velocity.item()
        (0.25, 1.0)
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, 1 - t, 1, -1."""
        one = torch.ones_like(t)
        return t, 1 - t, one, -one


@dataclass(frozen=True)
class Trigonometric(Path):
    """The path on a quarter of a circle: x_t = cos(pi t / 2) x_0 + sin(pi t / 2) x_1.

    It keeps the variance where base and data have the same.

    Reference: Albergo and Vanden-Eijnden, arXiv 2209.15571.

    Example:
        >>> x, velocity = Trigonometric()(torch.tensor([1.0]), torch.ones(1, 1), torch.zeros(1, 1))
        >>> round(x.item(), 6) == 0.0, round(velocity.item(), 4)
        (True, -1.5708)
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sin, cos, and pi / 2 times cos, -sin of pi t / 2."""
        angle = 0.5 * math.pi * t
        sin, cos = angle.sin(), angle.cos()
        return sin, cos, 0.5 * math.pi * cos, -0.5 * math.pi * sin


@dataclass(frozen=True)
class VariancePreserving(Path):
    """The path of a variance-preserving diffusion, with noise rates from beta_min to beta_max.

        x_t = alpha x_1 + sqrt(1 - alpha^2) x_0,    s = 1 - t
        alpha = exp(-(beta_min s + (beta_max - beta_min) s^2 / 2) / 2)

    At t = 0 a trace of the data is left, alpha = 0.0066 with these rates. Its velocity has no bound
    at t = 1: times stop at 1 - 1e-5.

    Args:
        beta_min: rate at the data.
        beta_max: rate at the base.

    Raises:
        ValueError: rates that are not 0 < beta_min <= beta_max.

    Reference: Song et al., arXiv 2011.13456; as a path for flow matching, Lipman et al.,
    arXiv 2210.02747.

    Example:
        >>> alpha, sigma, *_ = VariancePreserving().coefficients(torch.tensor([0.0, 0.5]))
        >>> torch.allclose(alpha.square() + sigma.square(), torch.ones(2))
        True
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min)
        check_number("beta_max", self.beta_max)
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta_min={self.beta_min!r}, beta_max={self.beta_max!r} must be finite with "
                "0 < beta_min <= beta_max"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sqrt(1 - alpha^2), and their derivatives in t."""
        s = (1 - t).clamp(min=1e-5)
        slope = self.beta_max - self.beta_min
        log_alpha = -0.5 * (self.beta_min * s + 0.5 * slope * s.square())
        alpha = log_alpha.exp()
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = 0.5 * (self.beta_min + slope * s) * alpha  # in t: s falls
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma


PATHS: dict[str, type[Path]] = {
    "linear": Linear,
    "variance-preserving": VariancePreserving,
    "trigonometric": Trigonometric,
}
"""Every path that has a name."""


def as_path(path: str | Path) -> Path:
    """The path of that name, or the path itself.

    Raises:
        TypeError: neither.
        ValueError: a name that is not known.
    """
    if isinstance(path, Path):
        return path
    if not isinstance(path, str):
        raise TypeError(
            f"path must be a name or a cnf.objectives.paths.Path, got {type(path).__name__}; names "
            f"are {', '.join(PATHS)}"
        )
    check_choice("path", path, PATHS, ", or a Path")
    return PATHS[path]()
