"""What the flows are fitted to: the rows of a table, or patches of photographs (BSDS300)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data import Table, image_patches, read_pictures, read_table, remove_mean, split_table

PATCHES = "bsds300:"
HELD_OUT = 0.1  # of the pictures to train on, for validation


def load(source: str, sizes: tuple[int, int, int]) -> Table:
    """The table at `FILE`, or patches from `bsds300:DIR`; `sizes` are numbers of patches."""
    if source.startswith(PATCHES):
        return _patches(Path(source.removeprefix(PATCHES)), sizes)
    return split_table(read_table(source), seed=0, drop_constant=True)


def _patches(folder: Path, sizes: tuple[int, int, int]) -> Table:
    """63 dimensions; the pictures for training, validation and test are different ones."""
    pictures = read_pictures(folder / "train")
    order = np.random.RandomState(0).permutation(len(pictures))  # that of earlier checks
    first = len(order) - max(1, round(HELD_OUT * len(order)))
    parts = [
        [pictures[i] for i in order[:first]],
        [pictures[i] for i in order[first:]],
        read_pictures(folder / "test"),
    ]
    generator = torch.Generator().manual_seed(0)
    rows = [
        remove_mean(image_patches(part, n, generator=generator))
        for part, n in zip(parts, sizes, strict=True)
    ]
    return _standardised(rows)


def _standardised(rows: list[Tensor]) -> Table:
    exact = [part.double() for part in rows]
    mean, std = exact[0].mean(0), exact[0].std(0, correction=0)
    train, val, test = (((x - mean) / std).float() for x in exact)
    return Table(train, val, test, mean, std, tuple(f"x{i}" for i in range(len(mean))))
