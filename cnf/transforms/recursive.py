"""Recursive coupling: a coupling of two halves, and in each half another, to any depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.checks import check_count
from cnf.transforms.coupling import Coupling
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.elementwise import Elementwise
from cnf.transforms.masks import make_mask

__all__ = ["RecursiveCoupling"]


class RecursiveCoupling(DiscreteTransform):
    """A coupling whose two halves are mapped by couplings of the same kind (HINT).

        z = (R(x_1), R(C(x_2; x_1))),    C a coupling, R the same map of half the dimensions

    Its Jacobian is triangular and, at full depth, dense below the diagonal: every dimension but
    the first depends on all before it. Both directions run each network once: one a level of
    2^level halves, so D - 1 at full depth.

    Args:
        features: dimensions of a sample, D, or its shape; halves are of the first dimension.
        elementwise: "affine", "additive", "spline", or an `Elementwise`.
        depth: number of levels; None goes down to halves of one dimension.
        hidden: widths of each conditioner's hidden layers.
        context: number of context features, 0 for none.
        options: passed to each `Coupling`, such as activation="silu".

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: one dimension alone, or a depth that is not positive.

    Reference: Kruse et al., arXiv 1905.10687.

    Example:
        >>> f = RecursiveCoupling(8, hidden=(16,))
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 8))
        >>> x.shape, log_det.shape
        (torch.Size([10, 8]), torch.Size([10]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        elementwise: str | Elementwise = "affine",
        *,
        depth: int | None = None,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(features, context)
        if depth is not None:
            check_count("depth", depth)
        mask = make_mask("halves", self.event_shape)
        n, *rest = self.event_shape
        self.coupling = Coupling(
            self.event_shape, mask, elementwise, hidden=hidden, context=context, **options
        )
        self.sizes = [n // 2, n - n // 2]
        self.kept = self.sizes[0]  # dimensions at the beginning that do not change
        self.halves = nn.ModuleList()  # of each half, where it has two dimensions or more
        for size in self.sizes:
            if size == 1 or depth == 1:
                self.halves.append(nn.Identity())
                continue
            deeper = RecursiveCoupling(
                (size, *rest),
                elementwise,
                depth=None if depth is None else depth - 1,
                hidden=hidden,
                context=context,
                **options,
            )
            self.halves.append(deeper)
        if isinstance(self.halves[0], RecursiveCoupling):
            self.kept = self.halves[0].kept

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, *event) and log |det dx/dz| (B,)."""
        y, log_det = self._in_halves(z, context, "to_data")
        x, more = self.coupling.to_data(y, context)
        return x, log_det + more

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, *event) and log |det dz/dx| (B,)."""
        y, log_det = self.coupling.to_base(x, context)
        z, more = self._in_halves(y, context, "to_base")
        return z, log_det + more

    def _in_halves(
        self, x: Tensor, context: Tensor | None, direction: str
    ) -> tuple[Tensor, Tensor]:
        """Each half by its own map."""
        parts = list(x.split(self.sizes, 1))
        log_det = x.new_zeros(x.shape[0])
        for i, half in enumerate(self.halves):
            if isinstance(half, RecursiveCoupling):
                parts[i], more = getattr(half, direction)(parts[i], context)
                log_det = log_det + more
        return torch.cat(parts, 1), log_det
