"""The floor: the matrix products of the same evaluations and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _peer import Contestant
from _problem import Problem
from torch import Tensor

NAME = "bare matrix products"
Product = tuple[Tensor, Tensor, Tensor]
"""(a, b, out): out = a b."""


class Buffers:
    """Tensors by shape, so that the products of one kind share their memory."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.known: dict[tuple[str, int, int], Tensor] = {}

    def __call__(self, kind: str, rows: int, columns: int) -> Tensor:
        """A matrix of noise (rows, columns): zeros may be multiplied faster."""
        key = (kind, rows, columns)
        if key not in self.known:
            self.known[key] = torch.randn_like(self.like.new_empty(rows, columns))
        return self.known[key]


def products(problem: Problem, number: int, *, trace: bool, backward: bool) -> list[Product]:
    """The products of one evaluation: the network, its vjp for the trace, and their backward."""
    buffers = Buffers(problem.x)
    weights = [weight for weight, _ in problem.weights()]  # (out, in)
    factors = [(number, weight.t()) for weight in weights]
    if trace:
        rows = number * problem.dims if problem.trace == "exact" else number
        factors += [(rows, weight) for weight in reversed(weights)]
    made = []
    for rows, weight in factors:
        n_in, n_out = weight.shape
        a, out = buffers("in", rows, n_in), buffers("out", rows, n_out)
        made.append((a, weight, out))
        if backward:
            slope = buffers("in", rows, n_out)
            made.append((slope, weight.t(), buffers("out", rows, n_in)))
            made.append((a.t(), slope, buffers("out", n_in, n_out)))
    return made


def contestant(
    problem: Problem,
    nfe: Callable[[], int],
    *,
    trace: bool = True,
    backward: bool = False,
    number: int | None = None,
) -> Contestant:
    """As many evaluations as `nfe` says at the time of the run."""
    todo = products(problem, number or len(problem.x), trace=trace, backward=backward)

    def run() -> None:
        evaluations = nfe()
        with torch.no_grad():
            for _ in range(evaluations):
                for a, b, out in todo:
                    torch.mm(a, b, out=out)
        made.nfe = (evaluations, None)

    made = Contestant(NAME, run, in_torch=False)
    return made
