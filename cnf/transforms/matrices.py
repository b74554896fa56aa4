"""Invertible matrices by their parameters: full, triangular factors, reflections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf.checks import check_choice, check_count, exporting, tracing
from cnf.transforms.permutation import Permutation

__all__ = ["FullMatrix", "LUMatrix", "Matrix", "QRMatrix", "make_matrix"]

_FLOOR = 1e-3  # of a factor's diagonal
_OFFSET = math.log(math.expm1(1 - _FLOOR))  # where softplus(offset) + floor = 1


class Matrix(nn.Module, ABC):
    """An invertible matrix A (n, n), applied to vectors given as rows.

    Args:
        size: n.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """A v for each row v of (N, n)."""

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """A^-1 v for each row v of (N, n)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """log |det A| ()."""

    def extra_repr(self) -> str:
        """The size."""
        return f"{self.size}"


class FullMatrix(Matrix):
    """A matrix of n^2 free entries, orthogonal and random at first.

    Under torch.func it is inverted and factored, which costs more. There the derivatives of
    `torch.linalg.solve` and `slogdet` may call `torch.linalg.lu_solve` with a batch of factors that
    broadcasts, as in `vmap(jacfwd(...))`, which is wrong in PyTorch 2.13 on CPU.

    Args:
        size: n.

    Raises:
        ValueError: in `solve` and `log_det`, once the matrix is singular.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.weight = nn.Parameter(torch.empty(size, size))
        nn.init.orthogonal_(self.weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """A v for each row v of (N, n)."""
        return F.linear(rows, self.weight)

    def solve(self, rows: Tensor) -> Tensor:
        """A^-1 v for each row v of (N, n)."""
        try:
            if tracing():
                return F.linear(rows, torch.linalg.inv(self.weight))
            return torch.linalg.solve(self.weight.T, rows, left=False)
        except torch.linalg.LinAlgError:
            raise self._singular() from None

    def log_det(self) -> Tensor:
        """log |det A| ()."""
        if tracing():
            return torch.linalg.lu_factor_ex(self.weight).LU.diagonal().abs().log().sum()
        value = torch.linalg.slogdet(self.weight).logabsdet
        if not (value.is_meta or value.isfinite()):
            raise self._singular()
        return value

    def _singular(self) -> ValueError:
        kind = "singular" if self.weight.isfinite().all() else "not finite"
        return ValueError(
            f"the weight ({self.size}, {self.size}) is {kind}, so the map has no inverse; use a "
            "smaller learning rate, or LULinear, whose matrix cannot become singular"
        )


class LUMatrix(Matrix):
    """A = P L U: a fixed random permutation, a unit lower and an upper triangular factor.

        L = I + strictly lower part of F,    U = strictly upper part of F + diag d
        d_i = softplus(F_ii + const) + 0.001,    log |det A| = sum_i log d_i

    It is P at first: F = 0 stands for d = 1. d > 0.001, so that A is never singular.

    Args:
        size: n.
        generator: source of P.
    """

    def __init__(self, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(size)
        self.factors = nn.Parameter(torch.zeros(size, size))
        self.permutation = Permutation(size, "random", generator=generator)

    def multiply(self, rows: Tensor) -> Tensor:
        """A v for each row v of (N, n)."""
        lower, upper = self._lower(), _upper(self.factors)
        return self.permutation.to_data(F.linear(F.linear(rows, upper), lower), None)[0]

    def solve(self, rows: Tensor) -> Tensor:
        """A^-1 v for each row v of (N, n)."""
        rows, _ = self.permutation.to_base(rows, None)
        lower, upper = self._lower(), _upper(self.factors)
        rows = _solve_triangular(lower.T, rows, upper=True, unit=True)
        return _solve_triangular(upper.T, rows, upper=False)

    def log_det(self) -> Tensor:
        """log |det A| ()."""
        return _positive_diagonal(self.factors).log().sum()

    def _lower(self) -> Tensor:
        return self.factors.tril(-1) + _eye_like(self.factors)


class QRMatrix(Matrix):
    """A = Q R: a product of Householder reflections, and an upper triangular factor.

        Q = H_1 ... H_k,    H_i = I - 2 v_i v_i^T / |v_i|^2
        v_i = e_i + strictly lower part of column i of F
        R = strictly upper part of F + diag d,    d_i = softplus(F_ii + const) + 0.001

    |v_i| >= 1 and d > 0.001, so that A is never singular. At first R = I and Q is random.

    Args:
        size: n.
        reflections: k, at most n; None for n, which reaches every Q of determinant (-1)^n but a set
            of measure zero, the limits of those.

    Raises:
        ValueError: a number of reflections that is not between 1 and n.
    """

    def __init__(self, size: int, reflections: int | None = None) -> None:
        super().__init__(size)
        reflections = size if reflections is None else reflections
        check_count("reflections", reflections)
        if reflections > size:
            raise ValueError(
                f"reflections={reflections} must be at most the number of dimensions, {size}"
            )
        self.reflections = reflections
        # Those that take a Gaussian matrix to R: of all directions, and |F_ij| <= 1.
        free = torch.randn(size, size)
        free = free if free.is_meta else torch.geqrf(free).a  # of which torch has none on meta
        self.factors = nn.Parameter(free.tril(-1))

    def multiply(self, rows: Tensor) -> Tensor:
        """A v for each row v of (N, n)."""
        rows = F.linear(rows, _upper(self.factors))
        v, s = self._reflections()
        inner = _solve_triangular(s.T, rows @ v, upper=False)
        return rows - F.linear(inner, v)

    def solve(self, rows: Tensor) -> Tensor:
        """A^-1 v for each row v of (N, n)."""
        v, s = self._reflections()
        inner = _solve_triangular(s, rows @ v, upper=True)
        rows = rows - F.linear(inner, v)
        return _solve_triangular(_upper(self.factors).T, rows, upper=False)

    def log_det(self) -> Tensor:
        """log |det A| ()."""
        return _positive_diagonal(self.factors).log().sum()

    def _reflections(self) -> tuple[Tensor, Tensor]:
        """V (n, k) of columns v_i, and S (k, k), upper triangular, with Q = I - V S^-1 V^T."""
        v = (self.factors.tril(-1) + _eye_like(self.factors))[:, : self.reflections]
        gram = v.T @ v
        return v, gram.triu() - torch.diag(gram.diagonal() / 2)

    def extra_repr(self) -> str:
        """The size and the number of reflections."""
        return f"{self.size}, reflections={self.reflections}"


def make_matrix(kind: str, size: int, generator: torch.Generator | None = None) -> Matrix:
    """A matrix by the name of its parameters.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> make_matrix("lu", 3)
        LUMatrix(
          3
          (permutation): Permutation()
        )
    """
    check_choice("parametrisation", kind, ("lu", "qr", "full"))
    if kind == "lu":
        return LUMatrix(size, generator)
    return QRMatrix(size) if kind == "qr" else FullMatrix(size)


def _upper(factors: Tensor) -> Tensor:
    """The upper triangular factor, with a positive diagonal."""
    return factors.triu(1) + torch.diag(_positive_diagonal(factors))


def _solve_triangular(t: Tensor, rows: Tensor, *, upper: bool, unit: bool = False) -> Tensor:
    """X with X T = rows, for T (n, n) triangular, zero elsewhere, and rows (N, n)."""
    if not (exporting() and torch.onnx.is_in_onnx_export()):
        return torch.linalg.solve_triangular(t, rows, upper=upper, left=False, unitriangular=unit)
    columns = {}  # ONNX has no such operation: by substitution
    for j in range(len(t)) if upper else reversed(range(len(t))):
        columns[j] = rows[:, j : j + 1] / t[j, j]
        rows = rows - columns[j] * t[j]
    return torch.cat([columns[j] for j in range(len(t))], 1)


def _positive_diagonal(factors: Tensor) -> Tensor:
    return F.softplus(factors.diagonal() + _OFFSET) + _FLOOR


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
