"""Where the batches come from: the rows of tensors in random order, or a function that draws them.

A batch is a tensor, or a tuple of tensors with as many rows, such as samples and their conditions.

All randomness comes from one generator, whose state belongs to the checkpoint with the order of the
epoch and the place in it. A resumed run continues in the middle of an epoch with the batch that
would have come next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.checks import check_dense, check_values

__all__ = [
    "AugmentedBatches",
    "Batch",
    "Batches",
    "DrawnBatches",
    "NoBatches",
    "ShuffledRows",
    "make_batches",
]

Batch = Tensor | tuple[Tensor, ...]
"""What an objective is called with: objective(batch), or objective(*batch)."""

Draw = Callable[[int, torch.Generator], Batch]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches(Protocol):
    """An endless source of batches that can be stopped and continued.

    All randomness of a source comes from a generator of its own.
    """

    generator: torch.Generator

    def next(self) -> Batch:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that decides the following batches."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        ...

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as plain values."""
        ...


class ShuffledRows:
    """Rows of a tensor, or of several, each once per epoch, in batches of equal size.

    A batch that begins at the end of one epoch is filled from the beginning of the next.

    Shapes:
        rows: (N, *event), or a tuple of such; a batch: (B, *event) with B = min(batch_size, N).

    Example:
        >>> batches = ShuffledRows(torch.arange(4.0), batch_size=2, seed=0)
        >>> torch.cat([batches.next(), batches.next()]).sort().values.tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, rows: Batch, *, batch_size: int, seed: int) -> None:
        self.columns = _checked_columns(rows)
        self.single = isinstance(rows, Tensor)
        self.count = len(self.columns[0])
        self.batch_size = min(batch_size, self.count)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = self._shuffled()  # (N,)
        self.cursor = 0

    def next(self) -> Batch:
        """The next batch, (B, *event), or a tuple of such, on the device of the rows."""
        index = self.order[self.cursor : self.cursor + self.batch_size]
        self.cursor += len(index)
        if lacking := self.batch_size - len(index):
            self.order = self._shuffled()
            index = torch.cat([index, self.order[:lacking]])
            self.cursor = lacking
        parts = tuple(rows[index.to(rows.device)] for rows in self.columns)
        return parts[0] if self.single else parts

    def _shuffled(self) -> Tensor:
        return torch.randperm(self.count, generator=self.generator, device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """The generator, the order of this epoch and the place in it."""
        return {"generator": self.generator.get_state(), "order": self.order, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.generator.set_state(state["generator"])
        self.order, self.cursor = state["order"], state["cursor"]

    def describe(self) -> dict[str, Any]:
        """The shape and type of the data, and the size of a batch."""
        return {
            "train": ", ".join(f"{rows.dtype} {tuple(rows.shape)}" for rows in self.columns),
            "batch_size": self.batch_size,
        }


class DrawnBatches:
    """Batches that a function draws: `draw(batch_size, generator)` returns (batch_size, *event),
    or a tuple of such.
    """

    def __init__(self, draw: Draw, *, batch_size: int, seed: int) -> None:
        self.draw = draw
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Batch:
        """A new batch, (B, *event), or a tuple of such."""
        batch = self.draw(self.batch_size, self.generator)
        parts = batch if isinstance(batch, tuple) else (batch,)
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(
                    "train(batch_size, generator) must return a Tensor or a tuple of Tensors, got "
                    f"{type(part).__name__}"
                )
            if part.dim() == 0 or len(part) != self.batch_size:
                raise ValueError(
                    f"train(batch_size, generator) must return {self.batch_size} rows, "
                    f"got shape {tuple(part.shape)}"
                )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.generator.set_state(state["generator"])

    def describe(self) -> dict[str, Any]:
        """The size of a batch."""
        return {"train": "function", "batch_size": self.batch_size}


class NoBatches:
    """No data at all, for an objective that draws its own samples: it is called with nothing."""

    def __init__(self, *, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Batch:
        """Nothing."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what the objective draws is from PyTorch's global generators."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def describe(self) -> dict[str, Any]:
        """That there is no data."""
        return {"train": "none"}


