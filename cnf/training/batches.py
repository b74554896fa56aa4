"""Where the batches come from: the rows of a tensor in random order, or a function that draws them.

All randomness comes from one generator, whose state belongs to the checkpoint with the order of the
epoch and the place in it. A resumed run continues in the middle of an epoch with the batch that
would have come next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["AugmentedBatches", "Batches", "DrawnBatches", "ShuffledRows", "make_batches"]

Draw = Callable[[int, torch.Generator], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches(Protocol):
    """An endless source of batches that can be stopped and continued.

    All randomness of a source comes from a generator of its own.
    """

    generator: torch.Generator

    def next(self) -> Tensor:
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
    """Rows of a tensor, each once per epoch, in batches of equal size.

    A batch that begins at the end of one epoch is filled from the beginning of the next.

    Shapes:
        rows: (N, *event); a batch: (B, *event) with B = min(batch_size, N).

    Example:
        >>> batches = ShuffledRows(torch.arange(4.0), batch_size=2, seed=0)
        >>> torch.cat([batches.next(), batches.next()]).sort().values.tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, rows: Tensor, *, batch_size: int, seed: int) -> None:
        _check_rows(rows)
        self.rows = rows
        self.batch_size = min(batch_size, len(rows))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(rows), generator=self.generator)  # (N,)
        self.cursor = 0

    def next(self) -> Tensor:
        """The next batch, (B, *event), on the device of the rows."""
        index = self.order[self.cursor : self.cursor + self.batch_size]
        self.cursor += len(index)
        if lacking := self.batch_size - len(index):
            self.order = torch.randperm(len(self.rows), generator=self.generator)
            index = torch.cat([index, self.order[:lacking]])
            self.cursor = lacking
        return self.rows[index.to(self.rows.device)]

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
            "train": f"{self.rows.dtype} {tuple(self.rows.shape)}",
            "batch_size": self.batch_size,
        }


class DrawnBatches:
    """Batches that a function draws: `draw(batch_size, generator)` returns (batch_size, *event)."""

    def __init__(self, draw: Draw, *, batch_size: int, seed: int) -> None:
        self.draw = draw
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        """A new batch, (B, *event)."""
        batch = self.draw(self.batch_size, self.generator)
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"train(batch_size, generator) must return a Tensor, got {type(batch).__name__}"
            )
        if batch.dim() == 0 or len(batch) != self.batch_size:
            raise ValueError(
                f"train(batch_size, generator) must return {self.batch_size} rows, "
                f"got shape {tuple(batch.shape)}"
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


class AugmentedBatches:
    """Batches of another source, changed by a function: `augment(batch, generator)` -> batch.

    The generator is that of the source, so that its state belongs to the checkpoint.
    """

    def __init__(self, batches: Batches, augment: Augment) -> None:
        self.batches = batches
        self.augment = augment
        self.generator = batches.generator

    def next(self) -> Tensor:
        """The next batch, changed, (B, *event)."""
        batch = self.batches.next()
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
    train: Tensor | Draw, *, batch_size: int, seed: int, augment: Augment | None = None
) -> Batches:
    """Batches of `train`, be it data (a tensor) or a source of samples (a function)."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (batch, generator) -> batch, got {type(augment).__name__}"
        )
    batches: Batches
    if isinstance(train, Tensor):
        batches = ShuffledRows(train, batch_size=batch_size, seed=seed)
    elif callable(train):
        batches = DrawnBatches(train, batch_size=batch_size, seed=seed)
    else:
        raise TypeError(
            "train must be a Tensor of rows or a function (batch_size, generator) -> Tensor, "
            f"got {type(train).__name__}"
        )
    return AugmentedBatches(batches, augment) if augment is not None else batches


def _check_rows(rows: Tensor) -> None:
    if rows.dim() < 1 or rows.numel() == 0:
        raise ValueError(f"train must hold at least one row, got shape {tuple(rows.shape)}")
    bad = (~rows.isfinite()).reshape(len(rows), -1).any(dim=1)  # (N,)
    if bad.any():
        index = bad.nonzero().flatten()
        some = ", ".join(map(str, index[:10].tolist())) + (", ..." if len(index) > 10 else "")
        raise ValueError(f"train holds NaN or infinity in {len(index)} of {len(rows)} rows: {some}")
