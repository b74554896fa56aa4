"""The pinwheel: five Gaussian blades, twisted. The one toy whose density needs root finding.

The twist x(f) turns the plane by an angle that grows with f0, so it keeps |f| and acts on the polar
angle of f only. With r = |x| / 2 = |f| and f = r (cos b, sin b), x at polar angle a is reached from
blade k where

    G(b) = b - rate exp(r cos b) = a + 2 pi k / 5   (mod 2 pi)
    slope = dG/db = 1 + rate exp(f0) f1

and each solution adds p(f) / (5 * 4 |slope|) to p(x). G rises for all b while r < 1.7. Beyond,
slope < 0 on an interval and the plane is folded over itself: there G is searched on a rising and on
a falling branch, and p is infinite on the edge of the fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.data.density import PlaneDensity, Source

__all__ = ["Pinwheel"]

BLADES = 5
SPACING = 2 * math.pi / BLADES
RATE = 0.25
RADIAL_SD, TANGENTIAL_SD = 0.3, 0.1
FREEZE = 4.0  # beyond |f| = 4, ten standard deviations out, the twist is that at 4: it stays finite


@dataclass(frozen=True)
class Pinwheel(PlaneDensity):
    """Five Gaussian blades around the origin, twisted.

        f = (1 + 0.3 e0, 0.1 e1),    e ~ N(0, I)
        x = 2 R f,    R the clockwise rotation by 2 pi k / 5 + 0.25 exp(f0)

    with k uniform on 0, ..., 4. `log_prob` is exact: the sum over every f that the map takes to x,
    but for those more than ten standard deviations out.
    """

    name: str = "pinwheel"
    entropy: float = 2.317788036

    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""
        e = source.normal(n, 2)
        f0, f1 = 1 + RADIAL_SD * e[:, 0], TANGENTIAL_SD * e[:, 1]
        turn = SPACING * source.index(BLADES, n) + RATE * f0.exp()
        cos, sin = turn.cos(), turn.sin()
        return 2 * torch.stack((f0 * cos + f1 * sin, f1 * cos - f0 * sin), -1)

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""
        turn, blade, found = solve_turns(x.detach())  # (B, 7) each
        f0, f1, twist, slope = untwist(x, turn)
        for _ in range(
            2
        ):  # two Newton steps: they polish the root and carry its first and second derivatives in x
            steady = found & (slope.abs() > 1e-3)  # not on the edge of the fold
            turn = turn - torch.where(steady, turn - blade - twist, 0.0) / torch.where(
                steady, slope, 1.0
            )
            f0, f1, twist, slope = untwist(x, turn)
        log_f = -0.5 * (((f0 - 1) / RADIAL_SD).square() + (f1 / TANGENTIAL_SD).square())
        log_x = log_f - torch.where(found, slope, 1.0).abs().log()  # (B, 7)
        total = log_x.masked_fill(~found, -math.inf).logsumexp(-1)
        return total - math.log(4 * BLADES * 2 * math.pi * RADIAL_SD * TANGENTIAL_SD)


def untwist(x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn x (B, 2) back by `turn` (B, m): the point f0, f1, the twist that belongs to it, and the
    slope, (B, m) each.
    """
    x0, x1 = x[:, :1] / 2, x[:, 1:] / 2  # (B, 1)
    frozen = (
        FREEZE / (x0.square() + x1.square()).clamp(min=FREEZE**2).sqrt()
    )  # 1 up to |f| = FREEZE
    cos, sin = turn.cos(), turn.sin()
    f0, f1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    twist = RATE * (f0 * frozen).exp()
    return f0, f1, twist, 1 + twist * frozen * f1


@torch.no_grad()
def solve_turns(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the turns that may have brought a blade to x (B, 2).

    Returns:
        The turn b - a, the blade's own share of it (a multiple of 2 pi / 5), and whether the
        solution exists, (B, 7) each: five solutions on the rising branch, then two on the falling
        branch, where there is one.
    """
    a = torch.atan2(x[:, 1:], x[:, :1])  # (B, 1)
    r = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 2).clamp(max=FREEZE)

    def fall(b: Tensor) -> Tensor:  # 1 - dG/db at -b; has one maximum on [0, pi]
        share: Tensor = RATE * r * b.sin() * (r * b.cos()).exp()
        return share - 1

    def rise(b: Tensor) -> Tensor:  # G
        return b.sub((r * b.cos()).exp(), alpha=RATE)

    steepest = (2 * r / (1 + (1 + 4 * r.square()).sqrt())).acos()
    folded = fall(steepest) > 0
    near = bisect(fall, torch.zeros_like(r), steepest)
    far = bisect(lambda b: -fall(b), steepest, torch.full_like(r, math.pi))
    low = torch.where(folded, -near, -math.pi)
    high = torch.where(folded, 2 * math.pi - far, math.pi)
    first = ((rise(low) - a) / SPACING).ceil()
    blade = SPACING * (first + torch.arange(BLADES, dtype=x.dtype, device=x.device))  # (B, 5)
    up = bisect(lambda b: rise(b) - a - blade, low, high)
    down = bisect(lambda b: a + blade[:, :2] - rise(b), -far, -near)
    real = folded & (a + blade[:, :2] <= rise(-far))  # (B, 2)
    found = torch.cat((torch.ones_like(up, dtype=torch.bool), real), -1)
    return torch.cat((up, down), -1) - a, torch.cat((blade, blade[:, :2]), -1), found


def bisect(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, *, steps: int = 40) -> Tensor:
    """The zero of a function that rises through it between `low` and `high`, elementwise."""
    for _ in range(steps):
        middle = (low + high) / 2
        above = f(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
