"""Variational inference with flows: autoencoders whose posterior is any flow with context.

encoder = nn.Sequential(nn.Linear(64, 128), nn.Tanh())
decoder = Bernoulli(nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 64)))
vae = VAE(encoder, posterior("iaf", latent=8, context=128), decoder)
cnf.training.fit(ELBO(vae), x, ..., anneal={"beta": cnf.training.linear(0.0, 1.0, steps=1000)})
vae.iwae(x).mean()                       # the importance-weighted bound, nats
"""

from __future__ import annotations

from cnf.variational.decoders import Bernoulli, Decoder, DiscretizedLogistic, Gaussian
from cnf.variational.objective import ELBO
from cnf.variational.posterior import POSTERIORS, posterior
from cnf.variational.vae import VAE

__all__ = [
    "ELBO",
    "POSTERIORS",
    "VAE",
    "Bernoulli",
    "Decoder",
    "DiscretizedLogistic",
    "Gaussian",
    "posterior",
]
