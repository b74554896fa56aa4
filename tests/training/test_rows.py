"""Rows far below the rest are named, in evaluations and in the log of `fit`, and no others are."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cnf.training import far_below, fit


def normal(n: int, dims: int) -> Tensor:
    x = torch.randn(n, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -0.5 * x.square().sum(1) - 0.5 * dims * math.log(2 * math.pi)


@pytest.mark.parametrize("dims", [1, 2, 63, 1000])
def test_rows_of_a_right_model_are_not_named(dims: int) -> None:
    assert far_below(normal(20_000 if dims < 100 else 500, dims)) is None


def test_neither_are_heavy_tails() -> None:
    x = torch.distributions.StudentT(1.0).sample((20_000,))
    assert far_below(torch.distributions.StudentT(1.0).log_prob(x)) is None


def test_one_row_in_2000() -> None:
    """The mean of patches in the middle of a run: -374,220, with one row of -7e8."""
    log_prob = normal(2000, 63)
    log_prob[1203] = -7e8
    found = far_below(log_prob)
    assert found is not None
    assert (found.rows, found.count, found.worst) == ((1203,), 2000, -7e8)
    assert found.median == pytest.approx(float(normal(2000, 63).median()), abs=1e-2)
    text = rf"1 of 2000 row is far below the rest \(index 1203\): median -{abs(found.median):.4f}"
    with pytest.raises(RuntimeError, match=text):
        raise RuntimeError(str(found))


def test_many_rows_and_rows_that_are_not_finite() -> None:
    log_prob = normal(100, 2)
    log_prob[::5] = -1e6 - torch.arange(20).double()
    log_prob[3], log_prob[4] = -math.inf, math.nan
    found = far_below(log_prob)
    assert found is not None
    assert set(found.rows) == {3, 4, *range(0, 100, 5)}
    assert found.rows[2:4] == (95, 90)
    assert found.worst == -math.inf
    assert str(found).startswith("22 of 100 rows are far below the rest (index ")
    assert far_below(torch.zeros(5)) is None
    assert far_below(torch.full((5,), math.nan)) is None
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(N,\)"):
        far_below(torch.zeros(2, 2))


class Center(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center).square().mean()


def validations(folder: Path, losses: Tensor) -> list[dict]:
    data = torch.ones(10, 2)
    fit(Center(), data, steps=2, batch_size=5, out=folder, progress=False, log_every=10,
        validate=lambda _: losses, validate_every=2)  # fmt: skip
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_names_them(tmp_path: Path) -> None:
    losses = torch.linspace(1, 2, 200)
    (line,) = validations(tmp_path / "usual", losses)
    assert set(line) == {"step", "val_loss", "best", "elapsed"}
    assert line["val_loss"] == pytest.approx(1.5)
    losses[7] = 7e8
    (line,) = validations(tmp_path / "far", losses)
    assert line["val_loss"] == pytest.approx(7e8 / 200, rel=1e-4)
    assert line["val_median"] == pytest.approx(1.5, abs=0.01)
    assert (line["val_worst"], line["val_far"], line["val_far_rows"]) == (7e8, 1, [7])
    with pytest.raises(ValueError, match=r"validate must return .*got shape \(2, 2\)"):
        validations(tmp_path / "wrong", torch.zeros(2, 2))
