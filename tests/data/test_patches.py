"""Patches are squares of the pictures, all equally likely; and BSDS300 is the published one."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.data import gaussian_log_prob, image_patches, read_pictures, remove_mean

BSDS = Path(__file__).parents[2].parent / "shared" / "data" / "BSDS300"


def numbered(height: int, width: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + height * width).reshape(height, width)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pictures_are_equally_likely_and_so_are_the_squares_of_each():
    pictures, n = [numbered(4, 5), numbered(3, 3, 100), numbered(6, 3, 200)], 30_000
    patches = image_patches(pictures, n, size=3, generator=generator())
    pixels = (256 * patches.double()).floor().long()
    seen = 0
    for picture, places in zip(pictures, [6, 1, 4], strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (3, 3)).reshape(-1, 3, 3)
        assert len(windows) == places
        for window in windows:
            count = int((pixels == torch.from_numpy(window.copy())).all(2).all(1).sum())
            expected = n / 3 / places
            assert abs(count - expected) < 4.5 * math.sqrt(expected)
            seen += count
    assert seen == n


def test_the_noise_is_uniform_and_the_values_below_one():
    white = np.full((8, 8), 255)
    patches = image_patches([white], 20_000, generator=generator(1))
    assert patches.dtype == torch.float32
    assert patches.shape == (20_000, 8, 8)
    assert float(patches.max()) < 1
    noise = 256 * patches.double() - 255
    assert float(noise.min()) >= 0
    hits = torch.histc(noise, bins=8, min=0, max=1)
    expected = noise.numel() / 8
    assert float(((hits - expected) / math.sqrt(expected)).abs().max()) < 4.5
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat.T) - torch.eye(64, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)


def test_remove_mean_leaves_what_gives_the_last_pixel_back():
    patches = torch.rand(10, 3, 4, generator=generator(2))
    x = remove_mean(patches)
    assert x.shape == (10, 11)
    centred = patches - patches.mean((1, 2), keepdim=True)
    torch.testing.assert_close(x, centred.flatten(1)[:, :-1])
    torch.testing.assert_close(-x.sum(1), centred[:, -1, -1])
    assert remove_mean(patches[:0]).shape == (0, 11)
    for wrong in (patches[0], patches[:, :1, :1]):
        with pytest.raises(ValueError, match="two pixels or more, got"):
            remove_mean(wrong)


def test_reproducible_and_leaves_the_global_generator_alone():
    pictures, state = [numbered(15, 16)], torch.get_rng_state()
    first = image_patches(pictures, 5)
    assert torch.equal(first, image_patches(pictures, 5, generator=generator()))
    assert not torch.equal(first, image_patches(pictures, 5, generator=generator(1)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        ([], {}, "pictures is empty"),
        ([numbered(7, 20)], {}, r"pictures\[0\] must hold integers .* 8 x 8, got int64 \(7, 20\)"),
        ([numbered(9, 9), np.ones((9, 9))], {}, r"pictures\[1\] must hold integers"),
        ([np.ones((9, 9, 3), int)], {}, "average the channels"),
        ([numbered(16, 17)], {}, "from 0 to 255, got 0 to 271"),
        ([numbered(9, 9, -1)], {}, "got -1 to 79"),
        ([numbered(9, 9)], {"n": 0}, "n=0 must be a positive integer"),
        ([numbered(9, 9)], {"size": 0}, "size=0 must be a positive integer"),
    ],
)
def test_bad_pictures(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        image_patches(pictures, **{"n": 2, **options})


def test_read_pictures_by_name_as_luma(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey = numbered(12, 9).astype(np.uint8)
    image.fromarray(grey).save(tmp_path / "b.png")
    red = np.zeros((12, 9, 3), np.uint8)
    red[..., 0] = 200
    image.fromarray(red).save(tmp_path / "a.png")
    (tmp_path / ".hidden").write_text("no picture")
    first, second = read_pictures(tmp_path)
    assert (first == round(0.299 * 200)).all()
    np.testing.assert_array_equal(second, grey)
    assert image_patches([first, second], 3).shape == (3, 8, 8)


def test_read_pictures_says_what_is_wrong(tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="is not a folder with pictures in it"):
            read_pictures(folder)
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"holds 'words.png', which Pillow cannot read"):
        read_pictures(tmp_path)
    (tmp_path / "words.png").unlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"holds 'folder', which Pillow cannot read"):
        read_pictures(tmp_path)
    plain = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *rest: _refuse(name) or plain(name, *rest)
    )
    with pytest.raises(ImportError, match=r"needs Pillow; pip install \"cnf\[examples\]\""):
        read_pictures(tmp_path)


def _refuse(name):
    if name == "PIL":
        raise ImportError


@pytest.mark.skipif(not BSDS.is_dir(), reason="the pictures are not here")
def test_the_gaussian_of_bsds300_scores_as_published():
    """arXiv 1705.07057, table 1: 96.67 nats; patches of 100 pictures are not independent."""
    pytest.importorskip("PIL.Image")
    train, test = (
        remove_mean(image_patches(read_pictures(BSDS / part), 40_000)) for part in ("train", "test")
    )
    assert float(gaussian_log_prob(train, test).mean()) == pytest.approx(96.67, abs=1.2)
