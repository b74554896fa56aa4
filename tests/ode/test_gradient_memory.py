"""What each gradient mode keeps in memory, measured."""

from __future__ import annotations

import pytest
import torch

import cnf
from cnf.memory import peak_memory


def growth(gradient: str, divergence: str) -> float:
    """Peak memory of a training step, in states a solver step, from 10 to 100 steps."""
    field, x = cnf.MLPField(16, (32, 32)), torch.randn(1024, 16)
    peaks = []
    for steps in (10, 100):
        solver = cnf.Solver("rk4", steps=steps, gradient=gradient)
        flow = cnf.Flow(cnf.StandardNormal(16), cnf.CNF(field, divergence, solver))

        def step(flow: cnf.Flow = flow) -> None:
            flow.zero_grad()
            (-flow.log_prob(x).mean()).backward()

        step()
        peaks.append(peak_memory(step, x.device)[1])
    return (peaks[1] - peaks[0]) / 90 / (x.numel() * x.element_size())


@pytest.mark.filterwarnings("ignore:.*profil.*")
@pytest.mark.parametrize(
    ("gradient", "least", "most"),
    [("checkpoint", 0.9, 1.1), ("adjoint", -0.1, 0.1), ("backprop", 10.0, 100.0)],
)
def test_memory_of_a_training_step(gradient: str, least: float, most: float) -> None:
    assert least < growth(gradient, "hutchinson") < most
