"""Every contestant that can be had: cnf, the installed peers, and the floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import _cnf
import _floor
import _peer
from _peer import Contestant, Peer
from _problem import Problem

TORCH_PEERS = ("torchdiffeq", "zuko", "torchdyn", "torchode")
JAX_PEERS = ("diffrax",)
_said: set[str] = set()


def training(problem: Problem) -> list[Contestant]:
    """Training steps."""
    made = [_peer.training(peer, problem.x) for peer in _torch_peers(problem, gradients=True)]
    made += _from_jax(lambda module: module.training(problem))
    return [*made, _floor.contestant(problem, _evaluations(made), backward=True)]


def evaluation(problem: Problem) -> list[Contestant]:
    """Log-likelihoods without gradient."""
    made = [_peer.evaluation(peer, problem.x) for peer in _torch_peers(problem, gradients=False)]
    made += _from_jax(lambda module: module.evaluation(problem))
    return [*made, _floor.contestant(problem, _evaluations(made))]


def sampling(problem: Problem, number: int) -> list[Contestant]:
    """Samples without a trace; cnf also with it."""
    made = _cnf.sampling(problem, number)
    for name in TORCH_PEERS:
        for peer in _try(name, lambda m: m.peers(problem, gradients=False)):
            made.append(_peer.sampling(peer, problem.x, number))
    made += _from_jax(lambda module: module.sampling(problem, number))
    return [*made, _floor.contestant(problem, _evaluations(made), trace=False, number=number)]


def _torch_peers(problem: Problem, *, gradients: bool) -> list[Peer]:
    made = _cnf.peers(problem, gradients=gradients)
    for name in TORCH_PEERS:
        made += _try(name, lambda module: module.peers(problem, gradients=gradients))
    return made


def _from_jax(make: Callable[[ModuleType], list[Contestant]]) -> list[Contestant]:
    return [contestant for name in JAX_PEERS for contestant in _try(name, make)]


def _try(name: str, make: Callable[[ModuleType], list]) -> list:
    """What a peer offers; a printed line, once, where it is missing or cannot do this."""
    try:
        return make(importlib.import_module(f"_{name}"))
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
    except NotImplementedError as error:
        reason = str(error)
    except (ImportError, RuntimeError) as error:
        reason = f"cannot be used here: {error}"
    if (line := f"{name} skipped: {reason}") not in _said:
        _said.add(line)
        print(line)
    return []


def _evaluations(made: Sequence[Contestant]) -> Callable[[], int]:
    """The forward evaluations of cnf's first contestant, known once it has run."""
    return lambda: made[0].nfe[0] or 0
