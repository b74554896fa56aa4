"""One estimator on its way to a row of the comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cnf.audit.report import first_sentence
from cnf.comparison.report import TraceRow
from cnf.comparison.subject import Subject, peak_of, seconds_of
from cnf.divergence import Divergence, Exact
from cnf.ode import record_solves

__all__ = ["Trial"]

_MEMORY = 4 * 2**30  # bytes that the graph of a training step may take
_TRAINING = 4  # a training step takes about as many log-likelihoods


@dataclass
class Trial:
    """One estimator on its way to a row."""

    subject: Subject
    name: str
    divergence: Divergence
    seed: int
    found: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    training_times: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: float = 0.0  # seconds
    alive: bool = True

    def attempt(self, part: Callable[[], None]) -> None:
        """Measure a part, unless this or an earlier one fails; the other rows still hold."""
        if not self.alive:
            return
        try:
            part()
        except (RuntimeError, ValueError) as error:  # a rank above D, memory, a solve that fails
            self.notes.append(first_sentence(error))
            self.alive = False

    def estimate(self, exact: Tensor | None, draws: int) -> None:
        """Values for draw after draw: NFE, bias, standard deviation, and memory."""
        seconds = self.subject.product_seconds * self.subject.products(self.divergence)
        if seconds > self.subject.budget / 3:  # a value, its memory, its time
            self.notes.append(f"left out: about {seconds:.2g} s a log-likelihood; raise budget")
            self.alive = False
            return
        generator = torch.Generator(self.subject.x.device).manual_seed(self.seed)
        like = self.subject.x.reshape(-1, *self.subject.event)[:1]
        noisy = self.divergence.sample_noise(like, generator) is not None
        values, nfe = [], []
        for i in range(draws if noisy else 1):
            start = time.perf_counter()
            with record_solves() as solves:
                values.append(self.subject.log_prob(self.divergence, generator).double())
            nfe.append(sum(solve.nfe for solve in solves))
            self.spent += (time.perf_counter() - start) * (i > 0)  # the first may compile
            if i > 0 and self.spent > self.subject.budget / 3:
                break
        if noisy and len(values) < draws:
            self.notes.append(f"{len(values)} draws within budget")
        self._judge(torch.stack(values), exact, noisy=noisy)
        self.found["nfe"] = sum(nfe) / len(nfe)
        log_prob = lambda: self.subject.log_prob(self.divergence)  # noqa: E731
        self.found["memory"] = peak_of(log_prob, self.subject.x.device)

    def _judge(self, values: Tensor, exact: Tensor | None, *, noisy: bool) -> None:
        """Bias and standard deviation of log p (draws, *batch)."""
        std = values.var(0).mean().sqrt().item() if noisy else 0.0
        self.found |= {"std": std, "draws": len(values)}
        if self.divergence == Exact():
            self.found |= {"bias": 0.0, "bias_error": 0.0}
        elif exact is not None:
            self.found["bias"] = (values - exact).mean().item()
            self.found["bias_error"] = std / math.sqrt(values.numel())

    def first_step(self) -> None:
        """The warm-up of the training step, its NFE and memory; unless it takes too much."""
        subject, bytes_ = self.subject, self.subject.product_memory
        seconds = _TRAINING * seconds_of(lambda: subject.log_prob(self.divergence).sum().item())
        bytes_ *= subject.products(self.divergence)
        if self.spent + 3 * seconds > subject.budget or bytes_ > _MEMORY:
            what = f"{bytes_ / 2**30:.2g} GiB" if bytes_ > _MEMORY else f"{seconds:.2g} s"
            self.notes.append(f"no training step: about {what}")
            return
        with record_solves() as solves:
            subject.step(self.divergence)
        self.found["training_nfe"] = float(sum(solve.nfe for solve in solves))
        memory = peak_of(lambda: subject.step(self.divergence), subject.x.device)
        self.found["training_memory"] = memory

    def time(self) -> None:
        """One round; none where the budget is spent."""
        if self.times and self.spent > self.subject.budget:
            return
        self.times.append(seconds_of(lambda: self.subject.log_prob(self.divergence).sum().item()))
        self.spent += self.times[-1]
        if "training_nfe" in self.found:
            self.training_times.append(seconds_of(lambda: self.subject.step(self.divergence)))
            self.spent += self.training_times[-1]

    def row(self) -> TraceRow:
        """What was measured."""
        times = {"seconds": self.times, "training_seconds": self.training_times}
        self.found |= {name: median(each) for name, each in times.items() if each}
        return TraceRow(self.name, self.divergence, **self.found, note="; ".join(self.notes))
