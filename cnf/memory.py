"""`peak_memory`: how much memory a function needs while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_memory"]

T = TypeVar("T")


def peak_memory(function: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """The result of a function, and the peak of torch's memory while it ran, above the start.

        peak = max_t (allocated(t) - allocated(start))

    Counted in torch's allocator, so compiled code and backward passes are in it, and what other
    libraries allocate is not. On the CPU the function runs under torch's profiler, which slows it
    down (time it in another run) and may not see it free what was allocated before it.

    Args:
        function: called once, without arguments.
        device: where the memory is counted, a CPU or a CUDA device.

    Returns:
        What the function returned, and the peak in bytes, 0 or more.

    Raises:
        RuntimeError: on the CPU, where another profiler is running.
        ValueError: another kind of device.

    Example:
        >>> numbers, peak = peak_memory(lambda: torch.ones(1000).sin())
        >>> numbers.shape, peak
        (torch.Size([1000]), 8000)
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _peak_on_cpu(function)
    if device.type == "cuda":
        return _peak_on_cuda(function, device)
    raise ValueError(f"peak memory is known on 'cpu' and 'cuda', not on {device.type!r}")


def _peak_on_cpu(function: Callable[[], T]) -> tuple[T, int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes to stderr
    with profile(profile_memory=True) as profiler:
        result = function()
    recorded = profiler.kineto_results
    if recorded is None:
        raise RuntimeError("torch's profiler returned nothing; was another profiler running?")
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    allocated = peak = 0
    # In order of time: autograd may have worked in a thread of its own.
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        allocated += change
        peak = max(peak, allocated)
    return result, peak


def _peak_on_cuda(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = function()
    return result, max(0, torch.cuda.max_memory_allocated(device) - start)
