"""What a divergence is, and one that is estimated."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cnf.divergence.products import BoundField, with_product
from cnf.fields.base import Constants

__all__ = ["BoundField", "Divergence", "Estimator"]


class Divergence(ABC):
    """How div f is computed, as a frozen value.

    To add one, inherit, and write

    1. `sample_noise(x, generator)` returns what is random, once a solve, or None.
    2. `constants(field, x, noise)` returns tensors that do not change in a solve: computed once,
       they reach every evaluation, and get their gradient.
    3. `__call__(field, t, x, context, noise, constants)` returns f and its divergence, a function
       of its arguments alone, differentiable in all of them where grad mode is on.

    One that multiplies with the Jacobian can give its Frobenius norm to regularisers without a
    product more: see `with_norm` and `norm_needs_probe`.
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

    def estimates(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
    ) -> tuple[Tensor, Tensor]:
        """f(t, x, context) (B, *event), and what the divergence is the mean of (B, k)."""
        dx, div = self(field, t, x, context, noise, constants)
        return dx, div.unsqueeze(-1)

    def norm_needs_probe(self, field: BoundField) -> bool:
        """Whether `with_norm` takes a product of its own, with a probe that it must be given."""
        return True

    def with_norm(
        self,
        field: BoundField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
        constants: Constants | None = None,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`estimates`, and beside them ||df/dx||_F^2 (B,), exact or unbiased.

        Args:
            field: the vector field.
            t: time ().
            x: state (B, *event).
            context: (B, C) or None.
            noise: from `sample_noise`.
            constants: from `constants(field, x, noise)`; None computes them anew.
            probe: e (B, *event) with E[e e^T] = I, where `norm_needs_probe`.

        Raises:
            ValueError: no probe where one is needed.
        """
        if probe is None:
            raise ValueError(
                f"probe is None, but {type(self).__name__} needs one for the Jacobian's norm; "
                "pass a tensor (B, *event) of +1 and -1"
            )
        return with_product(
            lambda x: self.estimates(field, t, x, context, noise, constants), x, probe
        )


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
