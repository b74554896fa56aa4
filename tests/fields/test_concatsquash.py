"""`ConcatSquashField` against its formula written out."""

from __future__ import annotations

import itertools

import pytest
import torch

import cnf


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("context", [0, 2])
def test_the_formula(context):
    field = cnf.ConcatSquashField(3, (5, 4), context=context).double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    t, x, c = torch.tensor(0.37, dtype=torch.float64), normal(6, 3), normal(6, 2)
    s = torch.cat((t.expand(6, 1), c[:, :context]), -1)
    h = x
    for i, layer in enumerate(field.layers):
        gate = torch.sigmoid(s @ layer.gate.weight.T + layer.gate.bias)
        h = (h @ layer.linear.weight.T + layer.linear.bias) * gate + s @ layer.shift.weight.T
        h = h.tanh() if i < 2 else h  # the output is linear
    torch.testing.assert_close(field(t, x, c if context else None), h, rtol=1e-12, atol=1e-12)


def test_parameters_are_those_of_ffjord():
    """Each layer: W, b, the gate's weight and bias, and a shift without bias."""
    field = cnf.ConcatSquashField(2, (64, 64, 64))
    widths = [2, 64, 64, 64, 2]
    expected = sum(n * m + m + 3 * m for n, m in itertools.pairwise(widths))
    assert sum(p.numel() for p in field.parameters()) == expected
