"""peak_memory: the allocator's count against a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cnf.memory import peak_memory

MIB = 2**20
SLACK = 1024  # scalars


def mib(n: int) -> Tensor:
    """A tensor of n MiB."""
    return torch.ones(n * MIB // 4)


def test_the_largest_sum_of_living_tensors_counts() -> None:
    def work() -> Tensor:
        a = mib(3)
        b = mib(2)  # 5
        del a  # 2
        c = mib(1)  # 3
        del b, c
        return mib(4)

    result, peak = peak_memory(work)
    assert result.shape == (MIB,)
    assert peak == 5 * MIB


def test_what_lived_before_does_not_count() -> None:
    before = mib(8)
    assert peak_memory(lambda: mib(3))[1] == 3 * MIB
    assert before.shape == (2 * MIB,)


def test_the_backward_pass_counts() -> None:
    x = mib(1).requires_grad_()

    def forward() -> Tensor:
        return x.sin().exp().sum()

    def both() -> Tensor:
        return torch.autograd.grad(forward(), x)[0]

    # Forward: sin(x) and exp(sin(x)) at once. Backward: exp(sin(x)), kept by the graph, the
    # gradient that reaches sin, cos(x), and their product; the sum's gradient needs no memory.
    assert 2 * MIB <= peak_memory(forward)[1] <= 2 * MIB + SLACK
    assert 3 * MIB <= peak_memory(both)[1] <= 4 * MIB + SLACK


def test_a_graph_that_is_kept_needs_memory_for_every_layer() -> None:
    x = mib(1).requires_grad_()

    def chain(layers: int) -> Tensor:
        y = x
        for _ in range(layers):
            y = y.sin()
        return torch.autograd.grad(y.sum(), x)[0]

    short, long = (peak_memory(lambda n=n: chain(n))[1] for n in (5, 15))
    assert abs(long - short - 10 * MIB) <= SLACK


def test_nothing_is_nothing() -> None:
    assert peak_memory(lambda: 7) == (7, 0)


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError, match="why"):
        peak_memory(lambda: {}["why"])
    assert peak_memory(lambda: mib(1))[1] == MIB  # and leaves the profiler usable


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="'cpu' and 'cuda'"):
        peak_memory(lambda: 7, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same() -> None:
    def work() -> Tensor:
        a = torch.ones(3 * MIB // 4, device="cuda")
        return a + 1

    assert peak_memory(work, "cuda")[1] == 6 * MIB
