"""Fewer bits, mirrored images, and binary ones."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.data import random_binarization, random_horizontal_flip, reduce_bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_reduce_bits_divides(bits):
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16)
    reduced = reduce_bits(images, bits)
    assert reduced.dtype == torch.uint8
    assert reduced.flatten().tolist() == [x // 2 ** (8 - bits) for x in range(256)]
    assert reduced.unique().tolist() == list(range(2**bits))
    assert images.flatten().tolist() == list(range(256))


def test_reduce_bits_refuses():
    for bits in (0, 9, 5.0, True, "5"):
        with pytest.raises(ValueError, match=r"bits=.* must be an integer from 1 to 8"):
            reduce_bits(torch.zeros(1, dtype=torch.uint8), bits)
    with pytest.raises(TypeError, match=r"tensor of uint8, got torch.float32"):
        reduce_bits(torch.zeros(1), 5)
    with pytest.raises(TypeError, match=r"tensor of uint8, got list"):
        reduce_bits([1], 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.bool])
def test_flips_are_those_of_the_drawn_mask(dtype):
    images = torch.randint(2, (50, 3, 4, 5)).to(dtype)
    before = images.clone()
    flipped = random_horizontal_flip(images, torch.Generator().manual_seed(3), 0.3)
    mask = torch.rand(50, generator=torch.Generator().manual_seed(3)) < 0.3
    assert 0 < int(mask.sum()) < 50
    for image, result, mirrored in zip(images, flipped, mask.tolist(), strict=True):
        assert torch.equal(result, torch.flip(image, [2]) if mirrored else image)
    assert flipped.dtype == dtype
    assert torch.equal(images, before)


def test_how_often_images_are_flipped():
    images = torch.tensor([0, 1]).expand(20_000, 1, 1, 2)
    for p in (0.0, 0.1, 0.5, 1.0):
        rate = float(random_horizontal_flip(images, p=p)[..., 0].double().mean())
        assert abs(rate - p) <= 4.5 * math.sqrt(p * (1 - p) / 20_000)
    assert random_horizontal_flip(images[:0]).shape == (0, 1, 1, 2)


def test_generators_are_kept_apart():
    images, state = torch.rand(30, 1, 2, 2), torch.get_rng_state()
    first = random_horizontal_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, random_horizontal_flip(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, random_horizontal_flip(images, torch.Generator().manual_seed(1)))


def test_the_gradient_goes_through():
    images = torch.rand(6, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 1, 2, 3, dtype=torch.float64)
    flipped = random_horizontal_flip(images, torch.Generator().manual_seed(0))
    (flipped * weights).sum().backward()
    same = random_horizontal_flip(weights, torch.Generator().manual_seed(0))
    assert torch.equal(images.grad, same)  # a flip is its own transpose


def test_flip_refuses():
    images = torch.zeros(2, 1, 2, 2)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"p=.* must be a probability"):
            random_horizontal_flip(images, p=p)
    with pytest.raises(TypeError, match=r"p='0.5' must be a number"):
        random_horizontal_flip(images, p="0.5")
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got \(1, 2, 2\); use images.unsqueeze"):
        random_horizontal_flip(images[0])
    for wrong in ([1], None, images.numpy()):
        with pytest.raises(TypeError, match=r"\(B, C, H, W\), got \w+; use torch.as_tensor"):
            random_horizontal_flip(wrong)


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.uint8), (17, torch.int64), (2, None)])
def test_pixels_are_white_as_often_as_their_grey_level_says(levels, dtype):
    grey = torch.linspace(0, levels - 1, 11)
    grey = grey if dtype is None else grey.round().to(dtype)
    images, before = grey.expand(20_000, 11), grey.clone()
    binary = random_binarization(images, torch.Generator().manual_seed(0), levels)
    assert binary.dtype == grey.dtype
    assert set(binary.unique().tolist()) == {0, 1}
    p = grey.double() / (levels - 1)
    error = (p * (1 - p) / 20_000).sqrt()
    assert ((binary.double().mean(0) - p).abs() <= 4.5 * error).all()  # black and white stay so
    assert torch.equal(grey, before)


def test_black_stays_black_and_white_white_whatever_is_drawn(monkeypatch):
    images = torch.tensor([0, 255], dtype=torch.uint8)
    for drawn in (0.0, 1 - 2**-24):  # the least and the greatest that torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda n, drawn=drawn, **_: torch.full(n, drawn))
        assert random_binarization(images).tolist() == [0, 1]


def test_binarization_is_that_of_the_generator():
    images = torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8)
    state = torch.get_rng_state()
    first = random_binarization(images, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, random_binarization(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, random_binarization(images, torch.Generator().manual_seed(1)))
    assert random_binarization(images[:0]).shape == (0, 1, 2, 2)


def test_binarization_refuses():
    for levels in (1, 2.0, True, "256"):
        with pytest.raises(ValueError, match=r"levels=.* must be an integer of 2 or more"):
            random_binarization(torch.zeros(2), levels=levels)
    with pytest.raises(ValueError, match=r"0 to 16 for levels=17, got values from 0 to 255; give"):
        random_binarization(torch.tensor([0, 255], dtype=torch.uint8), levels=17)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="images must hold pixels from 0 to 1"):
            random_binarization(torch.tensor([wrong]), levels=2)
    with pytest.raises(TypeError, match="images must be a tensor, got list; use torch"):
        random_binarization([0, 1])
