"""The two-moons simulator of the simulation-based-inference benchmark, with its exact posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cnf.data.density import Source
from cnf.data.simulator import Simulator

__all__ = ["TwoMoons"]

OFFSET, RADIUS, SD = 0.25, 0.1, 0.01  # of the crescent: where, how large, how thick
SQRT2 = math.sqrt(2)
NODES = 128  # of the quadrature over radii: P(c) is right to 1e-4
LEAST = 1e-3  # of a crescent that must be possible for its posterior to be sampled
ROUNDS = 50_000  # of rejection: of a draw that succeeds with 1e-3, e^-50 are left
CHUNK = 4096  # observations whose mass is computed at once


class TwoMoons(Simulator):
    """Two parameters in a box; the posterior is two crescents that mirror each other.

        x ~ U(-1, 1)^2
        p = (r cos a + 0.25, r sin a),    a ~ U(-pi/2, pi/2),  r ~ N(0.1, 0.01^2)
        c = p + (-|s|, d),    s = (x_1 + x_2) / sqrt 2,  d = (x_2 - x_1) / sqrt 2

        log p(x | c) = log N(r; 0.1, 0.01^2) - log(pi r) - log(2 P(c))    for x in the box, where
        r is the radius of p = c - (-|s|, d), which must be on the right half of its circle

    P(c) is the probability that a random p explains c by some x in the box, |s| = p_1 - c_1 >= 0
    and |s| + |d| <= sqrt 2: 1 for most c, an integral over the radii for others. The benchmark's
    own log-density, without log(pi r), is not that of its simulator, but its reference samples
    are.

    Reference:
        Lueckmann et al., Benchmarking simulation-based inference, arXiv 2101.04653; from Greenberg
        et al., Automatic posterior transformation, arXiv 1905.07488.

    Example:
        >>> problem = TwoMoons()
        >>> x, c = problem.sample(100)
        >>> x.shape, c.shape, problem.posterior_sample(c, 10).shape
        (torch.Size([100, 2]), torch.Size([100, 2]), torch.Size([10, 100, 2]))
        >>> problem.posterior_log_prob(x, c).mean() > 3
        tensor(True)
    """

    name = "two-moons"
    features = 2
    context = 2

    def __repr__(self) -> str:
        return "TwoMoons()"

    def draw(self, n: int, source: Source) -> tuple[Tensor, Tensor]:
        """Draw n pairs, x (n, 2) and c (n, 2)."""
        x = 2 * source.uniform(n, 2) - 1
        return x, _crescent(n, source) + _shift(x)

    def draw_posterior(self, c: Tensor, n: int, source: Source) -> Tensor:
        """Draw (n, B, 2) from the posteriors given c (B, 2), by rejection of a crescent's points.

        Raises:
            ValueError: an observation that less than 0.1% of the crescent explain.
        """
        if not n:
            return c.new_empty(0, *c.shape)
        _check_possible(c, LEAST)
        target = c.repeat(n, 1)  # (n B, 2)
        x = torch.empty_like(target)
        missing = torch.arange(len(target), device=c.device)
        for _ in range(ROUNDS):
            if not len(missing):
                return x.reshape(n, *c.shape)
            p = _crescent(len(missing), source)
            sign = 1.0 - 2.0 * source.index(2, len(missing)).to(c)
            s, d = p[:, 0] - target[missing, 0], target[missing, 1] - p[:, 1]
            found = torch.stack((sign * s - d, sign * s + d), -1) / SQRT2  # (M, 2)
            fits = (s >= 0) & (found.abs() <= 1).all(-1)
            x[missing[fits]] = found[fits]
            missing = missing[~fits]
        raise ValueError(f"c: {len(missing)} draws were not found in {ROUNDS} rounds of rejection")

    def posterior_log_density(self, x: Tensor, c: Tensor) -> Tensor:
        """Evaluate log p(x | c) at x (..., 2) and c (..., 2), whose batches broadcast."""
        mass = _check_possible(c.reshape(-1, 2), 0.0).reshape(c.shape[:-1])
        u, v = (c - _shift(x) - c.new_tensor([OFFSET, 0.0])).unbind(-1)  # of p, from the centre
        r = torch.sqrt(u.square() + v.square() + torch.finfo(u.dtype).tiny)  # has a slope at 0
        radial = -0.5 * ((r - RADIUS) / SD).square() - math.log(SD * math.sqrt(2 * math.pi))
        inside = (u > 0) & (x.abs() <= 1).all(-1)
        return torch.where(inside, radial - (2 * math.pi * r * mass).log(), -math.inf)


def _crescent(n: int, source: Source) -> Tensor:
    """Points p (n, 2) of the half circle."""
    a = math.pi * (source.uniform(n) - 0.5)
    r = RADIUS + SD * source.normal(n)
    return torch.stack((r * a.cos() + OFFSET, r * a.sin()), -1)


def _shift(x: Tensor) -> Tensor:
    """c - p (..., 2), by the parameters x (..., 2)."""
    s, d = (x[..., 0] + x[..., 1]) / SQRT2, (x[..., 1] - x[..., 0]) / SQRT2
    return torch.stack((-s.abs(), d), -1)


def _check_possible(c: Tensor, least: float) -> Tensor:
    """P(c) (B,) of observations (B, 2), each above `least`."""
    parts = [_explained(part) for part in c.detach().double().split(CHUNK)]
    mass = torch.cat(parts) if parts else c.new_zeros(0)
    bad = mass <= least
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"c has {int(bad.sum())} of {len(c)} rows that no parameters in the box explain, or "
            f"hardly any (first index {i}: {c[i].tolist()}); take observations from sample()"
        )
    return mass.to(c)


def _explained(c: Tensor) -> Tensor:
    """P(c) (B,): the share of the angles that explain c (B, 2), in the mean over the radii.

    With k = (c_1 - 0.25) / r the angles of |s| >= 0 are |a| <= arccos k; those outside the box,
    |s| + d > sqrt 2 or |s| - d > sqrt 2, have cos(a +- pi/4) above a bound: two more intervals.
    """
    u = (torch.arange(NODES, dtype=c.dtype, device=c.device) + 0.5) / NODES
    r = RADIUS + SD * SQRT2 * torch.erfinv(2 * u - 1)  # (R,) of equal probability
    c1, c2 = c[:, :1], c[:, 1:]  # (B, 1)
    half = torch.arccos(((c1 - OFFSET) / r).clamp(0, 1))  # (B, R)
    allowed = (-half, half)
    outside = []
    for sign in (-1, 1):  # of c_2 - p_2 above 0, and below
        bound = (SQRT2 - OFFSET + c1 + sign * c2) / (SQRT2 * r)
        width = torch.arccos(bound.clamp(-1, 1))
        centre = sign * math.pi / 4
        outside.append(_both(allowed, (centre - width, centre + width)))
    lost = sum(_length(part) for part in outside) - _length(_both(*outside))
    return ((2 * half - lost) / math.pi).mean(-1)


def _both(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The intersection of two intervals; its end may be before its start."""
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def _length(interval: tuple[Tensor, Tensor]) -> Tensor:
    """The length of an interval, 0 where it is empty."""
    return (interval[1] - interval[0]).clamp_min(0)
