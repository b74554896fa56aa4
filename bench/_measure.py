"""Time in interleaved rounds, aten operations, peak memory; and whether all compute the same."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from _peer import Contestant
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Times = dict[str, list[float]]


class Disagreement(SystemExit):
    """A contestant computes something else."""


def rounds(contestants: Sequence[Contestant], number: int, device: str) -> Times:
    """Seconds of each contestant in each round, every round in a new order."""
    times: Times = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:  # the second time: the check, or what stands for it, was one
        contestant.run()
    order = list(contestants)
    for _ in range(number):
        random.shuffle(order)
        gc.collect()
        gc.disable()
        for contestant in order:
            times[contestant.name].append(_seconds(contestant.run, device))
        gc.enable()
    return times


def _seconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def ratio(times: Times, name: str, base: str) -> float | None:
    """The median over the rounds of a contestant's time by another's in the same round."""
    if base not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


class _Operations(TorchDispatchMode):
    """Counts the aten operations that reach a kernel or make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(contestant: Contestant) -> float | None:
    """Aten operations an evaluation, in one forward pass."""
    nfe = contestant.nfe[0]
    if contestant.forward is None or not nfe:
        return None
    with _Operations() as counter:
        contestant.forward()
    return counter.number / nfe


def peak_memory(contestant: Contestant, device: str) -> float | None:
    """MiB that one run allocates at its peak, above what was there before; torch alone."""
    if not contestant.in_torch:
        return None
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak / 2**20


def check(contestants: Sequence[Contestant], reference: Contestant, tol: float) -> None:
    """Run all once with the same noise; fail where a value or a gradient is another.

    The limits are 1e-3 for a value and 1e-2 of the norm for a gradient, at tolerances of 1e-5.
    """
    if reference.check is None:
        raise ValueError(f"{reference.name} has nothing to compare")
    value, gradient = reference.check()
    value_limit, gradient_limit = max(1e-3, 100 * tol), max(1e-2, 1000 * tol)
    worst = [0.0, 0.0]
    for contestant in contestants:
        if contestant.check is None:
            continue
        other, other_gradient = contestant.check()
        gap = (other.cpu() - value.cpu()).abs().max().item()
        slope_gap = 0.0
        if gradient is not None and other_gradient is not None:
            difference = (other_gradient.cpu() - gradient.cpu()).norm()
            slope_gap = (difference / gradient.cpu().norm()).item()
        if not (gap <= value_limit and slope_gap <= gradient_limit):
            raise Disagreement(
                f"{contestant.name} computes something else than {reference.name}: values differ "
                f"by {gap:.2g} (limit {value_limit:.2g}), gradients by {slope_gap:.2g} of their "
                f"norm (limit {gradient_limit:.2g}); --no-check times it all the same"
            )
        worst = [max(worst[0], gap), max(worst[1], slope_gap)]
    line = f"all compute the same: values differ by at most {worst[0]:.1e}"
    print(line + (f", gradients by {worst[1]:.1e} of their norm" if gradient is not None else ""))
