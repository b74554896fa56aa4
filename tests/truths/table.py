"""One table of flows whose right answer is known, and the modes in which each must give it.

To add a truth, add a `Case` to the `CASES` of one of the files `cases_*.py` in this folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import cnf


class Sample(NamedTuple):
    """A flow, data (B, *event), and context (B, C) or None."""

    flow: cnf.Flow
    x: Tensor
    context: Tensor | None = None


def eager(case: Case, flow: cnf.Flow, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x, context)


def functional(case: Case, flow: cnf.Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """Each row by itself, under `torch.func.vmap` of a `functional_call`."""
    parameters = dict(flow.named_parameters())

    def single(*row: Tensor) -> Tensor:
        return torch.func.functional_call(flow, parameters, tuple(v[None] for v in row))[0]

    rows = (x,) if context is None else (x, context)
    return torch.func.vmap(single, randomness="different")(*rows)


def compiled(case: Case, flow: cnf.Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """The flow as a compiled module, called twice: the second call may meet another graph."""
    torch.compiler.reset()
    module = torch.compile(flow, backend=case.backend)
    module(x, context)
    return module(x, context)


def compiled_steps(case: Case, flow: cnf.Flow, x: Tensor, context: Tensor | None) -> Tensor:
    solver = next(m.solver for m in flow.modules() if isinstance(m, cnf.CNF))
    return flow.log_prob(x, context, solver=dataclasses.replace(solver, compile=True))


MODES = {
    "eager": eager,
    "torch.func": functional,
    "torch.compile": compiled,
    "compiled steps": compiled_steps,
}


@dataclass(frozen=True)
class Case:
    """A flow, and what its log-density must be in every mode; or how it must be refused.

    Attributes:
        name: of what could go wrong.
        make: builds the flow and its data.
        truth: x, context -> log p(x) (B,), from a formula.
        refused: type of the error and words of its message (a pattern), instead of a truth; with
            a truth, either will do.
        modes: those in which it can be asked; "compiled steps" only where there is a `CNF`.
        backend: of torch.compile: "inductor" takes seconds.
        tolerance: absolute, in nats.
    """

    name: str
    make: Callable[[], Sample]
    truth: Callable[[Tensor, Tensor | None], Tensor] | None = None
    refused: tuple[type[Exception], str] | None = None
    modes: tuple[str, ...] = tuple(MODES)
    backend: str = "aot_eager"
    tolerance: float = 1e-4

    def check(self, mode: str) -> None:
        """Run one mode, and compare; the caller's tensors must be left as they were."""
        flow, x, context = self.make()
        before = [None if v is None else v.clone() for v in (x, context)]
        found, error = None, None
        try:
            found = MODES[mode](self, flow, x, context).detach()
        except Exception as raised:
            if self.refused is None or type(raised) is not self.refused[0]:
                raise
            error = str(raised)
        if error is not None:
            assert re.search(self.refused[1], error, re.DOTALL), error
        else:
            assert self.truth is not None, f"not refused, but gave {found}"
            truth = self.truth(*before).to(found)
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=self.tolerance, equal_nan=True)
        for value, old in zip((x, context), before, strict=True):
            assert value is None or torch.equal(value, old), "the caller's tensor was written into"


def standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) (B,)."""
    return torch.distributions.Normal(0.0, 1.0).log_prob(x.double()).flatten(1).sum(1)
