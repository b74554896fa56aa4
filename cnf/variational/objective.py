"""The evidence lower bound as an objective."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnf.checks import check_count, check_number
from cnf.objectives.terms import log_terms
from cnf.variational.vae import VAE

__all__ = ["ELBO"]


class ELBO(nn.Module):
    """The mean negative evidence lower bound of a batch, in nats.

        loss = 1/B sum_i -E_q[log p(x_i | z)] + beta E_q[log q(z | x_i) - log p(z)]

    It tells its two terms as `reconstruction` (the first) and `kl` (the second, without beta). To
    warm the second up: `fit(..., anneal={"beta": cnf.training.linear(0.0, 1.0, steps)})`.

    Args:
        vae: the autoencoder to train.
        samples: z drawn for each x.

    Raises:
        TypeError: not a VAE.
        ValueError: a number of samples that is not positive.

    Reference: Kingma and Welling, arXiv 1312.6114.

    Example:
        >>> import torch
        >>> from cnf.variational import VAE, Gaussian, posterior
        >>> vae = VAE(nn.Linear(3, 8), posterior("gaussian", 2, 8), Gaussian(nn.Linear(2, 3)))
        >>> ELBO(vae)(torch.randn(16, 3), beta=0.5).shape
        torch.Size([])
    """

    def __init__(self, vae: VAE, *, samples: int = 1) -> None:
        super().__init__()
        if not isinstance(vae, VAE):
            raise TypeError(f"vae must be a cnf.variational.VAE, got {type(vae).__name__}")
        check_count("samples", samples)
        self.vae = vae
        self.samples = samples

    def extra_repr(self) -> str:
        """The number of samples."""
        return f"samples={self.samples}"

    def forward(self, x: Tensor, *, beta: float = 1.0, **choices: Any) -> Tensor:
        """The loss, a scalar.

        Args:
            x: batch (B, *event).
            beta: weight of the second term.
            choices: `generator=`, `divergence=`, `solver=` for this call.
        """
        check_number("beta", beta)
        log_likelihood, kl = self.vae.terms(x, samples=self.samples, **choices)
        log_terms(reconstruction=-log_likelihood.mean(), kl=kl.mean())
        return (beta * kl - log_likelihood).mean()
