"""The four potentials of Rezende and Mohamed: targets on the plane for variational inference.

Each is the energy U of a density known up to its normaliser, p(x) = exp(-U(x)) / Z. Here Z is known
too, so that a flow trained on U alone can be scored: its free energy E_q[log q + U] is at least
-log Z.

Reference:
    Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.checks import tracing

__all__ = ["POTENTIALS", "Potential", "potential"]

WIDTH = 8.0 * math.sqrt(2 * math.pi)  # of the strip, times what a unit Gaussian integrates to
PLANE = ((-math.inf, math.inf), (-math.inf, math.inf))
STRIP = ((-4.0, 4.0), (-math.inf, math.inf))


@dataclass(frozen=True)
class Potential:
    """An unnormalised density on the plane, exp(-U(x)), with its known normaliser.

        p(x) = exp(-U(x)) / Z    where x is in the support, 0 elsewhere

    Args:
        name: what it is called.
        energy: U of points (B, 2), as (B,), where they are in the support.
        log_normalizer: log Z, in nats.
        support: the interval (low, high) of each column, ends included. Potentials 2 to 4 have no
            finite integral over the plane: their support is the strip |x_1| <= 4.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    log_normalizer: float
    support: tuple[tuple[float, float], tuple[float, float]] = PLANE

    def log_density(self, x: Tensor) -> Tensor:
        """The unnormalised log-density -U(x), minus infinity outside of the support.

        Args:
            x: points (*batch, 2), finite. Computed in the dtype of x, or in float32 if that is
                narrower.

        Returns:
            -U(x) (*batch,), differentiable in x.

        Raises:
            TypeError: if x is no floating-point tensor.
            ValueError: if the last dimension of x is not 2, or x holds NaN or infinity.
        """
        points = _checked(x, self.name)
        low, high = points.new_tensor(self.support).unbind(-1)  # (2,)
        inside = ((points >= low) & (points <= high)).all(-1)
        return torch.where(inside, -self.energy(points), -math.inf).reshape(x.shape[:-1])

    def log_prob(self, x: Tensor) -> Tensor:
        """The normalised log-density log p(x) = -U(x) - log Z (*batch,); see `log_density`."""
        return self.log_density(x) - self.log_normalizer


def _checked(x: Tensor, name: str) -> Tensor:
    """Points (B, 2) of x (*batch, 2), as `PlaneDensity.log_prob` takes them."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x must be a floating-point tensor, got {seen}; use torch.as_tensor(x).float()"
        )
    if x.dim() == 0 or x.shape[-1] != 2:
        raise ValueError(
            f"x must have shape (..., 2), got {tuple(x.shape)}; {name} is a density on the plane"
        )
    points = x.reshape(-1, 2)
    bad = ~points.isfinite().all(-1)
    if not tracing() and bad.any():
        count = f"{int(bad.sum())} of {len(points)} points (first index {int(bad.nonzero()[0])})"
        raise ValueError(f"x has non-finite values in {count}; remove them")
    return points if x.dtype in (torch.float32, torch.float64) else points.float()


def _gaussian(deviation: Tensor, scale: float) -> Tensor:
    """The exponent -(deviation / scale)^2 / 2."""
    return -0.5 * (deviation / scale).square()


def _wave(x: Tensor) -> Tensor:
    """w_1 = sin(2 pi x_1 / 4)."""
    return torch.sin(0.5 * math.pi * x)


def _ring(x: Tensor) -> Tensor:
    """Two ends of a ring of radius 2."""
    a = x[:, 0]
    radius = torch.linalg.vector_norm(x, dim=-1)
    ends = torch.logaddexp(_gaussian(a - 2, 0.6), _gaussian(a + 2, 0.6))
    return -_gaussian(radius - 2, 0.4) - ends


def _one_wave(x: Tensor) -> Tensor:
    """A band along a sine."""
    return -_gaussian(x[:, 1] - _wave(x[:, 0]), 0.4)


def _split_wave(x: Tensor) -> Tensor:
    """A band that parts in the middle and meets again: w_2 = 3 exp(-((x_1 - 1) / 0.6)^2 / 2)."""
    a, height = x[:, 0], x[:, 1] - _wave(x[:, 0])
    bump = 3 * _gaussian(a - 1, 0.6).exp()
    return -torch.logaddexp(_gaussian(height, 0.35), _gaussian(height + bump, 0.35))


def _forked_wave(x: Tensor) -> Tensor:
    """A band that forks: w_3 = 3 sigmoid((x_1 - 1) / 0.3)."""
    a, height = x[:, 0], x[:, 1] - _wave(x[:, 0])
    step = 3 * torch.sigmoid((a - 1) / 0.3)
    return -torch.logaddexp(_gaussian(height, 0.4), _gaussian(height + step, 0.35))


_POTENTIALS = {
    1: Potential("potential 1", _ring, 1.87750162610971),  # by quadrature, all digits shown
    2: Potential("potential 2", _one_wave, math.log(0.4 * WIDTH), STRIP),
    3: Potential("potential 3", _split_wave, math.log((0.35 + 0.35) * WIDTH), STRIP),
    4: Potential("potential 4", _forked_wave, math.log((0.4 + 0.35) * WIDTH), STRIP),
}
POTENTIALS = tuple(_POTENTIALS)
"""The numbers that `potential` knows."""


def potential(number: int) -> Potential:
    """One of the four potentials, by its number in the paper's table 1.

        U_1(x) = ((|x| - 2) / 0.4)^2 / 2 - log(g((x_1 - 2) / 0.6) + g((x_1 + 2) / 0.6))
        U_2(x) = ((x_2 - w_1) / 0.4)^2 / 2
        U_3(x) = -log(g((x_2 - w_1) / 0.35) + g((x_2 - w_1 + w_2) / 0.35))
        U_4(x) = -log(g((x_2 - w_1) / 0.4) + g((x_2 - w_1 + w_3) / 0.35))

    with g(r) = exp(-r^2 / 2), w_1 = sin(2 pi x_1 / 4), w_2 = 3 g((x_1 - 1) / 0.6) and
    w_3 = 3 sigmoid((x_1 - 1) / 0.3).

    Args:
        number: 1, 2, 3 or 4.

    Raises:
        ValueError: another number.

    Reference: Rezende and Mohamed, arXiv 1505.05770, table 1.

    Example:
        >>> target = potential(2)
        >>> target.log_density(torch.tensor([[0.0, 0.4], [5.0, 0.0]]))
        tensor([-0.5000,    -inf])
        >>> round(target.log_normalizer, 4), target.support[0]
        (2.0821, (-4.0, 4.0))
    """
    if isinstance(number, bool) or number not in _POTENTIALS:
        raise ValueError(f"number={number!r} is not known; expected one of 1, 2, 3, 4")
    return _POTENTIALS[number]
