"""torchode's AutoDiffAdjoint: every sample its own steps, the state (x, log-density) in one."""

from __future__ import annotations

import torch
import torchode
from _peer import Peer
from _problem import Problem, make_noise
from _torchdiffeq import trace_of
from torch import Tensor


def peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    """One peer, for dopri5."""
    if problem.method != "dopri5":
        raise NotImplementedError("of these methods it has dopri5 alone")
    network = problem.network()
    noise: list[Tensor | None] = [None]

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state[:, :-1]
            x = x if x.requires_grad and create_graph else x.detach().requires_grad_()
            dx = network(t, x)
            trace = trace_of(dx, x, noise[0], create_graph=create_graph)
            slope = torch.cat((dx, trace[:, None]), 1)
        return slope if create_graph else slope.detach()

    def integrate(function: object, y: Tensor, t0: float, t1: float) -> Tensor:
        network.calls = 0
        start, end = y.new_full((len(y),), t0), y.new_full((len(y),), t1)
        term = torchode.ODETerm(function)
        controller = torchode.IntegralController(problem.tol, problem.tol, term=term).to(y)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term).to(y), controller)
        return solver.solve(torchode.InitialValueProblem(y, start, end)).ys[:, -1]

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        noise[0] = make_noise(problem)
        end = integrate(augmented, torch.cat((x, x.new_zeros(len(x), 1)), 1), 1.0, 0.0)
        return end[:, :-1], end[:, -1]

    def transport(z: Tensor) -> Tensor:
        return integrate(network, z, 0.0, 1.0)

    name = "torchode backprop" if gradients else "torchode"
    parameters = list(network.parameters())
    return [Peer(name, solve, transport, lambda: network.calls, parameters)]
