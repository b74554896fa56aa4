"""What `fit` says about its first batch, before it trains on it."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from cnf.flow import Flow
from cnf.singular import singularities
from cnf.transforms import CNF, Transform
from cnf.transforms.normalization import ActNorm, BatchNorm
from cnf.truncation import dequantized, is_continuous, parts_of
from cnf.warn import warn

__all__ = ["look_at"]

NUMBERS = 2**15  # looked at, at most
ROWS = 16  # fewer tell nothing
SHIFT = (
    10.0  # how far the mean of the data may be from that of the base, in the latter's deviations
)
RATIO = 5.0  # of the deviations of the data and the base


def look_at(objective: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Warn of data that have no density, or another location or scale than the base of the flow.

    For an objective with a `flow`, such as `cnf.MaximumLikelihood` and `cnf.FlowMatching`.
    PyTorch's random state, and the flow, stay as they are.
    """
    flow = getattr(objective, "flow", None)
    if not isinstance(flow, Flow) or not batch:
        return
    x, context = batch[0], batch[1] if len(batch) > 1 else None
    if x.shape[1:] != flow.event_shape:
        return
    for reason in singularities(x, flow.transform.levels):
        warn(f"the data have no density, so that the likelihood grows without bound: {reason}")
    found = None
    with suppress(Exception):  # what is wrong with the batch, the objective says itself
        found = _distance(flow, x, context)
    if found is not None:
        warn(
            f"the data are far from the base of the flow: {found}. Training is slow, or fails, to "
            "take the samples there: standardize the data, as cnf.data.split_table does, or end "
            "the flow with a layer that does it, end = cnf.transforms.Diagonal(event_shape), after "
            "end.initialize(x) and end.requires_grad_(False)"
        )


@torch.no_grad()
def _distance(flow: Flow, x: Tensor, context: Tensor | None) -> str | None:
    """Where and how far the first batch is from the base, in words; None if it is near."""
    modules = list(flow.modules())
    if any(isinstance(module, (ActNorm, BatchNorm)) for module in modules) or len(x) < ROWS:
        return None  # layers that standardize by the data
    if flow.transform.quantized and not isinstance(flow.transform.levels, tuple):
        return None  # all integers are taken to the same interval
    device = next(flow.parameters()).device
    rows = max(ROWS, min(len(x), 500, NUMBERS // x[0].numel()))
    x = x[:rows].to(device)
    context = context if context is None else context[:rows].to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        own, z = dequantized(flow, x, context)
        for part in reversed(parts_of(own.transform)):
            if is_continuous(part):
                continue  # at first it moves nothing far
            if any(isinstance(module, CNF) for module in part.modules()):
                return None
            z = part.inverse(z, context if _takes(part, context) else None)
        base = flow.base.rsample((rows,)).to(z)
    return _words(z, base) if z.shape == base.shape else None


def _takes(part: Transform, context: Tensor | None) -> bool:
    return context is not None and part.takes_context


def _words(z: Tensor, base: Tensor) -> str | None:
    """What tells the data at the base z from base samples, both (B, *event)."""
    z, base = z.flatten(1).double(), base.flatten(1).double()
    std, mean = torch.std_mean(z, 0, correction=0)
    low, middle, high = base.quantile(base.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = (high - low) / 1.349  # the deviation of a normal, and some measure of any base
    shift = (mean - middle).abs() / spread
    ratio = torch.maximum(std / spread, spread / std)
    far = ((shift > SHIFT) | (ratio > RATIO)) & (std > 0)  # a constant is another fault
    if not far.any():
        return None
    i = int(torch.where(far, torch.maximum(shift, ratio), 0.0).argmax())
    return (
        f"dimension {i} of the first batch, taken through the layers of the flow other than CNFs, "
        f"has mean {float(mean[i]):.3g} and deviation {float(std[i]):.3g}, the base "
        f"{float(middle[i]):.3g} and {float(spread[i]):.3g} ({int(far.sum())} of {len(far)} "
        "dimensions are far)"
    )
