"""Half precision is refused in one message, and what the message says to do is enough."""

from __future__ import annotations

import re

import pytest
import torch

import cnf
from cnf.transforms import Compose, Interval

FLOWS = {
    "cnf": lambda: cnf.FFJORD(2, (4,), context=1),
    "function": lambda: cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: -x, "exact")),
    "discrete": lambda: cnf.RealNVP(2, layers=2, hidden=(4,), context=1),
    "mixed": lambda: cnf.Flow(
        cnf.StandardNormal(2), Compose(cnf.CNF(cnf.MLPField(2, (4,))), Interval(-9, 9))
    ),
    "no-parameters": lambda: cnf.Flow(cnf.StandardNormal(2), Interval(-9, 9)),
}
LOW = [torch.float16, torch.bfloat16]
each_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)


def inputs(flow: cnf.Flow, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.tensor([[0, 1], [3, 2], [-1, -1]]).to(dtype)
    return [x, x[:, :1]] if flow.transform.takes_context and len(list(flow.parameters())) else [x]


def followed(message: str, flow: cnf.Flow, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, and the flow in place, as the message says."""
    if "flow.float()" in message:
        flow.float()
    for remedy, dtype in (("x.float()", torch.float32), ("x.double()", torch.float64)):
        if remedy in message:
            return [v.to(dtype) for v in values]
    if wanted := re.search(r"x\.to\(torch\.(\w+)\)", message):
        return [v.to(getattr(torch, wanted[1])) for v in values]
    return values


@each_flow
@pytest.mark.parametrize("given", [*LOW, torch.int64, torch.float32])
@pytest.mark.parametrize("own", [torch.float32, torch.float64, *LOW], ids=str)
def test_one_message_is_enough_for_log_prob(make, own, given) -> None:
    flow = make().to(own)
    x = inputs(flow, given)
    try:
        found = flow.log_prob(*x)
    except TypeError as error:
        assert given != own or own in LOW
        x = followed(str(error), flow, x)
        found = flow.log_prob(*x)
    assert found.dtype in (torch.float32, torch.float64)


@each_flow
@pytest.mark.parametrize("own", LOW, ids=str)
def test_one_message_is_enough_for_samples(make, own) -> None:
    flow = make().to(own)
    context = [v.to(own) for v in inputs(flow, torch.float32)[1:]]
    with pytest.raises(TypeError, match=r"never below float32; use flow\.float\(\)"):
        flow.sample((), *context)
    assert flow.float().sample((), *[v.float() for v in context]).dtype == torch.float32


def test_half_context_is_told_the_dtype_to_use() -> None:
    flow = FLOWS["cnf"]().double()
    x, context = inputs(flow, torch.float64)
    with pytest.raises(TypeError, match=r"context is torch\.float16.*context\.to\(torch\.float64"):
        flow.log_prob(x, context.half())


def test_half_states_are_refused_by_the_solver() -> None:
    with pytest.raises(TypeError, match=r"got bfloat16; use x\.float\(\)"):
        cnf.odeint(lambda t, x: -x, torch.ones(1, 1).bfloat16(), 0.0, 1.0)
