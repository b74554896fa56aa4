"""zuko's free-form Jacobian transform around the shared network; dopri5 alone, its own adjoint."""

from __future__ import annotations

from unittest import mock

import zuko
from _peer import Peer
from _problem import Problem, rademacher
from torch import Tensor


def peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    """One peer, for dopri5."""
    if problem.method != "dopri5":
        raise NotImplementedError("it solves by dopri5 alone")
    network = problem.network()
    transform = zuko.transforms.FreeFormJacobianTransform(
        network,
        t0=1.0,
        t1=0.0,
        phi=network.parameters(),
        atol=problem.tol,
        rtol=problem.tol,
        exact=problem.trace == "exact",
    )

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        network.calls = 0
        return transform.call_and_ladj(x)

    def transport(z: Tensor) -> Tensor:
        network.calls = 0
        return transform.inv(z)

    return [
        Peer(
            "zuko adjoint" if gradients else "zuko",
            solve,
            transport,
            lambda: network.calls,
            list(network.parameters()),
            # its noise is Gaussian: for the check it gets the noise of the others
            same_noise=lambda: mock.patch("torch.randn_like", rademacher),
        )
    ]
