"""`VAE`: a variational autoencoder whose posterior is a flow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.base import Base, StandardNormal, as_base
from cnf.checks import check_bool, check_count, check_number
from cnf.divergence import Divergence, Exact
from cnf.flow import Flow
from cnf.ode import Solver, TorchDiffEq
from cnf.variational.decoders import Decoder

__all__ = ["VAE"]


class VAE(nn.Module):
    """A variational autoencoder: latents z ~ p(z), data x ~ p(x | z), and a flow as q(z | x).

        log p(x) >= E_q[ log p(x | z) + log p(z) - log q(z | x) ],    q(z | x) = flow(z; encoder(x))

    Args:
        encoder: from data x (B, *event) to the posterior's context h (B, C). It may drop at random
            or normalize over the batch in `train()`: any context gives a bound.
        posterior: a flow of vectors z (D,) with context, such as `posterior(kind, D, C)`.
        decoder: the likelihood of x given z, such as `Bernoulli(network)`.
        prior: p(z): a base, a torch distribution, or a flow without context, whose parameters are
            then learned; None for the standard normal.

    Shapes:
        x (B, *event), float or integers, which the encoder is given as floats.

    Raises:
        TypeError: an argument of another kind; in a call, an encoder that returns no tensor.
        ValueError: a posterior without context or of other latents than vectors, a prior of other
            dimensions; in a call, an encoder that does not return (B, C).

    Reference:
        Kingma and Welling, arXiv 1312.6114; Rezende and Mohamed, arXiv 1505.05770.

    Example:
        >>> from cnf.variational import Bernoulli, posterior
        >>> decoder = Bernoulli(nn.Linear(2, 6))
        >>> vae = VAE(nn.Linear(6, 8), posterior("planar", latent=2, context=8), decoder)
        >>> x = torch.randint(2, (5, 6)).float()
        >>> vae.elbo(x).shape, vae.iwae(x, samples=100).shape, vae.sample(3).shape
        (torch.Size([5]), torch.Size([5]), torch.Size([3, 6]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        posterior: Flow,
        decoder: Decoder,
        prior: Base | Flow | Distribution | None = None,
    ) -> None:
        super().__init__()
        for name, module, kind in (
            ("encoder", encoder, nn.Module),
            ("posterior", posterior, Flow),
            ("decoder", decoder, Decoder),
        ):
            if not isinstance(module, kind):
                raise TypeError(
                    f"{name} must be a {kind.__name__}, got {type(module).__name__}; see "
                    "help(cnf.variational.VAE)"
                )
        _check_posterior(posterior)
        self.encoder = encoder
        self.posterior = posterior
        self.decoder = decoder
        self.prior = _as_prior(prior, posterior.event_shape)

    def forward(self, x: Tensor, *, beta: float = 1.0) -> Tensor:
        """`elbo` with one sample, (B,)."""
        return self.elbo(x, beta=beta)

    def elbo(
        self,
        x: Tensor,
        *,
        samples: int = 1,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """An unbiased draw of the evidence lower bound of log p(x) (B,), in nats.

            E_q[log p(x | z)] + beta E_q[log p(z) - log q(z | x)]

        Args:
            x: data (B, *event).
            samples: z drawn for each x, over which the mean is taken.
            beta: weight of the second term; it is a bound at 1.
            generator: source of all noise.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.

        Raises:
            SolverError: a solve that cannot end.
            ValueError: x that the encoder or the decoder refuses.
        """
        check_number("beta", beta)
        log_likelihood, kl = self.terms(
            x, samples=samples, generator=generator, divergence=divergence, solver=solver
        )
        return (log_likelihood - beta * kl).mean(0)

    def terms(
        self,
        x: Tensor,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two terms of the bound, for each z drawn from q(z | x): their means make the ELBO.

            log p(x | z),    log q(z | x) - log p(z)

        Args:
            x: data (B, *event).
            samples: z drawn for each x, S.
            generator: source of all noise.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.

        Returns:
            The two, each (S, B).
        """
        check_count("samples", samples)
        choices: dict[str, Any] = {"divergence": divergence, "solver": solver}
        return self._terms(x, self._encode(x), samples, generator=generator, **choices)

    def iwae(
        self,
        x: Tensor,
        samples: int = 500,
        *,
        chunk: int = 10_000,
        differentiable: bool = False,
        generator: torch.Generator | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """The importance-weighted bound of log p(x) (B,), in nats.

            log 1/k sum_j p(x, z_j) / q(z_j | x),    z_j ~ q(z | x)

        In the mean it rises with the number of samples, from the ELBO at k = 1 to log p(x); its
        exponential is an unbiased estimate of p(x). The divergence is exact, as noise in the
        weights would make them overstate it.

        Args:
            x: data (B, *event).
            samples: z drawn for each x, k.
            chunk: how many z are in memory at once, over all x; without gradient.
            differentiable: whether to record gradients, as for training by this bound.
            generator: source of all noise.
            solver: a solver, for this call.

        Raises:
            SolverError: a solve that cannot end.
            ValueError: a number that is not positive, x that the encoder or the decoder refuses.

        Reference:
            Burda et al., Importance Weighted Autoencoders, arXiv 1509.00519.
        """
        check_count("samples", samples)
        check_count("chunk", chunk)
        check_bool("differentiable", differentiable)
        choices: dict[str, Any] = {"divergence": Exact(), "solver": solver, "generator": generator}
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            _check_tensor(x)
            bounds = []
            for rows in x.split(chunk):
                h, at_once = self._encode(rows), max(1, chunk // max(1, len(rows)))
                parts = []
                for done in range(0, samples, at_once):
                    now = min(at_once, samples - done)
                    log_likelihood, kl = self._terms(rows, h, now, **choices)
                    parts.append((log_likelihood - kl).logsumexp(0))
                bounds.append(torch.stack(parts).logsumexp(0) - math.log(samples))
            return torch.cat(bounds)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """E[x' | z] (B, *event) at one z ~ q(z | x) for each x (B, *event)."""
        z = self.posterior.sample((), self._encode(x), generator=generator, solver=solver)
        return self.decoder.mean(z)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...] | int = (),
        *,
        generator: torch.Generator | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """Data x ~ p(x | z), z ~ p(z): (*shape, *event)."""
        z = self.sample_prior(shape, generator=generator, solver=solver)
        return self.decoder.sample(z, generator)

    @torch.no_grad()
    def sample_prior(
        self,
        shape: tuple[int, ...] | int = (),
        *,
        generator: torch.Generator | None = None,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """Latents z ~ p(z): (*shape, D), from which `decoder.mean` makes pictures."""
        if isinstance(self.prior, Flow):
            return self.prior.sample(shape, generator=generator, solver=solver)
        return self.prior.rsample((shape,) if isinstance(shape, int) else tuple(shape), generator)

    def _terms(self, x: Tensor, h: Tensor, samples: int, **choices: Any) -> tuple[Tensor, Tensor]:
        """`terms`, of x whose context is h."""
        z, log_q = self.posterior.rsample_and_log_prob((samples,), h, **choices)
        if isinstance(self.prior, Flow):
            log_prior = self.prior.log_prob(z, **choices)
        else:
            log_prior = self.prior.log_prob(z)
        return self.decoder.log_prob(x, z), log_q - log_prior

    def _encode(self, x: Tensor) -> Tensor:
        """The context h (B, C) of x (B, *event)."""
        _check_tensor(x)
        if not x.is_floating_point():
            x = x.to(next((p.dtype for p in self.parameters()), torch.get_default_dtype()))
        h = self.encoder(x.clone())  # it may write into its argument
        if not isinstance(h, Tensor):
            raise TypeError(f"the encoder returned a {type(h).__name__}, expected a tensor (B, C)")
        if h.ndim != 2 or len(h) != len(x):
            raise ValueError(
                f"the encoder returned the shape {tuple(h.shape)} for x {tuple(x.shape)}, expected "
                f"(B={len(x)}, C); flatten what it makes of each sample"
            )
        return h


def _check_tensor(x: Tensor) -> None:
    """Refuse what is no tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.ndim < 1:
        raise ValueError("x must be (B, *event), got a tensor without dimensions")


def _check_posterior(posterior: Flow) -> None:
    """Refuse a flow that cannot be a posterior."""
    if not posterior.transform.takes_context:
        raise ValueError(
            f"posterior, a {type(posterior).__name__}, takes no context, and so would be the same "
            "for every x; build it with context=C, the features of the encoder"
        )
    if posterior.transform.quantized or len(posterior.event_shape) != 1:
        what = "integers" if posterior.transform.quantized else f"{posterior.event_shape}"
        raise ValueError(f"posterior has samples of {what}, expected real vectors (D,)")


def _as_prior(prior: Base | Flow | Distribution | None, latent: tuple[int, ...]) -> Base | Flow:
    """The prior as a module, of the posterior's dimensions."""
    if prior is None:
        return StandardNormal(*latent)
    if not isinstance(prior, (Base, Flow, Distribution)):
        raise TypeError(
            f"prior must be a cnf base, a cnf.Flow or a torch distribution, got "
            f"{type(prior).__name__}"
        )
    made = prior if isinstance(prior, Flow) else as_base(prior)
    if made.event_shape != latent:
        raise ValueError(f"prior has samples of {made.event_shape}, the posterior of {latent}")
    return made
