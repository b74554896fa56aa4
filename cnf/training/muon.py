"""Muon for the matrices of hidden layers and Adam for all else, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from cnf.checks import check_positive

__all__ = ["Muon"]


class Muon(Optimizer):
    """Muon on matrices, whose step is their momentum made orthogonal, and Adam on all else.

        W <- W - r lr sqrt(max(1, rows / columns)) orthogonal(momentum)

    Fields that have to learn fine structure, as in flow matching, get there in several times fewer
    steps than by Adam. Muon, which is torch's (2.9 or later), takes the matrices that have at least
    four rows and columns: those of hidden layers.

    Args:
        module: whose parameters are trained.
        lr: learning rate of Adam.
        ratio: r, that of Muon by Adam's.

    Raises:
        ImportError: torch is older than 2.9.
        TypeError: not a module.
        ValueError: a module without parameters, a rate that is not positive.

    Reference: Jordan et al., "Muon: an optimizer for hidden layers", 2024; Liu et al., arXiv
    2502.16982.

    Example:
        >>> import cnf
        >>> flow = cnf.FFJORD(2)
        >>> optimizer = Muon(flow, lr=5e-3)
        >>> loss = cnf.FlowMatching(flow)(torch.randn(16, 2))
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, module: nn.Module, lr: float = 5e-3, *, ratio: float = 4.0) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be a module, whose parameters are sorted here, got "
                f"{type(module).__name__}; use Muon(flow)"
            )
        check_positive("lr", lr)
        check_positive("ratio", ratio)
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"Muon needs torch 2.9 or later, found {torch.__version__}; upgrade torch, or use "
                "torch.optim.Adam"
            )
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"module, a {type(module).__name__}, has no parameters to train")
        matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) >= 4]
        own = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in own]
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=ratio * lr, weight_decay=0.0))
        if others:
            self.parts.append(Adam(others, lr=lr))
        super().__init__([{"params": others + matrices, "lr": lr}], {})
        self._gather()

    def _gather(self) -> None:
        """The groups of all parts, which a schedule changes: Adam's first."""
        self.param_groups = [group for part in reversed(self.parts) for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters that none of the parts would move.

        Raises:
            TypeError: always, once it is built.
        """
        if hasattr(self, "param_groups") and self.param_groups:
            raise TypeError(
                "Muon has the parameters of the module that it was built from; build it anew from "
                "one that holds the others too"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gather()

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts."""
        parts = [part.state_dict() for part in self.parts]
        groups = [group for part in reversed(parts) for group in part["param_groups"]]
        return {"parts": parts, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the states of all parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._gather()
