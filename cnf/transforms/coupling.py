"""Coupling layers: some dimensions are kept, and condition an elementwise map of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.transforms.conditioners import Conditioner, default_conditioner
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.elementwise import Elementwise, as_elementwise
from cnf.transforms.masks import make_mask
from cnf.user_modules import copies, is_foreign

__all__ = ["Coupling"]


class Coupling(DiscreteTransform):
    """A coupling layer: dimensions a are kept, the others b mapped elementwise, given a.

        x_a = z_a,    x_b = g(z_b; parameters(z_a, context))
        log |det dx/dz| = sum log g'

    Both directions cost one pass of the conditioner. It is the identity at first.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        mask: which dimensions are kept: "halves", "alternating", "random", for images also
            "checkerboard" and "channel", or a boolean tensor (*event), see
            `cnf.transforms.make_mask`. A layer leaves them as they are: alternate with `~mask`,
            or permute between layers.
        elementwise: "affine" (RealNVP), "additive" (NICE), "spline" (rational-quadratic), or an
            `Elementwise`, such as `RationalQuadraticSpline(bins=16)`.
        hidden: widths of the conditioner's hidden layers; channels, for images.
        context: number of context features, 0 for none.
        activation: of the conditioner, by name or as a module.
        conditioner: makes the conditioner, called as conditioner(inputs, outputs, context) with
            two shapes; its module maps (x (B, *inputs), context (B, C) or None) to (B, *outputs),
            the first parameter of all that changes, then the second, ...: shifts, then raw scales,
            for "affine". Zeros are the identity. None takes a perceptron, or convolutions for
            images, of the hidden layers and the activation above. The module must be a function
            of each sample: dropout or batch norm in `train()` is refused, see `check_modules`.
        generator: source of a random mask.

    Shapes:
        z, x (*batch, *event); context (*batch, C) or broadcastable to it; log_det (*batch,).

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: one dimension alone, a mask that keeps or changes all of them, an unknown name.

    Reference: Dinh et al., arXiv 1410.8516, 1605.08803; Durkan et al., arXiv 1906.04032.

    Example:
        >>> f = Coupling(5, "alternating", "spline", hidden=(32,), context=3)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 5), torch.randn(10, 3))
        >>> x.shape, log_det.shape
        (torch.Size([10, 5]), torch.Size([10]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        mask: str | Tensor = "halves",
        elementwise: str | Elementwise = "affine",
        *,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        activation: str | nn.Module = "relu",
        conditioner: Conditioner | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features, context)
        self.elementwise = as_elementwise(elementwise)
        self.lent = is_foreign(self.elementwise)  # whether it may write into what it is given
        mask = make_mask(mask, features, generator)
        self.parts = _Halves(mask) if _by_first_dimension(mask) else _Pixels(mask)
        kept, changed = self.parts.shapes
        if conditioner is None:
            conditioner = default_conditioner(self.event_shape, hidden, activation)
        elif isinstance(conditioner, nn.Module) or not callable(conditioner):
            raise TypeError(
                "conditioner must make a network, called as conditioner(inputs, outputs, context), "
                f"got {type(conditioner).__name__}; use such as the class cnf.transforms.MLP"
            )
        self.outputs = (self.elementwise.parameters * changed[0], *changed[1:])
        self.conditioner = conditioner(kept, self.outputs, context)
        if not isinstance(self.conditioner, nn.Module):
            raise TypeError(
                f"conditioner(inputs, outputs, context) returned a "
                f"{type(self.conditioner).__name__}, expected an nn.Module"
            )

    def extra_repr(self) -> str:
        """The elementwise map, for `print`."""
        return f"elementwise={self.elementwise}"

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, *event) and log |det dx/dz| (B,)."""
        kept, changed = self.parts.split(z)
        changed = changed.clone() if self.lent else changed
        x, log_slope = self.elementwise.forward(changed, self._predict(kept, changed, context))
        return self.parts.join(kept, x, log_slope)

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, *event) and log |det dz/dx| (B,)."""
        kept, changed = self.parts.split(x)
        changed = changed.clone() if self.lent else changed
        z, log_slope = self.elementwise.inverse(changed, self._predict(kept, changed, context))
        return self.parts.join(kept, z, log_slope)

    def _predict(self, kept: Tensor, changed: Tensor, context: Tensor | None) -> Tensor:
        """(B, P, *changed)."""
        conditioner = self.conditioner
        if is_foreign(conditioner):
            kept, context = copies((kept, context))  # it may write into them
        raw: Tensor = conditioner(kept, context)
        n = self.elementwise.parameters
        if raw.shape[1:] != self.outputs or raw.shape[0] != kept.shape[0]:
            raise ValueError(
                f"conditioner returned the shape {tuple(raw.shape)}, expected "
                f"{(kept.shape[0], *self.outputs)}: {n} parameters for each of the dimensions "
                f"{tuple(changed.shape[1:])} that change, the first of all of them first"
            )
        return raw.reshape(kept.shape[0], n, *changed.shape[1:])


def _by_first_dimension(mask: Tensor) -> bool:
    """Whether the mask (D, ...) is the same along all further dimensions."""
    rows = mask.flatten(1) if mask.ndim > 1 else mask[:, None]
    return bool((rows == rows[:, :1]).all())


class _Halves(nn.Module):
    """Divides samples along their first dimension, and puts them together again."""

    order: Tensor
    back: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        kept = mask.flatten(1)[:, 0] if mask.ndim > 1 else mask
        order = torch.cat([kept.nonzero(), (~kept).nonzero()]).flatten()
        self.n_kept, n = int(kept.sum()), len(kept)
        rest = tuple(mask.shape[1:])
        self.shapes = (self.n_kept, *rest), (n - self.n_kept, *rest)
        self.register_buffer("order", order)  # saved: a random mask belongs to what was trained
        self.register_buffer("back", order.argsort())
        self._find_pieces()
        self.order, self.back = torch.as_tensor(order), torch.as_tensor(self.back)

    def _find_pieces(self) -> None:
        """Whether both parts are in one piece each, where slices are enough."""
        if self.order.is_meta:
            return  # what it was built with stays until values come
        order, n = self.order.tolist(), len(self.order)
        changed_first = order == [*range(n - self.n_kept, n), *range(n - self.n_kept)]
        self.n_first = n - self.n_kept if changed_first else 0  # entries before the kept ones
        self.in_pieces = changed_first or order == list(range(n))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_pieces()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept and what changes."""
        if self.n_first:
            changed, kept = x.split([self.n_first, self.n_kept], 1)
            return kept, changed
        if not self.in_pieces:
            x = x.index_select(1, self.order)
        return x[:, : self.n_kept], x[:, self.n_kept :]

    def join(self, kept: Tensor, changed: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """The sample, and its log-determinant (B,)."""
        log_det = log_slope.flatten(1).sum(1)
        if self.n_first:
            return torch.cat([changed, kept], 1), log_det
        x = torch.cat([kept, changed], 1)
        return (x if self.in_pieces else x.index_select(1, self.back)), log_det


class _Pixels(nn.Module):
    """Divides samples by a mask of any kind: both parts have the full shape, zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.as_tensor(mask))
        self.shapes = tuple(mask.shape), tuple(mask.shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept, with zeros elsewhere, and the whole sample."""
        return torch.where(self.mask, x, 0.0), x

    def join(self, kept: Tensor, changed: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """The sample, and its log-determinant (B,)."""
        x = torch.where(self.mask, kept, changed)
        return x, torch.where(self.mask, 0.0, log_slope).flatten(1).sum(1)
