"""A linear observation of normal parameters, in normal noise: the posterior in closed form."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from cnf.checks import check_count, check_positive
from cnf.data.density import Source
from cnf.data.simulator import Simulator

__all__ = ["LinearGaussian"]


class LinearGaussian(Simulator):
    """Normal parameters, observed through a matrix and noise.

        x ~ N(0, I),    c = A x + noise e,    e ~ N(0, I)
        p(x | c) = N(m, S),    S = (I + A^T A / noise^2)^-1,    m = S A^T c / noise^2

    The covariance S is the same for every c, and so is the entropy, log det(2 pi e S) / 2: no flow
    has an E[log q(x | c)] above -`posterior_entropy`.

    Args:
        matrix: A (C, D), finite.
        noise: standard deviation of the noise.

    Raises:
        TypeError: a matrix that is no tensor of real numbers, or noise that is no number.
        ValueError: a matrix that is empty, not of two dimensions, or not finite; noise that is not
            positive.

    Example:
        >>> problem = LinearGaussian(torch.tensor([[1.0, 1.0]]), noise=0.5)
        >>> x, c = problem.sample(100)
        >>> x.shape, c.shape, problem.posterior_sample(c, 10).shape
        (torch.Size([100, 2]), torch.Size([100, 1]), torch.Size([10, 100, 2]))
        >>> problem.posterior_mean(torch.tensor([1.0]))
        tensor([0.4444, 0.4444])
    """

    name = "linear-gaussian"

    def __init__(self, matrix: Tensor, noise: float = 0.5) -> None:
        if not isinstance(matrix, Tensor) or matrix.is_complex():
            seen = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"matrix must be a real tensor (C, D), got {seen}; use torch.as_tensor")
        if matrix.ndim != 2 or not matrix.numel():
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (C, D), C, D >= 1")
        if not matrix.isfinite().all():
            raise ValueError("matrix has values that are not finite; remove them")
        check_positive("noise", noise)
        self.matrix = matrix.detach().cpu().double()
        self.noise = float(noise)
        self.context, self.features = matrix.shape

    def __repr__(self) -> str:
        return f"LinearGaussian({self.context} x {self.features}, noise={self.noise})"

    @classmethod
    def random(
        cls, features: int = 4, context: int = 3, *, noise: float = 0.5, seed: int = 0
    ) -> LinearGaussian:
        """One with a matrix of normal numbers, divided by sqrt(D).

        Args:
            features: dimensions of the parameters, D.
            context: dimensions of an observation, C.
            noise: standard deviation of the noise.
            seed: of the matrix.
        """
        check_count("features", features)
        check_count("context", context)
        generator = torch.Generator().manual_seed(seed)
        matrix = Source(generator, torch.float64, generator.device).normal(context, features)
        return cls(matrix / math.sqrt(features), noise)

    @cached_property
    def posterior_covariance(self) -> Tensor:
        """S (D, D), float64."""
        precision = self.matrix.T @ self.matrix / self.noise**2
        precision.diagonal().add_(1)
        return torch.linalg.inv(precision)

    @property
    def posterior_entropy(self) -> float:
        """The entropy of every posterior, log det(2 pi e S) / 2, in nats."""
        log_det = torch.linalg.slogdet(self.posterior_covariance).logabsdet
        return 0.5 * (float(log_det) + self.features * math.log(2 * math.pi * math.e))

    def posterior_mean(self, c: Tensor) -> Tensor:
        """The mean (..., D) of the posterior given c (..., C), in the dtype of c."""
        gain = self.posterior_covariance @ self.matrix.T / self.noise**2  # (D, C)
        return c @ gain.T.to(c)

    def draw(self, n: int, source: Source) -> tuple[Tensor, Tensor]:
        """Draw n pairs, x (n, D) and c (n, C)."""
        x = source.normal(n, self.features)
        e = source.normal(n, self.context)
        return x, x @ self.matrix.T.to(x) + self.noise * e

    def draw_posterior(self, c: Tensor, n: int, source: Source) -> Tensor:
        """Draw (n, B, D) from the posteriors given c (B, C)."""
        factor = torch.linalg.cholesky(self.posterior_covariance).to(c)  # (D, D)
        return self.posterior_mean(c) + source.normal(n, len(c), self.features) @ factor.T

    def posterior_log_density(self, x: Tensor, c: Tensor) -> Tensor:
        """Evaluate log p(x | c) at x (..., D) and c (..., C), whose batches broadcast."""
        factor = torch.linalg.cholesky(self.posterior_covariance)
        white = torch.linalg.inv(factor).to(x)  # (D, D), from x - m to standard normal
        z = (x - self.posterior_mean(c)) @ white.T
        log_scale = float(factor.diagonal().log().sum())
        return -0.5 * z.square().sum(-1) - log_scale - 0.5 * self.features * math.log(2 * math.pi)
