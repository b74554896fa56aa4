"""torchdyn's NeuralODE on the concatenated state (log-density, x), as its CNF module has it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from _peer import Peer
from _problem import Perceptron, Problem, make_noise
from _torchdiffeq import trace_of
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdyn.core import NeuralODE
    from torchdyn.numerics.solvers import ode as solvers


class Augmented(nn.Module):
    """d(log-density, x)/dt in reversed time, 1 - t: torchdyn is at home in forward time."""

    def __init__(self, field: Perceptron) -> None:
        super().__init__()
        self.field = field
        self.e: Tensor | None = None

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        """(B, 1 + D) from (B, 1 + D)."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x[:, 1:]
            point = point if x.requires_grad and create_graph else point.detach().requires_grad_()
            dx = self.field(1 - t, point)
            trace = trace_of(dx, point, self.e, create_graph=create_graph)
            # its adjoint wants a derivative of every part of the state
            slope = -torch.cat((trace[:, None], dx), 1) + 0 * x
        return slope if create_graph else slope.detach()


class Plain(nn.Module):
    """dx/dt alone, with torchdyn's signature."""

    def __init__(self, field: Perceptron) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        """(B, D) from (B, D)."""
        return self.field(t, x)


def make_solver(problem: Problem) -> nn.Module | str:
    """Its own method, with the times of its "rk4" put right.

    Its rk4 evaluates the stages at t + (0, 0, 1/2, 1/2) dt, a first-order method where the field
    depends on time (torchdyn 1.0.6); the right times cost the same.
    """
    if problem.method != "rk4":
        return problem.method
    solver = solvers.RungeKutta4(problem.x.dtype)
    _, *rest = solver.tableau
    solver.tableau = (torch.tensor([0.5, 0.5, 1.0]).to(rest[0][0]), *rest)
    return solver


def peer(problem: Problem, name: str, sensitivity: str) -> Peer:
    """A NeuralODE with the tolerances of the problem in both directions."""
    network = problem.network()
    augmented = Augmented(network)
    choices: dict[str, Any] = {"solver": make_solver(problem)}  # in both directions
    tolerances = ("atol", "rtol", "atol_adjoint", "rtol_adjoint")
    # 1e-3 is the default, which keeps it from warning where tolerances have no effect
    choices |= dict.fromkeys(tolerances, 1e-3 if problem.fixed else problem.tol)
    ode = NeuralODE(augmented, sensitivity=sensitivity, return_t_eval=False, **choices)
    plain = NeuralODE(Plain(network), sensitivity="autograd", return_t_eval=False, **choices)
    times = torch.linspace(0, 1, problem.steps + 1 if problem.fixed else 2).to(problem.x)

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        network.calls = 0
        augmented.e = make_noise(problem)
        state = torch.cat((x.new_zeros(len(x), 1), x), 1)
        end = ode(state, times)[-1]
        return end[:, 1:], end[:, 0]

    def transport(z: Tensor) -> Tensor:
        network.calls = 0
        return plain(z, times)[-1]

    return Peer(name, solve, transport, lambda: network.calls, list(network.parameters()))


def peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    """Its two sensitivities."""
    if not gradients:
        return [peer(problem, "torchdyn", "autograd")]
    return [
        peer(problem, "torchdyn adjoint", "adjoint"),
        peer(problem, "torchdyn backprop", "autograd"),
    ]
