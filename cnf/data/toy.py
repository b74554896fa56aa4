"""Toy densities on the plane, each with an exact sampler, log-density and entropy.

They are the standard two-dimensional examples of the flow literature, with the constants of the
FFJORD code. A model's test log-likelihood can reach -entropy and no more.

Reference:
    Grathwohl et al., FFJORD: Free-form continuous dynamics for scalable reversible generative
    models, arXiv 1810.01367.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from cnf.data.density import PlaneDensity, Source
from cnf.data.pinwheel import Pinwheel

__all__ = ["TOY_NAMES", "Checkerboard", "NoisyCircles", "NoisyCurves", "toy"]

CHUNK = 2**15  # (point, node) pairs taken at once by a quadrature: few enough to stay in cache


@dataclass(frozen=True)
class NoisyCurves(PlaneDensity):
    """Points spread along curves, blurred by noise.

        x = c_k(u) + sd e + box v,    u ~ U(0, 1), e ~ N(0, I), v ~ U(-1/2, 1/2)^2
        p(x) = (1/K) sum_k integral_0^1 q(x - c_k(u)) du

    with k uniform on the K curves and q the density of the noise, a product over the axes. The
    integral is a Gauss-Legendre sum in sqrt(u), the variable in which the spirals are smooth; with
    the default nodes log p is right to 1e-8 in float64 wherever it is above -500. A curve that is a
    single point needs one node.

    Args:
        name: what the density is called.
        entropy: its entropy in nats.
        curves: maps u (m,) to c_1(u), ..., c_K(u), shape (m, K, 2).
        sd: standard deviation of the Gaussian noise on each axis.
        box: width of the uniform noise on each axis; 0 for none.
        nodes: number of quadrature nodes on each curve.
    """

    name: str
    entropy: float
    curves: Callable[[Tensor], Tensor]
    sd: float
    box: float = 0.0
    nodes: int = 512

    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""
        centres = self.curves(source.uniform(n))  # (n, K, 2)
        chosen = source.index(centres.shape[1], n)
        x = centres[torch.arange(n, device=source.device), chosen] + self.sd * source.normal(n, 2)
        return x + self.box * (source.uniform(n, 2) - 0.5) if self.box else x

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""
        centres, log_weights = (table.to(x) for table in self.quadrature)  # (M, 2), (M,)
        parts = []
        for part in torch.split(x, max(1, CHUNK // len(centres))):  # (b, 2)
            offset = part.unsqueeze(1) - centres  # (b, M, 2)
            parts.append((self.log_noise(offset).sum(-1) + log_weights).logsumexp(-1))
        return torch.cat(parts)

    def log_noise(self, offset: Tensor) -> Tensor:
        """Log-density of the noise on one axis, elementwise: a Gaussian, convolved with the box."""
        if not self.box:
            log_scale = math.log(self.sd * math.sqrt(2 * math.pi))
            return (offset / self.sd).square().div(-2).sub(log_scale)
        distance = offset.abs()  # q is even, and on this side the difference loses no digits
        near = (distance - self.box / 2) / (self.sd * math.sqrt(2))
        far = (distance + self.box / 2) / (self.sd * math.sqrt(2))
        ratio = (-distance * self.box / self.sd**2).exp()  # exp(near^2 - far^2)
        q: Tensor = (torch.special.erfcx(near) - torch.special.erfcx(far) * ratio) / (2 * self.box)
        return q.log() - near.square()

    @cached_property
    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Centres (M, 2) and log-weights (M,), in float64, of the mixture that equals p."""
        nodes, weights = gauss_legendre(self.nodes)
        v = (1 + nodes) / 2  # u = v^2, du = 2 v dv
        centres = self.curves(v.square())  # (m, K, 2)
        log_weights = (v * weights / centres.shape[1]).log()  # (m,)
        return centres.reshape(-1, 2), log_weights.repeat_interleave(centres.shape[1])


@dataclass(frozen=True)
class NoisyCircles(PlaneDensity):
    """Concentric circles of equal weight, blurred by Gaussian noise.

        x = R_k (cos a, sin a) + sd e,    k uniform, a ~ U(0, 2 pi), e ~ N(0, I)
        p(x) = (1/K) sum_k exp(-(r^2 + R_k^2) / (2 sd^2)) I0(r R_k / sd^2) / (2 pi sd^2),    r = |x|

    Args:
        name: what the density is called.
        entropy: its entropy in nats.
        radii: R_1, ..., R_K.
        sd: standard deviation of the noise on each axis.
    """

    name: str
    entropy: float
    radii: tuple[float, ...]
    sd: float

    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""
        radii = torch.tensor(self.radii, dtype=source.dtype, device=source.device)
        angle = 2 * math.pi * source.uniform(n)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (n, 2)
        return radii[source.index(len(radii), n)].unsqueeze(
            -1
        ) * direction + self.sd * source.normal(n, 2)

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""
        radii = torch.tensor(self.radii, dtype=x.dtype, device=x.device)  # (K,)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (B, 1)
        log_bessel = torch.special.i0e(r * radii / self.sd**2).log()  # I0(y) = i0e(y) exp(y)
        each = log_bessel - ((r - radii) / self.sd).square() / 2  # (B, K)
        log_p: Tensor = each.logsumexp(-1) - math.log(2 * math.pi * self.sd**2 * len(radii))
        return log_p