class AugmentedBatches:
    """Batches of another source, changed by a function: `augment(batch, generator)` -> batch.

    Of a tuple only the first tensor is changed: the samples, not their conditions. The generator
    is that of the source, so that its state belongs to the checkpoint.
    """

    def __init__(self, batches: Batches, augment: Augment) -> None:
        self.batches = batches
        self.augment = augment
        self.generator = batches.generator

    def next(self) -> Batch:
        """The next batch, changed, (B, *event), or a tuple of such."""
        batch = self.batches.next()
        if isinstance(batch, Tensor):
            return self._changed(batch)
        return (self._changed(batch[0]), *batch[1:])

    def _changed(self, batch: Tensor) -> Tensor:
        changed = self.augment(batch, self.generator)
        if not isinstance(changed, Tensor):
            raise TypeError(
                f"augment(batch, generator) must return a Tensor, got {type(changed).__name__}"
            )
        if changed.shape[:1] != batch.shape[:1]:
            raise ValueError(
                f"augment(batch, generator) must return {len(batch)} rows, as it was given, "
                f"got shape {tuple(changed.shape)}"
            )
        return changed

    def state_dict(self) -> dict[str, Any]:
        """That of the source."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.batches.load_state_dict(state)

    def describe(self) -> dict[str, Any]:
        """What the source says, and that it is changed."""
        return {**self.batches.describe(), "augment": "function"}


def make_batches(
    train: Batch | Draw | None, *, batch_size: int | None, seed: int, augment: Augment | None = None
) -> Batches:
    """Batches of `train`: data (a tensor or several), a source of samples (a function), or none."""
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (batch, generator) -> batch, got {type(augment).__name__}"
        )
    if train is None:
        if batch_size is not None or augment is not None:
            raise ValueError(
                "train=None is for an objective that draws its own samples, as many as it was "
                "built with: leave batch_size and augment out, or pass data"
            )
        return NoBatches(seed=seed)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size must be a positive integer where there is data, got {batch_size!r}; use "
            "such as batch_size=256"
        )
    batches: Batches
    if isinstance(train, (Tensor, tuple)):
        batches = ShuffledRows(train, batch_size=batch_size, seed=seed)
    elif callable(train):
        batches = DrawnBatches(train, batch_size=batch_size, seed=seed)
    else:
        raise TypeError(
            "train must be a Tensor of rows, a tuple of such, a function (batch_size, generator) "
            f"-> Tensor, or None, got {type(train).__name__}; use torch.as_tensor of an array, the "
            "tensors of a data set"
        )
    return AugmentedBatches(batches, augment) if augment is not None else batches


def _checked_columns(rows: Batch) -> tuple[Tensor, ...]:
    """The tensors of a batch, which must have as many rows, all finite."""
    columns = (rows,) if isinstance(rows, Tensor) else rows
    for column in columns:
        if not isinstance(column, Tensor):
            raise TypeError(f"train must hold Tensors of rows, got {type(column).__name__} in it")
        _check_rows(column)
    if not columns or any(len(column) != len(columns[0]) for column in columns):
        shapes = ", ".join(str(tuple(column.shape)) for column in columns) or "none"
        raise ValueError(
            f"the tensors of train must have as many rows each, got shapes {shapes}; pass "
            "(x, context) with a row of context for each sample"
        )
    return columns


def _check_rows(rows: Tensor) -> None:
    check_dense(rows, "train")
    check_values(rows, "train")
    if rows.dim() < 1 or rows.numel() == 0:
        raise ValueError(f"train must hold at least one row, got shape {tuple(rows.shape)}")
    bad = (~rows.isfinite()).reshape(len(rows), -1).any(dim=1)  # (N,)
    if bad.any():
        index = bad.nonzero().flatten()
        some = ", ".join(map(str, index[:10].tolist())) + (", ..." if len(index) > 10 else "")
        raise ValueError(f"train holds NaN or infinity in {len(index)} of {len(rows)} rows: {some}")
