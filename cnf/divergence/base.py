"""What a divergence is, and one that is estimated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from cnf.fields.base import Constants

__all__ = ["BoundField", "Divergence", "Estimator"]

BoundField = Any
"""f(t, x, context) -> dx with t (), x (B, *event), context (B, C) or None, dx (B, *event), and the
closed forms that `VectorField` describes, where the field has them."""


class Divergence(ABC):
    """How div f is computed, as a frozen value.

    To add one, inherit, and write

    1. `sample_noise(x, generator)` returns what is random, once a solve, or None.
    2. `constants(field, x, noise)` returns tensors that do not change in a solve: computed once,
       they reach every evaluation, and get their gradient.
    3. `__call__(field, t, x, context, noise, constants)` returns f and its divergence, a function
       of its arguments alone, differentiable in all of them where grad mode is on.
    """

    def sample_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """The noise of one solve (B, ...), or None where nothing is random.

        Args:
            x: state (B, *event), for shape, dtype and device.
            generator: source of randomness; None for torch's global one.
        """
        return None

    def constants(self, field: BoundField, x: Tensor, noise: Tensor | None) -> Constants:
        """What does not change in a solve: tensors, (B, ...) where there is noise.

        Args:
            field: the vector field.
            x: state (B, *event) at the start, for shape, dtype and device.
            noise: from `sample_noise`.
        """
        return ()

    @abstractmethod
    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) and its divergence.

        Args:
            field: the vector field; samples must not depend on one another.
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            noise: from `sample_noise`, its first dimension that of the samples.
            constants: from `constants(field, x, noise)`; None computes them anew.

        Returns:
            dx (B, *event) and the divergence (B,).
        """


class Estimator(Divergence):
    """A divergence estimated from probes: the mean of k unbiased estimates.

    To add one, inherit, and write `sample_noise` and `estimates`.

    Attributes:
        probes: k.
    """

    probes: int

    def check_standard_error(self) -> None:
        """Refuse to tell a standard error from too few probes, or from dependent ones.

        Raises:
            ValueError: fewer than two probes.
        """
        if self.probes < 2:
            raise ValueError(
                f"a standard error takes at least two probes, got probes={self.probes}; "
                f"use {type(self).__name__}(probes=16)"
            )

    @abstractmethod
    def estimates(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event), and the estimate of each probe (B, k)."""

    def __call__(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event) and the estimate of its divergence (B,)."""
        dx, each = self.estimates(field, t, x, context, noise, constants)
        return dx, each.squeeze(1) if each.shape[1] == 1 else each.mean(1)