@dataclass(frozen=True)
class Checkerboard(PlaneDensity):
    """The uniform density on 8 of the 16 squares of side 2 that tile [-4, 4)^2.

        p(x) = 1/32  where floor(x1 / 2) + floor(x2 / 2) is even, 0 elsewhere

    Its gradient is zero wherever it exists, so `log_prob` keeps no graph.
    """

    name: str = "checkerboard"
    entropy: float = math.log(32)

    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""
        column = source.index(4, n)
        row = 2 * source.index(2, n) + column % 2
        corner = 2 * torch.stack((column, row), -1).to(source.dtype) - 4  # (n, 2)
        last = torch.nextafter(corner + 2, corner)  # rounding must not leave the square
        return torch.minimum(corner + 2 * source.uniform(n, 2), last)

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""
        inside = ((x >= -4) & (x < 4)).all(-1)
        dark = (x / 2).floor().sum(-1).remainder(2) == 0
        return x.new_full((len(x),), -math.inf).masked_fill(inside & dark, -math.log(32))


@lru_cache(maxsize=4)
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (count,) of Gauss-Legendre quadrature on [-1, 1]; kept: slow."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def eight_points(u: Tensor) -> Tensor:
    """Eight points on a circle of radius 4 / 1.414, (m, 8, 2), whatever u (m,)."""
    angle = torch.arange(8, dtype=u.dtype, device=u.device) * (math.pi / 4)
    return (torch.stack((angle.cos(), angle.sin()), -1) * (4 / 1.414)).expand(len(u), 8, 2)


def half_circles(u: Tensor) -> Tensor:
    """The two interleaved half circles of radius 2, (m, 2, 2), at u (m,)."""
    cos, sin = (math.pi * u).cos(), (math.pi * u).sin()
    upper = torch.stack((2 * cos - 1, 2 * sin - 0.2), -1)
    lower = torch.stack((1 - 2 * cos, 0.8 - 2 * sin), -1)
    return torch.stack((upper, lower), -2)


def roll(u: Tensor) -> Tensor:
    """The spiral (t cos t, t sin t) / 5 with t = 1.5 pi (1 + 2u), (m, 1, 2), at u (m,)."""
    t = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack((t * t.cos(), t * t.sin()), -1).unsqueeze(-2) / 5


def two_arms(u: Tensor) -> Tensor:
    """A spiral arm and its mirror image, (m, 2, 2), at u (m,).

    The arm is (-t cos t, t sin t) / 3 with t = 3 pi sqrt(u), moved by 1/12 on both axes. The move
    is the mean of the source's jitter U(0, 1) / 6; the spread of the jitter is `box`.
    """
    t = 3 * math.pi * u.sqrt()
    arm = torch.stack((-t * t.cos() / 3, t * t.sin() / 3), -1) + 1 / 12
    return torch.stack((arm, -arm), -2)


TOYS: dict[str, Callable[[], PlaneDensity]] = {
    "8gaussians": lambda: NoisyCurves(
        "8gaussians", 2.831880406138, eight_points, sd=0.5 / 1.414, nodes=1
    ),
    "checkerboard": Checkerboard,
    "2spirals": lambda: NoisyCurves("2spirals", 2.645450283, two_arms, sd=0.1, box=1 / 6),
    "pinwheel": Pinwheel,
    "circles": lambda: NoisyCircles("circles", 3.268135711706, (3.0, 1.5), sd=0.24),
    "rings": lambda: NoisyCircles("rings", 2.623182770301, (3.0, 2.25, 1.5, 0.75), sd=0.08),
    "moons": lambda: NoisyCurves("moons", 2.393879195966, half_circles, sd=0.2),
    "swissroll": lambda: NoisyCurves("swissroll", 2.669646173855, roll, sd=0.2),
}
TOY_NAMES: tuple[str, ...] = tuple(TOYS)


def toy(name: str) -> PlaneDensity:
    """The toy density called `name`, one of `TOY_NAMES`.

    Args:
        name: such as "8gaussians" or "moons".

    Returns:
        The density, with `sample`, `log_prob` and `entropy`.

    Raises:
        ValueError: if no toy has that name.

    Example:
        >>> density = toy("checkerboard")
        >>> x = density.sample(3, torch.Generator().manual_seed(0))
        >>> density.log_prob(x)
        tensor([-3.4657, -3.4657, -3.4657])
        >>> round(density.entropy, 4)
        3.4657
    """
    if name not in TOYS:
        close = difflib.get_close_matches(str(name), TOY_NAMES, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(TOY_NAMES)}, got {name!r}{guess}")
    return TOYS[name]()
