"""`MLPField` against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cnf


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("frequencies", [0, 1, 3])
@pytest.mark.parametrize("context", [0, 2])
def test_the_formula(context, frequencies):
    field = cnf.MLPField(
        3, (5, 4), context=context, activation="silu", frequencies=frequencies
    ).double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    t, x, c = 0.37, normal(6, 3), normal(6, 2)
    waves = [t, *(math.sin(math.pi * k * t) for k in range(1, frequencies + 1))]
    waves += [math.cos(math.pi * k * t) for k in range(1, frequencies + 1)]
    h = torch.cat((x, x.new_tensor(waves).expand(6, -1), c[:, :context]), -1)
    (w1, b1, w2, b2, w3, b3) = field.parameters()
    h = nn.functional.silu(h @ w1.T + b1)
    h = nn.functional.silu(h @ w2.T + b2)
    found = field(torch.tensor(t, dtype=torch.float64), x, c if context else None)
    torch.testing.assert_close(found, h @ w3.T + b3, rtol=1e-12, atol=1e-12)


def test_time_matters_at_both_ends():
    """The frequencies start at half a period, so that t = 0 and t = 1 are told apart."""
    field, x = cnf.MLPField(2), torch.randn(4, 2)
    ends = [field(torch.tensor(t), x) for t in (0.0, 1.0)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_images_are_read_in_order():
    """A linear field on an image is its flattened self."""
    field = cnf.MLPField((2, 3, 2), (), frequencies=0).double()
    x = normal(4, 2, 3, 2)
    with torch.no_grad():
        field.network[0].weight[:] = torch.eye(12, 13)
        field.network[0].bias.zero_()
    assert torch.equal(field(torch.tensor(0.5, dtype=torch.float64), x), x)


@pytest.mark.parametrize("frequencies", [-1, 1.5, True])
def test_frequencies_that_are_refused(frequencies):
    with pytest.raises(ValueError, match=f"frequencies={frequencies}"):
        cnf.MLPField(2, frequencies=frequencies)
