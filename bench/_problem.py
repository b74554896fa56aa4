"""What every contestant computes: one network, one batch, one way to solve."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cnf

FIXED = ("euler", "midpoint", "heun", "rk4")
SIZES = {"2d": (2, 64, 512), "43d": (43, 860, 1000)}
"""(dimensions, width, batch) of each size."""


class Perceptron(nn.Module):
    """dx/dt = network(x, t), as users of the torch peers write it; counts its evaluations."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx (B, D) at x (B, D), with t (), (1,) or (B,)."""
        self.calls += 1
        return self.network(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), 1))


@dataclass(frozen=True)
class Problem:
    """The weights, the data (B, D), the method, and the trace: "exact" or "hutchinson"."""

    field: cnf.MLPField
    x: Tensor
    method: str = "rk4"
    steps: int = 20
    tol: float = 1e-5
    trace: str = "hutchinson"

    @property
    def fixed(self) -> bool:
        """Whether the method takes equal steps."""
        return self.method in FIXED

    @property
    def dims(self) -> int:
        """D."""
        return self.x.shape[1]

    def network(self) -> Perceptron:
        """A copy of the network, for one contestant alone, with torch's own tanh."""
        layers = (copy.deepcopy(m) for m in self.field.network)
        return Perceptron(
            nn.Sequential(*(m if isinstance(m, nn.Linear) else nn.Tanh() for m in layers))
        )

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer."""
        layers = [m for m in self.field.network if isinstance(m, nn.Linear)]
        return [(layer.weight.detach(), layer.bias.detach()) for layer in layers]


def make_field(dims: int, width: int, scale: float, device: str) -> cnf.MLPField:
    """PyTorch's default initialisation, with the weights times scale."""
    torch.manual_seed(0)
    field = cnf.MLPField(dims, (width, width), frequencies=0)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(scale)
    return field.to(device)


def rademacher(x: Tensor) -> Tensor:
    """Noise +1 or -1 like x: the numbers that cnf draws from the same seed."""
    return 2 * torch.randint(0, 2, x.shape, dtype=x.dtype, device=x.device) - 1


def make_noise(problem: Problem) -> Tensor | None:
    """Noise e (B, D) of one solve, or None for the exact trace."""
    return rademacher(problem.x) if problem.trace == "hutchinson" else None


def normal_log_prob(z: Tensor) -> Tensor:
    """Log-density (B,) of a standard normal at z (B, D)."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
