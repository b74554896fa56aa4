"""Linear maps: by a matrix of all dimensions, of channels, or diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnf.checks import exporting
from cnf.transforms.amortized import Amortized
from cnf.transforms.base import Choices, check_choices
from cnf.transforms.discrete import DiscreteTransform, Formula
from cnf.transforms.inputs import check_event, check_like, check_vector
from cnf.transforms.matrices import FullMatrix, LUMatrix, Matrix, QRMatrix, make_matrix

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conv1x1", "Diagonal", "LULinear", "Linear", "QRLinear"]


class _MatrixTransform(DiscreteTransform):
    """x = A z + b for each of the P vectors z of n dimensions in a sample (n, P)."""

    def __init__(self, features: int | Sequence[int], matrix: Callable[[int], Matrix]) -> None:
        super().__init__(features)
        n = self._size()
        self.matrix = matrix(n)
        self.bias = nn.Parameter(torch.zeros(n))

    def _size(self) -> int:
        """n: all dimensions, unless a kind says otherwise."""
        return self.dims

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """A z + b and log |det A| for each vector."""
        return self._multiply(z), self._log_det().expand(z.shape[0])

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """A^-1 (x - b) and -log |det A| for each vector."""
        return self._solve(x), -self._log_det().expand(x.shape[0])

    def forward(
        self, z: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """x = f(z), without the log-determinant."""
        check_choices(choices)
        return self._on_batch(_alone(self._multiply), z, context, self.base_shape)[0]

    def inverse(
        self, x: Tensor, context: Tensor | None = None, **choices: Unpack[Choices]
    ) -> Tensor:
        """z = f^-1(x), without the log-determinant."""
        check_choices(choices)
        return self._on_batch(_alone(self._solve), x, context, self.event_shape)[0]

    def _multiply(self, z: Tensor) -> Tensor:
        h = self._act(self.matrix.multiply, self._vectors(z)) + self.bias.unsqueeze(-1)
        return h.reshape(z.shape)

    def _solve(self, x: Tensor) -> Tensor:
        h = self._vectors(x) - self.bias.unsqueeze(-1)
        return self._act(self.matrix.solve, h).reshape(x.shape)

    def _vectors(self, x: Tensor) -> Tensor:
        """A sample as vectors (B, n, P)."""
        return x.reshape(x.shape[0], self.matrix.size, self.dims // self.matrix.size)

    def _act(self, operation: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """A or A^-1 times each vector of h (B, n, P).

        One product with the matrix is faster than one with each of its factors, 1.5 times in
        training at B = 1000, n = 43, and as accurate; for few vectors multiplying out costs more.
        """
        n = self.matrix.size
        single = h.shape[2] == 1
        if single and not exporting() and h.shape[0] <= 2 * n:
            return operation(h.squeeze(2)).unsqueeze(2)
        transposed = operation(torch.eye(n, dtype=h.dtype, device=h.device))
        if single:
            return (h.squeeze(2) @ transposed).unsqueeze(2)
        return torch.einsum("bjp,ji->bip", h, transposed)

    def _log_det(self) -> Tensor:
        return self.matrix.log_det() * (self.dims // self.matrix.size)


def _alone(value: Callable[[Tensor], Tensor]) -> Formula:
    """A formula of the value, whose log-determinant nobody reads."""
    return lambda x, _: (value(x), x.new_zeros(x.shape[0]))


class Linear(_MatrixTransform):
    """A linear map of all dimensions by a full matrix: the reference for the others.

        x = A z + b,    log |det dx/dz| = log |det A|

    The log-determinant costs O(D^3), and nothing keeps A invertible; `LULinear` and `QRLinear`
    have neither fault. A is orthogonal and random at first.

    Args:
        features: dimensions of a sample, D, or its shape, whose D numbers are taken in a row.

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        ValueError: in a call that needs A^-1 or det A, a singular matrix.

    Example:
        >>> f = Linear(3)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 3))
        >>> bool(log_det.abs().max() < 1e-5)  # A is orthogonal
        True
    """

    def __init__(self, features: int | Sequence[int]) -> None:
        super().__init__(features, FullMatrix)


class LULinear(_MatrixTransform):
    """A linear map of all dimensions by triangular factors, which is never singular.

        x = P L U z + b,    log |det dx/dz| = sum_i log U_ii,    U_ii > 0.001

    P is a fixed random permutation, L unit lower triangular, U upper triangular; L = U = I at
    first. The log-determinant costs O(D), and each direction O(D^2) a sample. `forward` is the
    cheaper one: where it is x -> z that counts, as in training by likelihood, use
    `cnf.Inverse(LULinear(D))`.

    Args:
        features: dimensions of a sample, D, or its shape, whose D numbers are taken in a row.
        generator: source of P.

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Reference: Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> f = LULinear(3)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 3))
        >>> x.shape, log_det.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    def __init__(
        self, features: int | Sequence[int], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(features, lambda n: LUMatrix(n, generator))


class QRLinear(_MatrixTransform):
    """A linear map of all dimensions by reflections and a triangular factor, never singular.

        x = Q R z + b,    log |det dx/dz| = sum_i log R_ii,    R_ii > 0.001

    Q is a product of Householder reflections, R upper triangular; at first R = I and Q is random.
    The log-determinant costs O(D), and each direction O(D^2) a sample.

    Args:
        features: dimensions of a sample, D, or its shape, whose D numbers are taken in a row.
        reflections: their number, at most D; None for D.

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        ValueError: a number of reflections that is not between 1 and D.

    Reference: Tomczak and Welling, arXiv 1611.09630; Hoogeboom et al., arXiv 1901.11137.

    Example:
        >>> f = QRLinear(3, reflections=2)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 3))
        >>> x.shape, log_det.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    def __init__(self, features: int | Sequence[int], reflections: int | None = None) -> None:
        super().__init__(features, lambda n: QRMatrix(n, reflections))


class Conv1x1(_MatrixTransform):
    """Glow's invertible 1x1 convolution: one matrix acts on the channels of every pixel.

        x_hw = A z_hw + b,    log |det dx/dz| = H W log |det A|

    Glow multiplies in the direction x -> z: `cnf.Inverse(Conv1x1((C, H, W)))`.

    Args:
        features: shape of a sample, (C, H, W), or D for a vector, all of whose dimensions are
            channels.
        parametrisation: of A: "lu" as in `LULinear`, "qr" as in `QRLinear`, "full" as in `Linear`.
        generator: source of the permutation of "lu".

    Shapes:
        z, x (*batch, *event); log_det (*batch,).

    Raises:
        ValueError: an unknown parametrisation; in a call, a full matrix that is singular.

    Reference: Kingma and Dhariwal, arXiv 1807.03039.

    Example:
        >>> f = Conv1x1((3, 8, 8))
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 3, 8, 8))
        >>> x.shape, log_det.shape
        (torch.Size([10, 3, 8, 8]), torch.Size([10]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        parametrisation: str = "lu",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features, lambda n: make_matrix(parametrisation, n, generator))

    def _size(self) -> int:
        """The number of channels."""
        check_vector(self.event_shape)
        return self.event_shape[0]


class Diagonal(DiscreteTransform):
    """A scale and a shift of every number of a sample, which context may choose.

        x = exp(s) z + b,    log |det dx/dz| = sum s

    s and b are parameters, zero at first, or affine in the context, with small random slopes.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        context: number of context features, 0 for none.

    Shapes:
        z, x (*batch, *event); context (*batch, C) or broadcastable to it; log_det (*batch,).

    Example:
        >>> f = Diagonal(3, context=2)
        >>> x, log_det = f.forward_and_log_det(torch.randn(10, 3), torch.randn(10, 2))
        >>> x.shape, log_det.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__(features, context)
        initial = {name: torch.zeros(self.event_shape) for name in ("log_scale", "shift")}
        self.amortized = Amortized(initial, context)

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """exp(s) z + b and sum s."""
        s, b = self.amortized(context)
        return s.exp() * z + b, self._sum(s).expand(z.shape[0])

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """exp(-s) (x - b) and -sum s."""
        s, b = self.amortized(context)
        return (-s).exp() * (x - b), -self._sum(s).expand(x.shape[0])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set b and exp(s) to the mean and standard deviation of data x (*batch, *event).

        Then z has mean 0 and deviation 1 in every dimension, from which training goes on; where
        context chooses s and b, that is so for context zero.

        Raises:
            TypeError: x of another dtype.
            ValueError: x of a wrong shape, fewer than two samples, or values that are constant or
                not finite.
        """
        check_event(x, self.event_shape, self)
        check_like(x, self)
        x = x.reshape(-1, *self.event_shape)
        std, mean = torch.std_mean(x, 0, correction=0) if len(x) else (x.sum(0), x.sum(0))
        if not bool(((std > 0) & std.isfinite() & mean.isfinite()).all()):
            raise ValueError(
                f"x of shape {tuple(x.shape)} has dimensions that are constant or not finite, or "
                "fewer than two samples; leave such dimensions out, or initialize by more data"
            )
        self.amortized.set(log_scale=std.log(), shift=mean)

    def _sum(self, s: Tensor) -> Tensor:
        """Over the numbers of a sample, for s (*event), or (B, *event) with context."""
        return s.sum(tuple(range(-len(self.event_shape), 0)))
