"""Autoregressive transforms: every dimension is mapped elementwise, given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.checks import check_choice
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.elementwise import Elementwise, as_elementwise
from cnf.transforms.made import MADE, Walk
from cnf.user_modules import is_foreign

__all__ = ["MaskedAutoregressive"]


class MaskedAutoregressive(DiscreteTransform):
    """A masked autoregressive layer (MAF): each dimension is mapped given the data before it.

        z_i = g^-1(x_i; p_i(x_1, ..., x_{i-1}, context)),    affine: z_i = (x_i - m_i) / exp(s_i)

    `inverse` (x to z, so the density of data) is one pass of the network. `forward` (sampling)
    goes through the D dimensions one by one, and computes every hidden unit once: the arithmetic
    of one pass, in D small steps. `cnf.Inverse` of it is the inverse autoregressive flow (IAF),
    where sampling is the one pass. It is the identity at first.

    Args:
        features: number of dimensions D.
        elementwise: "affine", "additive", "spline", or an `Elementwise`.
        hidden: widths of the hidden layers of the network, a `MADE`.
        context: number of context features, 0 for none.
        ordering: which dimension comes first: "forward", "reverse", "random", or a sequence of the
            indices 0, ..., D - 1.
        activation: by name or as a module.
        residual: whether the network has residual layers.
        generator: source of a random ordering.

    Shapes:
        z, x (*batch, D); context (*batch, C) or broadcastable to it; log_det (*batch,).

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: a sample that is no vector, an ordering that is no permutation, an unknown name.

    Reference: Papamakarios et al., arXiv 1705.07057; Kingma et al., arXiv 1606.04934.

    Example:
        >>> f = MaskedAutoregressive(5, "spline", hidden=(32,), context=3)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 5), torch.randn(10, 3))
        >>> x.shape, log_det.shape
        (torch.Size([10, 5]), torch.Size([10]))
    """

    order: Tensor | None
    back: Tensor | None

    def __init__(
        self,
        features: int | Sequence[int],
        elementwise: str | Elementwise = "affine",
        *,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        ordering: str | Sequence[int] = "forward",
        activation: str | nn.Module = "relu",
        residual: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features, context)
        if len(self.event_shape) != 1:
            raise ValueError(f"features={features!r} must be a number of dimensions D")
        self.elementwise = as_elementwise(elementwise)
        self.lent = is_foreign(self.elementwise)  # whether it may write into what it is given
        order = _order(ordering, self.dims, generator)
        natural = isinstance(ordering, str) and ordering == "forward"
        self.register_buffer("order", None if natural else order)
        self.register_buffer("back", None if natural else order.argsort())
        self.conditioner = MADE(
            self.dims,
            self.elementwise.parameters,
            hidden,
            context=context,
            activation=activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        """The elementwise map, for `print`."""
        return f"elementwise={self.elementwise}"

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, D) and log |det dz/dx| (B,), in one pass."""
        x = _reordered(x, self.order)
        parameters = self.conditioner(x, context)
        x = x.clone() if self.lent else x
        z, log_slope = self.elementwise.inverse(x, parameters)
        return _reordered(z, self.back), log_slope.sum(1)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, D) and log |det dx/dz| (B,), in D steps."""
        z = _reordered(z, self.order)
        z = z.clone() if self.lent else z
        walk = Walk(self.conditioner, context, z[:, :0])
        log_slopes = []
        for i in range(self.dims):
            parameters = walk.parameters().unsqueeze(-1)  # (B, P, 1)
            x_i, log_slope = self.elementwise.forward(z[:, i : i + 1], parameters)
            walk.append(x_i)
            log_slopes.append(log_slope)
        return _reordered(walk.known[0], self.back), torch.cat(log_slopes, 1).sum(1)


def _order(ordering: str | Sequence[int], dims: int, generator: torch.Generator | None) -> Tensor:
    """The dimensions in the order in which they are met (D,)."""
    if isinstance(ordering, str):
        check_choice("ordering", ordering, ["forward", "reverse", "random"], ", or indices")
        if ordering == "random":
            device = "cpu" if generator is None else generator.device
            order = torch.randperm(dims, generator=generator, device=device).cpu()
            return torch.as_tensor(order)  # on the default device, as parameters are
        order = torch.arange(dims)
        return order.flip(0) if ordering == "reverse" else order
    given = ordering.tolist() if isinstance(ordering, Tensor) else ordering
    whole = isinstance(given, Sequence) and all(type(i) is int for i in given)
    if not whole or sorted(given) != list(range(dims)):
        raise ValueError(
            f"ordering={given!r} must be 'forward', 'reverse', 'random', or hold each of the "
            f"integers 0, ..., {dims - 1} once"
        )
    return torch.tensor(given)


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)
