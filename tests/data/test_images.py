"""Data sets of images: which images are where, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from cnf.data import ImageData, image_data, images, read_mnist, reduce_bits

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "MNIST"


def counting(n: int) -> torch.Tensor:
    """n images that differ, (n, 1, 1, 2)."""
    return torch.tensor([[i // 256, i % 256] for i in range(n)]).to(torch.uint8).view(n, 1, 1, 2)


def rows(*parts: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for part in parts for row in part.flatten(1).tolist())


def test_digits_are_those_of_sklearn_each_in_one_part():
    sklearn = pytest.importorskip("sklearn.datasets")
    truth = torch.from_numpy(sklearn.load_digits().data)
    assert torch.equal(truth, truth.round())
    for options, sizes in (({}, (1300, 200, 297)), ({"val": 0, "seed": 5}, (1500, 0, 297))):
        data = image_data("digits", **options)
        assert (data.levels, data.name, data.shape) == (17, "digits", (1, 8, 8))
        assert (len(data.train), len(data.val), len(data.test)) == sizes
        assert data.train.dtype == torch.uint8
        assert int(data.train.max()) == 16
        # As lists with repetitions: all 1797, each once
        assert rows(data.train, data.val, data.test) == rows(truth.long())
        row = data.test[3].flatten().double()
        assert (truth == row).all(1).any()


def test_the_seed_shuffles_the_digits_and_the_test_images_do_not_depend_on_val():
    state = torch.get_rng_state()
    first, again = image_data("digits"), image_data("digits", val=300, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.train[:1200], again.train)
    other = image_data("digits", seed=1)
    assert not torch.equal(first.test, other.test)


@pytest.mark.parametrize("seed", ["a", 1.0, None, True])
def test_what_is_no_seed(seed):
    message = rf"seed={seed!r} must be an integer, got {type(seed).__name__}"
    with pytest.raises(TypeError, match=message):
        image_data("digits", seed=seed)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_last_training_images_are_for_validation(monkeypatch, name):
    train, test = counting(5500), counting(20)
    asked = []

    def read(folder, **options):
        asked.append((folder, options))
        return train, test

    monkeypatch.setattr(images, f"read_{name}", read)
    data = image_data(name, "here")
    assert torch.equal(data.train, train[:500])
    assert torch.equal(data.val, train[500:])
    assert torch.equal(data.test, test)
    assert (data.name, data.levels) == (name, 256)
    data = image_data(name, "there", val=0, checksum=False)
    assert torch.equal(data.train, train)
    assert data.val.shape == (0, 1, 1, 2)
    assert asked == [("here", {"checksum": True}), ("there", {"checksum": False})]
    for val in (-1, 5500):
        with pytest.raises(ValueError, match=f"val={val} must be from 0 to 5499: {name} has 5500"):
            image_data(name, "here", val=val)
    for val in (0.1, True):
        with pytest.raises(TypeError, match=f"val={val} must be a number of images"):
            image_data(name, "here", val=val)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not here")
def test_mnist():
    data, (train, test) = image_data("mnist", MNIST), read_mnist(MNIST)
    assert torch.equal(data.train, train[:55_000])
    assert torch.equal(data.val, train[55_000:])
    assert torch.equal(data.test, test)
    assert (data.levels, data.shape) == (256, (1, 28, 28))
    assert repr(data) == (
        "ImageData('mnist', train 55000, val 5000, test 10000, images (1, 28, 28), levels=256)"
    )


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("mnist", None, r"needs folder=.*train-images-idx3-ubyte.gz and t10k-.* from https://"),
        ("cifar10", None, r"needs folder=.*https://.*/cifar-10-binary.tar.gz"),
        ("SVHN", None, r"name='SVHN' needs folder="),
        ("digits", "x", "name='digits' needs no folder, got 'x'"),
        ("minst", None, r"expected one of digits, mnist, cifar10, or .*Did you mean 'mnist'\?"),
        ("", "x", "name='' is not known"),
        (3, "x", "name=3 is not known"),
        (None, "x", "name=None is not known; expected one of digits, mnist, cifar10, or a class"),
    ],
)
def test_names_and_folders(name, folder, message):
    with pytest.raises(ValueError, match=message):
        image_data(name, folder)


def test_missing_files_say_where_to_get_them(tmp_path):
    for name in ("mnist", "cifar10"):
        with pytest.raises(FileNotFoundError, match="get https://"):
            image_data(name, tmp_path)


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"cnf\[examples\]\""):
        image_data("digits")


def test_fewer_bits_of_all_parts():
    data = ImageData(counting(300), counting(2), counting(290), levels=256, name="own")
    few = data.reduce_bits(3)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(few, part), reduce_bits(getattr(data, part), 3))
    assert few != data
    assert (few.levels, few.name, data.levels) == (8, "own", 256)
    with pytest.raises(ValueError, match="own has 8"):
        few.reduce_bits(2)
    with pytest.raises(ValueError, match="bits=0"):
        data.reduce_bits(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.levels = 3


def test_what_is_no_image_data():
    x = counting(3)
    wrong = [
        ((x.float(), x, x, 256), TypeError, r"train must be a tensor of uint8, got torch.float32"),
        ((x, x.numpy(), x, 256), TypeError, "val must be a tensor of uint8, got ndarray"),
        ((x[0], x, x, 256), ValueError, r"train must be images \(N, C, H, W\).*got \(1, 1, 2\)"),
        ((x, x, x[..., :1], 256), ValueError, r"test must be .*got \(3, 1, 1, 1\) \(train: \(3,"),
        ((x, x, x, 2), ValueError, "train has a pixel of 2, expected 0 to 1 for levels=2"),
        ((x[:1], x, x, 2), ValueError, "val has a pixel of 2"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            ImageData(*arguments, name="own")
    for levels in (1, 257, True, 16.5, 17.0, "17", None):
        with pytest.raises(ValueError, match=r"levels=.* must be an integer from 2 to 256"):
            ImageData(x, x, x, levels, "own")
    assert ImageData(x, x[:0], x, 3, "own").shape == (1, 1, 2)
