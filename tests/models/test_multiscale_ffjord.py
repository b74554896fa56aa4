"""MultiscaleFFJORD: its architecture, and its likelihood by exact and by estimated traces.

Its log-determinant is held against the brute-force Jacobian in `tests/transforms/test_contract.py`.
"""

from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.fields.conv_time import Concat
from cnf.transforms import CNF, Squeeze


def randomised(flow: cnf.Flow, spread: float = 1.0) -> cnf.Flow:
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, spread / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
    return flow


def shapes_of(flow: cnf.Flow) -> list[tuple[int, ...]]:
    """What the CNFs work on, from base to data."""
    return [m.event_shape for m in flow.modules() if isinstance(m, CNF)]


@pytest.mark.parametrize(
    ("shape", "levels", "scales"),
    [
        ((1, 28, 28), None, [(4, 7, 7), (8, 7, 7), (2, 14, 14), (4, 14, 14), (1, 28, 28)]),
        ((3, 32, 32), 2, [(6, 16, 16), (12, 16, 16), (3, 32, 32)]),
        ((1, 8, 8), None, [(2, 4, 4), (4, 4, 4), (1, 8, 8)]),
        ((2, 5, 7), None, [(2, 5, 7)]),
        ((2, 6, 4), 1, [(2, 6, 4)]),
    ],
)
def test_the_scales_are_those_of_the_paper(shape, levels, scales) -> None:
    flow = cnf.MultiscaleFFJORD(shape, (4, 4), levels=levels, blocks=2)
    assert shapes_of(flow) == [s for s in scales for _ in range(2)]
    squeezes = [m for m in flow.modules() if isinstance(m, Squeeze)]
    assert len(squeezes) == len(scales) // 2
    assert flow.event_shape == flow.base.event_shape == shape


@pytest.mark.parametrize("options", [{}, {"time": "film"}, {"time": "concatsquash"}], ids=str)
def test_the_exact_trace_agrees_with_64_probes(options) -> None:
    torch.manual_seed(0)
    flow = randomised(cnf.MultiscaleFFJORD((1, 8, 8), (8, 8), blocks=1, **options))
    assert all(m.divergence == cnf.Exact() for m in flow.modules() if isinstance(m, CNF))
    x = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        exact = flow.log_prob(x)
        estimate, error = flow.log_prob(x, divergence=cnf.Hutchinson(probes=64), return_stderr=True)
    z = (estimate - exact) / error  # standard normal, nearly
    assert error.min() > 1e-3
    assert z.abs().max() < 5
    assert 0.7 < z.square().mean() < 1.4
    assert z.mean().abs() < 4 / math.sqrt(64)


def test_arguments_reach_every_block() -> None:
    solver = cnf.Solver("rk4", steps=2)
    flow = cnf.MultiscaleFFJORD(
        (1, 4, 4),
        (3, 3, 3),
        levels=2,
        blocks=1,
        context=2,
        solver=solver,
        times=(0.0, 0.5),
        activation="softplus",
    )
    blocks = [m for m in flow.modules() if isinstance(m, CNF)]
    assert len(blocks) == 3
    for block in blocks:
        assert block.solver is solver
        assert block.times == (0.0, 0.5)
        assert block.divergence == cnf.Hutchinson()  # three hidden layers
        assert block.field.context == 2
        assert isinstance(block.field.activations[0], torch.nn.Softplus)
        assert isinstance(block.field.modulation, Concat)
    c = torch.randn(5, 2)
    assert flow.sample((), c).shape == (5, 1, 4, 4)
    with pytest.raises(ValueError, match="context is missing"):
        flow.log_prob(torch.randn(5, 1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": (8, 8)}, "must be the shape of an image"),
        ({"features": (1, 7, 8), "levels": 2}, "height 7 not divisible by 2"),
        ({"features": (1, 8, 12), "levels": 4}, "width 12 not divisible by 8"),
        ({"features": (1, 8, 8), "levels": 0}, "levels=0"),
        ({"features": (1, 8, 8), "blocks": 0}, "blocks=0"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        cnf.MultiscaleFFJORD(**arguments)
