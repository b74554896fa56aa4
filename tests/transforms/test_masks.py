"""Masks, orders and permutations that are drawn: half of the dimensions, by a generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cnf.transforms import Coupling, LULinear, MaskedAutoregressive, Permutation, make_mask

DRAWN: dict[str, Callable[[torch.Generator | None], Tensor]] = {
    "make_mask": lambda g: make_mask("random", 16, g),
    "make_mask-channels": lambda g: make_mask("random", (16, 2, 3), g),
    "Coupling": lambda g: Coupling(16, "random", hidden=(), generator=g).parts.order,
    "MaskedAutoregressive": lambda g: (
        MaskedAutoregressive(16, hidden=(16,), ordering="random", generator=g).order
    ),
    "Permutation": lambda g: Permutation(16, "random", generator=g).order,
    "LULinear": lambda g: LULinear(16, generator=g).matrix.permutation.order,
}
each_drawn = pytest.mark.parametrize("name", DRAWN)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each_drawn
def test_what_is_drawn_follows_the_generator(name: str) -> None:
    draw = DRAWN[name]
    first = draw(seeded(1))
    torch.manual_seed(123)
    assert torch.equal(draw(seeded(1)), first)
    assert not torch.equal(draw(seeded(2)), first)
    generator = seeded(1)
    draw(generator)
    assert not torch.equal(draw(generator), first), "the generator goes on"


@each_drawn
def test_what_is_drawn_follows_the_global_state_without_one(name: str) -> None:
    draw = DRAWN[name]
    torch.manual_seed(1)
    first = draw(None)
    torch.manual_seed(1)
    assert torch.equal(draw(None), first)
    torch.manual_seed(2)
    assert not torch.equal(draw(None), first)


@pytest.mark.parametrize("name", ["make_mask", "make_mask-channels", "Permutation", "LULinear"])
def test_a_generator_leaves_the_global_state_alone(name: str) -> None:
    """Of what draws no weights."""
    state = torch.get_rng_state()
    DRAWN[name](seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dims", [2, 3, 7])
def test_a_random_mask_keeps_any_half(dims: int) -> None:
    generator = seeded(0)
    masks = torch.stack([make_mask("random", dims, generator) for _ in range(60)])
    assert (masks.sum(1) == dims // 2).all()
    assert masks.any(0).all()
    assert (~masks).any(0).all()


def test_a_random_mask_of_an_image_keeps_whole_channels() -> None:
    mask = make_mask("random", (5, 2, 3), seeded(0))
    assert torch.equal(mask, mask[:, :1, :1].expand(5, 2, 3))
    assert mask.sum() == 2 * 6


def test_a_mask_is_a_copy() -> None:
    own = torch.tensor([True, False, False])
    made = make_mask(own, 3)
    made[1] = True
    assert own.tolist() == [True, False, False]
    assert make_mask("channel", (3, 2, 2)).is_contiguous()
