"""A torch peer, and the contestants that the benches make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from _problem import normal_log_prob
from torch import Tensor, nn


@dataclass
class Peer:
    """One library in one mode.

    `solve` takes data x to (z, log |det dz/dx|), `transport` base samples to data without a trace;
    `count` gives the evaluations of the field since the last of them began.
    """

    name: str
    solve: Callable[[Tensor], tuple[Tensor, Tensor]]
    transport: Callable[[Tensor], Tensor]
    count: Callable[[], int]
    parameters: Sequence[nn.Parameter]
    eager: bool = True
    same_noise: Callable[[], AbstractContextManager[object]] = nullcontext

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) of x (B, D)."""
        z, log_det = self.solve(x)
        return normal_log_prob(z) + log_det


@dataclass
class Contestant:
    """What is timed: `run`; and what is asked of it besides.

    `check` repeats a run of the seed 0 and returns a value to compare, and for training the
    gradient. `forward` is the part whose aten operations are counted, None where none can be.
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], tuple[Tensor, Tensor | None]] | None = None
    nfe: tuple[int | None, int | None] = (None, None)
    forward: Callable[[], object] | None = None
    in_torch: bool = True


def training(peer: Peer, x: Tensor) -> Contestant:
    """zero_grad, loss = -log_prob.mean(), backward."""

    def run() -> Tensor:
        for parameter in peer.parameters:
            parameter.grad = None
        loss = -peer.log_prob(x).mean()
        forward = peer.count()
        loss.backward()
        contestant.nfe = (forward, peer.count() - forward)
        return loss.detach()

    def check() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        with peer.same_noise():
            loss = run()
        grads = [p.grad for p in peer.parameters if p.grad is not None]
        return loss, torch.cat([grad.flatten() for grad in grads])

    forward = (lambda: peer.log_prob(x)) if peer.eager else None
    contestant = Contestant(peer.name, run, check, forward=forward)
    return contestant


def evaluation(peer: Peer, x: Tensor) -> Contestant:
    """Log-likelihood of x, without gradient."""

    def run() -> Tensor:
        with torch.no_grad():
            log_prob = peer.log_prob(x)
        contestant.nfe = (peer.count(), None)
        return log_prob

    def check() -> tuple[Tensor, None]:
        torch.manual_seed(0)
        with peer.same_noise():
            return run().mean(), None

    contestant = Contestant(peer.name, run, check, forward=run if peer.eager else None)
    return contestant


def sampling(peer: Peer, like: Tensor, number: int) -> Contestant:
    """Samples, without trace and gradient, of the dimensions and device of `like` (B, D)."""

    def run() -> Tensor:
        with torch.no_grad():
            x = peer.transport(like.new_empty(number, like.shape[1]).normal_())
        contestant.nfe = (peer.count(), None)
        return x

    def check() -> tuple[Tensor, None]:
        torch.manual_seed(0)
        return run(), None

    contestant = Contestant(peer.name, run, check, forward=run if peer.eager else None)
    return contestant
