"""Tables of numbers as training data: split by seed, standardised, and checked.

A likelihood is unbounded when a column is constant or a combination of others, and NaN when a cell
is; so these are errors here. Scores of standardised data are not scores of the data:
`Table.log_det_standardisation` is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnf.checks import check_dense, check_values
from cnf.data.gaussian import gaussian_log_prob
from cnf.data.read import as_matrix, check_finite, read_table

__all__ = ["Table", "gaussian_log_prob", "read_table", "sklearn_table", "split_table"]

SKLEARN_TABLES = ("breast_cancer", "diabetes", "iris", "wine")


@dataclass(frozen=True)
class Table:
    """Rows for training, validation and test, standardised by the training rows.

        z = (x - mean) / std,    log p_x(x) = log p_z(z) + log_det_standardisation

    Args:
        train: standardised rows (N, D).
        val: standardised rows (N', D).
        test: standardised rows (N'', D).
        mean: mean of each column over the training rows (D,), float64.
        std: standard deviation of each column over the training rows, dividing by N (D,), float64.
        names: the names of the columns.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    mean: Tensor
    std: Tensor
    names: tuple[str, ...]

    @property
    def log_det_standardisation(self) -> float:
        """Log |det dz/dx| = -sum(log std): log p(z) plus this is log p(x), in the data's units."""
        return -float(self.std.log().sum())

    def standardise(self, x: Tensor) -> Tensor:
        """Map rows x (..., D) to z = (x - mean) / std, in the dtype of `train`."""
        return ((x.to(self.mean) - self.mean) / self.std).to(self.train)

    def restore(self, z: Tensor) -> Tensor:
        """Map standardised rows z (..., D) back to x = mean + std z, in float64."""
        return self.mean + self.std * z.to(self.mean)


def split_table(
    data: NDArray[Any] | Tensor,
    *,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.1,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
    drop_constant: bool = False,
) -> Table:
    """Shuffle the rows of a table, split them in three, and standardise all by the training rows.

    Args:
        data: table (N, D) of real numbers.
        seed: seed of the shuffle. The same seed and N give the same split.
        val: fraction of the rows for validation, rounded to whole rows.
        test: fraction of the rows for test.
        dtype: dtype of the standardised rows.
        names: names of the columns; x0, x1, ... if None.
        drop_constant: leave constant columns out instead of raising.

    Returns:
        The table.

    Raises:
        ValueError: if data is not a real matrix, has NaN or infinity, has columns constant over the
            training rows or out of range after standardization, or too few rows; if a fraction is
            outside [0, 1) or leaves no rows for training; if names do not fit.
        TypeError: if dtype is not a floating-point type, or data is a sparse or meta tensor.

    Example:
        >>> table = split_table(np.random.default_rng(0).normal(5, 2, (100, 3)))
        >>> table.train.shape, table.val.shape, table.test.shape
        (torch.Size([80, 3]), torch.Size([10, 3]), torch.Size([10, 3]))
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}; use torch.float32")
    x = torch.from_numpy(as_matrix(as_array(data), "data"))  # (N, D)
    check_finite(x, "data")
    labels = column_names(names, x.shape[1])
    sizes = split_sizes(len(x), val, test)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")
    train = x[rows[: sizes[0]]]
    constant = train.amax(0) == train.amin(0)  # (D,)
    if constant.any() and (not drop_constant or constant.all()):
        found = [f"{i} ({labels[i]!r})" for i in constant.nonzero().flatten().tolist()]
        remedy = (
            "no column is left to model"
            if constant.all()
            else "a density needs variation: pass drop_constant=True"
        )
        raise ValueError(
            f"data has constant columns among the training rows: {', '.join(found)}; {remedy}"
        )
    x, train = x[:, ~constant], train[:, ~constant]
    kept = tuple(label for label, skip in zip(labels, constant.tolist(), strict=True) if not skip)
    # Powers of two, by which all is exact, keep sums and squares of 1e308 or 1e-200 in range.
    scale = torch.from_numpy(
        np.ldexp(1.0, train.abs().amax(0).frexp().exponent.clamp(-900, 900).numpy())
    )
    x, train = x[rows] / scale, train / scale
    mean, std = train.mean(0), train.std(0, correction=0)
    z = ((x - mean) / std).to(dtype)
    check_standardized(z, kept)
    mean, std = scale * mean, scale * std
    first, second = sizes[0], sizes[0] + sizes[1]
    return Table(z[:first], z[first:second], z[second:], mean, std, kept)


def as_array(data: NDArray[Any] | Tensor) -> NDArray[Any]:
    """A tensor as an array; what is none stays what it is."""
    if not isinstance(data, Tensor):
        return data
    check_dense(data, "data")
    check_values(data, "data")
    x = data.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()  # NumPy has no bfloat16


def check_standardized(z: Tensor, names: Sequence[str]) -> None:
    """Refuse rows z (N, D) that standardization took out of range."""
    bad = (~z.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        found = ", ".join(f"{i} ({names[i]!r})" for i in bad)
        raise ValueError(
            f"data has columns that cannot be standardized in {z.dtype}: {found}; their training "
            "rows vary too little beside the other rows, or beside their own size: rescale these "
            "columns, take their logarithm, or leave them out"
        )


def split_sizes(n: int, val: float, test: float) -> list[int]:
    """The numbers of training, validation and test rows of n."""
    for name, fraction in (("val", val), ("test", test)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be a fraction in [0, 1), got {fraction}")
    if val + test >= 1:
        raise ValueError(f"val + test must be below 1, got {val} + {test}; leave rows for training")
    sizes = [n - round(n * val) - round(n * test), round(n * val), round(n * test)]
    if sizes[0] < 2 or any(
        f > 0 and size == 0 for f, size in zip((val, test), sizes[1:], strict=True)
    ):
        raise ValueError(
            f"data has {n} rows, too few: "
            f"val={val} and test={test} leave {sizes[0]} / {sizes[1]} / {sizes[2]} rows "
            "for training, validation and test; bring more rows, or set a fraction to 0"
        )
    return sizes


def column_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names of `count` columns, x0, x1, ... by default."""
    if names is None:
        return tuple(f"x{i}" for i in range(count))
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names must hold one name for each of {count} columns, got {names!r}")
    return tuple(names)


def sklearn_table(name: str = "breast_cancer") -> NDArray[np.float64]:
    """A table (N, D) that ships inside scikit-learn, without its labels: no download.

    Args:
        name: "breast_cancer" (569, 30), "diabetes" (442, 10), "iris" (150, 4) or "wine" (178, 13).

    Returns:
        The table, in float64.

    Raises:
        ValueError: if name is none of these.
        ImportError: if scikit-learn is not installed.
    """
    if name not in SKLEARN_TABLES:
        raise ValueError(f"name must be one of {', '.join(SKLEARN_TABLES)}, got {name!r}")
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            'this table is inside scikit-learn; pip install "cnf[examples]"'
        ) from error
    return as_matrix(getattr(datasets, f"load_{name}")().data, name)
