"""torchdiffeq by careful user code: the state (x, log-density), a graph only where one is asked."""

from __future__ import annotations

from typing import Any

import torch
from _peer import Peer
from _problem import Perceptron, Problem, make_noise
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint


class Augmented(nn.Module):
    """(dx/dt, tr df/dx), with noise e (B, D) of one solve, or exact where e is None."""

    def __init__(self, field: Perceptron) -> None:
        super().__init__()
        self.field = field
        self.e: Tensor | None = None

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """dx (B, D) and the trace (B,)."""
        create_graph = torch.is_grad_enabled()
        x = state[0]
        with torch.enable_grad():
            x = x if x.requires_grad and create_graph else x.detach().requires_grad_()
            dx = self.field(t, x)
            trace = trace_of(dx, x, self.e, create_graph=create_graph)
        return (dx, trace) if create_graph else (dx.detach(), trace)


def trace_of(dx: Tensor, x: Tensor, e: Tensor | None, *, create_graph: bool) -> Tensor:
    """Hutchinson's e^T J e (B,), or the exact trace by a loop over the dimensions."""
    if e is not None:
        return (torch.autograd.grad(dx, x, e, create_graph=create_graph)[0] * e).sum(1)
    trace = torch.zeros_like(dx[:, 0])
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(
            dx[:, i].sum(), x, create_graph=create_graph, retain_graph=True
        )
        trace = trace + row[:, i]
    return trace


def peer(problem: Problem, name: str, *, adjoint: bool, landing: bool = False) -> Peer:
    """`odeint_adjoint` with its default options, or `odeint`.

    With `landing`, the last adaptive step of a solve ends at the end; by default torchdiffeq steps
    over it and interpolates, at a lower order than dopri8's.
    """
    network = problem.network()
    augmented = Augmented(network)
    choices: dict[str, Any] = {"method": problem.method, "rtol": problem.tol, "atol": problem.tol}
    if problem.fixed:
        choices["options"] = {"step_size": 1 / problem.steps}
    elif landing:
        choices["options"] = {"step_t": problem.x.new_tensor([0.0])}
    integrate = odeint_adjoint if adjoint else odeint

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        network.calls = 0
        augmented.e = make_noise(problem)
        state = (x, x.new_zeros(len(x)))
        z, log_det = integrate(augmented, state, x.new_tensor([1.0, 0.0]), **choices)
        return z[-1], log_det[-1]

    def transport(z: Tensor) -> Tensor:
        network.calls = 0
        return odeint(network, z, z.new_tensor([0.0, 1.0]), **choices)[-1]

    return Peer(name, solve, transport, lambda: network.calls, list(network.parameters()))


def peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    """The adjoint and backpropagation through the solver."""
    if not gradients:
        return [peer(problem, "torchdiffeq", adjoint=False)]
    return [
        peer(problem, "torchdiffeq adjoint", adjoint=True),
        peer(problem, "torchdiffeq backprop", adjoint=False),
    ]
