"""Amortised posteriors: a diagonal Gaussian and layers of a flow, all given by an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from cnf.base import StandardNormal
from cnf.checks import check_choice, check_count
from cnf.fields import MLPField
from cnf.flow import Flow
from cnf.models import FFJORD, IAF, PlanarFlow, RadialFlow, RealNVP, SylvesterFlow
from cnf.transforms import Compose, Diagonal

__all__ = ["POSTERIORS", "posterior"]

FLOWS: dict[str, tuple[Callable[..., Flow], str]] = {
    "planar": (PlanarFlow, "layers"),
    "radial": (RadialFlow, "layers"),
    "sylvester": (SylvesterFlow, "layers"),
    "iaf": (IAF, "layers"),
    "coupling": (RealNVP, "layers"),
    "ffjord": (FFJORD, "blocks"),
}
"""Of each kind, the model that its layers are those of, and what that calls their number."""

POSTERIORS = ("gaussian", *FLOWS)
"""The kinds of `posterior`."""


def posterior(
    kind: str, /, latent: int, context: int, *, layers: int | None = None, **options: Any
) -> Flow:
    """An amortised posterior q(z | h): a diagonal Gaussian, and behind it layers of a flow.

        z_0 = mu(h) + sigma(h) eps,    z = f_K o ... o f_1 (z_0; h),    eps ~ N(0, I)
        log q(z | h) = log N(z_0; mu, sigma^2) - sum_k log |det df_k/dz_{k-1}|

    mu and log sigma are linear in h, what the encoder says of the observation, and all layers
    depend on h too. Samples with their density are the cheap direction of each. The layers start
    near the identity.

    Args:
        kind: "gaussian" (nothing behind it), "planar", "radial", "sylvester", "iaf", "coupling" or
            "ffjord".
        latent: dimensions of z, D.
        context: features of h, C.
        layers: number of layers (of "ffjord", of CNF blocks); None for as many as the model has.
        options: of the model: `cnf.PlanarFlow`, `RadialFlow`, `SylvesterFlow`, `IAF`, `RealNVP`,
            `FFJORD`, such as hidden=, or kind= of `SylvesterFlow`.

    Returns:
        A flow with context h (B, C): `rsample_and_log_prob(shape, h)`.

    Raises:
        TypeError: an option that the model does not take.
        ValueError: a kind that is not known, a size that is not positive; layers or options of a
            Gaussian alone.

    Reference:
        Rezende and Mohamed, arXiv 1505.05770; Kingma et al., arXiv 1606.04934; van den Berg et al.,
        arXiv 1803.05649; Grathwohl et al., arXiv 1810.01367, section 4.3.

    Example:
        >>> import torch
        >>> q = posterior("iaf", latent=3, context=5, layers=2, hidden=(16,))
        >>> z, log_q = q.rsample_and_log_prob((10,), torch.randn(4, 5))
        >>> z.shape, log_q.shape
        (torch.Size([10, 4, 3]), torch.Size([10, 4]))
    """
    check_choice("kind", kind, POSTERIORS)
    check_count("latent", latent)
    check_count("context", context)
    gaussian = _gaussian(latent, context)
    if kind == "gaussian":
        if layers is not None or options:
            given = {"layers": layers, **options} if layers is not None else options
            raise ValueError(
                f"{', '.join(given)} concern the layers of a flow, and kind='gaussian' has none; "
                f"leave them out, or choose from {', '.join(FLOWS)}"
            )
        return Flow(StandardNormal(latent), gaussian)
    model, number = FLOWS[kind]
    if layers is not None:
        check_count("layers", layers)
        if number in options:
            raise ValueError(
                f"layers={layers} and {number}={options[number]!r} are the same; leave one out"
            )
        options = {number: layers, **options}
    behind = model(latent, context=context, **options)
    if kind == "ffjord":
        _begin_near_zero(behind)
    return Flow(behind.base, Compose(gaussian, behind.transform))


@torch.no_grad()
def _begin_near_zero(flow: Flow) -> None:
    """Fields near zero, as layers of the other kinds begin: a decoder that meets latents bent at
    random learns to do without some of them.
    """
    for field in flow.modules():
        if isinstance(field, MLPField):
            for parameter in field.network[-1].parameters():
                parameter.mul_(0.1)


def _gaussian(latent: int, context: int) -> Diagonal:
    """The Gaussian, whose mu and log sigma begin with the slopes of any linear layer.

    From the smaller ones of other layers a mean starts so faint beside its noise that decoders
    learn to do without many of the latents.
    """
    gaussian = Diagonal(latent, context)
    predict = cast(nn.Linear, gaussian.amortized.predict)
    predict.reset_parameters()
    nn.init.zeros_(predict.bias)
    return gaussian
