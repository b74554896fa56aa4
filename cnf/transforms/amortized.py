"""`Amortized`: the parameters of a layer, its own or predicted from context for every sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Amortized"]


class Amortized(nn.Module):
    """The free parameters of a layer: its own, or a linear function of the context.

        theta = theta_0,    or with context    theta(c) = theta_0 + W c

    With context every sample has its own, as in amortised inference, where c is what an encoder
    says of the observation.

    Args:
        initial: theta_0, a tensor by each name.
        context: number of context features C, 0 for none.

    Shapes:
        context (B, C) -> (B, *shape) for each entry; without context (*shape).

    Reference:
        van den Berg et al., Sylvester Normalizing Flows for Variational Inference,
        arXiv 1803.05649, section 4.

    Example:
        >>> shift, scale = Amortized({"shift": torch.zeros(2), "scale": torch.ones(())}, 0)(None)
        >>> shift.shape, scale.shape
        (torch.Size([2]), torch.Size([]))
        >>> own = Amortized({"shift": torch.zeros(2), "scale": torch.ones(())}, 3)
        >>> [tuple(theta.shape) for theta in own(torch.randn(5, 3))]
        [(5, 2), (5,)]
    """

    def __init__(self, initial: Mapping[str, Tensor], context: int) -> None:
        super().__init__()
        self.shapes = {name: tuple(value.shape) for name, value in initial.items()}
        self.predict: nn.Linear | None = None
        if context:
            bias = torch.cat([value.flatten() for value in initial.values()])
            self.predict = nn.Linear(context, len(bias))
            with torch.no_grad():
                self.predict.bias.copy_(bias)
                self.predict.weight.normal_(0.0, 0.1 / math.sqrt(context))
        else:
            for name, value in initial.items():
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The parameters, in the order in which they were given."""
        if self.predict is None or context is None:
            return tuple(getattr(self, name) for name in self.shapes)
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = self.predict(context).split(sizes, -1)  # (B, size) each
        shaped = zip(parts, self.shapes.values(), strict=True)
        return tuple(part.reshape(context.shape[0], *shape) for part, shape in shaped)

    @torch.no_grad()
    def set(self, **initial: Tensor) -> None:
        """Set theta_0, all of it, by name."""
        if self.predict is not None:
            self.predict.bias.copy_(torch.cat([initial[name].flatten() for name in self.shapes]))
            return
        for name in self.shapes:
            getattr(self, name).copy_(initial[name])

    def extra_repr(self) -> str:
        """The names and shapes."""
        return ", ".join(f"{name}={shape}" for name, shape in self.shapes.items())
