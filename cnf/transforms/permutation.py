"""`Permutation`: a fixed order of the dimensions, or channels, of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.checks import check_choice
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.inputs import check_vector

__all__ = ["Permutation"]


class Permutation(DiscreteTransform):
    """A fixed permutation of the first dimension of a sample: of channels, for images.

        x_i = z_p(i),    log |det dx/dz| = 0

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        permutation: "reverse", "random", or the indices p(0), ..., p(D - 1).
        generator: source of a random permutation.

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        TypeError: indices that are not a sequence.
        ValueError: an unknown name, or indices that are no permutation of 0 ... D - 1.

    Example:
        >>> f = Permutation(3, [2, 0, 1])
        >>> f.forward(torch.tensor([[10.0, 11.0, 12.0]]))
        tensor([[12., 10., 11.]])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        permutation: str | Sequence[int] | Tensor = "reverse",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features)
        check_vector(self.event_shape)
        order = _order(permutation, self.event_shape[0], generator)
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", torch.argsort(order))

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and zero (B,)."""
        return z.index_select(1, self.order), z.new_zeros(z.shape[0])

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and zero (B,)."""
        return x.index_select(1, self.inverse_order), x.new_zeros(x.shape[0])


def _order(
    permutation: str | Sequence[int] | Tensor, n: int, generator: torch.Generator | None
) -> Tensor:
    """The indices (n,) of a permutation, checked."""
    if isinstance(permutation, str):
        check_choice(
            "permutation", permutation, ("reverse", "random"), ", or a sequence of indices"
        )
        if permutation == "reverse":
            return torch.arange(n - 1, -1, -1)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=device).cpu()
        return torch.as_tensor(order)  # on the default device, as parameters are
    if not isinstance(permutation, (Sequence, Tensor)):
        raise TypeError(
            f'permutation must be "reverse", "random" or a sequence of {n} indices, got '
            f"{type(permutation).__name__}"
        )
    indices = permutation.tolist() if isinstance(permutation, Tensor) else list(permutation)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices) or (
        sorted(indices) != list(range(n))
    ):
        raise ValueError(
            f"permutation={indices} is no permutation of the {n} indices 0 ... {n - 1}; it must "
            "have each of them once"
        )
    return torch.tensor(indices)
