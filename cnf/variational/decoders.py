"""Decoders: the likelihood p(x | z) of data, whose parameters a network makes of the latents."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks import check_count, check_positive, tracing
from cnf.noise import draw
from cnf.ode.inputs import check_finite

__all__ = ["Bernoulli", "Decoder", "DiscretizedLogistic", "Gaussian"]


class Decoder(nn.Module, ABC):
    """The likelihood p(x | z) of data x given latents z, by a network from z to its parameters.

    To add a kind, inherit, and write `log_prob`, `mean` and `sample` with `parameters_at(z)`.

    Args:
        network: from latents (N, D) to the parameters (N, *shape).

    Raises:
        TypeError: a network that is no module; in a call, one that returns no tensor.
        ValueError: in a call, a network that returns another number of rows, or no dimensions.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network must be an nn.Module from latents (N, D) to parameters (N, *shape), got "
                f"{type(network).__name__}"
            )
        self.network = network

    @abstractmethod
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (*batch,) of x (*event), (B, *event), ... given latents z (*batch, D)."""

    @abstractmethod
    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] (*batch, *event) given latents z (*batch, D)."""

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x | z) (*batch, *event) given latents z (*batch, D), without gradient."""

    def parameters_at(self, z: Tensor) -> Tensor:
        """What the network makes of latents z (*batch, D): (*batch, *shape)."""
        rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
        made = self.network(rows.clone())  # it may write into its argument
        if not isinstance(made, Tensor):
            raise TypeError(f"the decoder's network returned a {type(made).__name__}, not a tensor")
        if made.ndim < 2 or len(made) != len(rows):
            raise ValueError(
                f"the decoder's network returned the shape {tuple(made.shape)} for latents "
                f"{tuple(rows.shape)}, expected ({len(rows)}, *shape)"
            )
        return made.reshape(*z.shape[:-1], *made.shape[1:])


class Bernoulli(Decoder):
    """Independent bits, such as the pixels of binary images.

        log p(x | z) = sum_i x_i l_i - log(1 + exp(l_i)),    logits l = network(z)

    Args:
        network: from latents (N, D) to logits (N, *event).

    Shapes:
        x (*event), (B, *event) or more, z (*batch, D) -> (*batch,); x broadcasts against the batch.

    Raises:
        TypeError: a network that is no module.
        ValueError: in a call, x of another shape, or with fractions. Other whole numbers than 0
            and 1 have the log-probability -inf.

    Example:
        >>> decoder = Bernoulli(nn.Linear(2, 3))
        >>> x, z = torch.tensor([[0.0, 1.0, 1.0]]), torch.randn(5, 1, 2)
        >>> decoder.log_prob(x, z).shape
        torch.Size([5, 1])
    """

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (*batch,) of x (B, *event) given latents z (*batch, D)."""
        logits = self.parameters_at(z)
        x, outside = _levels(
            _matched(x, logits, z),
            2,
            "; binarise by cnf.data.random_binarization, or use DiscretizedLogistic or Gaussian",
        )
        log_mass = x * logits - F.softplus(logits)
        return _summed(log_mass.masked_fill(outside, -math.inf), z)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] (*batch, *event): the probability of a 1."""
        return torch.sigmoid(self.parameters_at(z))

    @torch.no_grad()
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bits x ~ p(x | z) (*batch, *event), floats of 0 and 1."""
        p = self.mean(z)
        return (draw(torch.rand, p.shape, like=p, generator=generator) < p).to(p.dtype)


class DiscretizedLogistic(Decoder):
    """Independent integers of L levels, such as grey levels: a logistic density, cut into bins.

        P(x | z) = prod_i F((x_i + 1) / L) - F(x_i / L),    F(y) = sigmoid((y - m_i) / s_i)
        (m, log s) = network(z),    s >= e^-5 / L

    The first and the last level have what lies below and above, so that the masses sum to one.
    The data lie in 0 to 1 on the scale of m and s.

    Args:
        network: from latents (N, D) to means and log-scales, one behind the other in the first
            dimension: (N, 2 D') for data (D',), (N, 2 C, H, W) for images (C, H, W).
        levels: number of levels L, 2 or more.

    Shapes:
        x (*event), (B, *event) or more, z (*batch, D) -> (*batch,); x broadcasts against the batch.

    Raises:
        TypeError: a network that is no module.
        ValueError: less than two levels; in a call, x of another shape or with fractions, or a
            network whose first dimension is odd. Other whole numbers than 0 to L - 1 have the
            log-probability -inf.

    Reference:
        Kingma et al., arXiv 1606.04934; Salimans et al., PixelCNN++, arXiv 1701.05517.

    Example:
        >>> decoder = DiscretizedLogistic(nn.Linear(2, 6), levels=4)
        >>> x, z = torch.tensor([[0, 3, 2]]), torch.randn(5, 1, 2)
        >>> decoder.log_prob(x, z).shape
        torch.Size([5, 1])
    """

    def __init__(self, network: nn.Module, levels: int = 256) -> None:
        super().__init__(network)
        check_count("levels", levels)
        if levels < 2:
            raise ValueError(f"levels={levels} must be 2 or more")
        self.levels = levels

    def extra_repr(self) -> str:
        """The number of levels."""
        return f"levels={self.levels}"

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log P(x | z) (*batch,) of integers x (B, *event) given latents z (*batch, D)."""
        mean, log_scale = self._mean_and_log_scale(z)
        x, outside = _levels(_matched(x, mean, z), self.levels)
        rate = (-log_scale).exp()
        above = ((x + 1) / self.levels - mean) * rate  # the edges of the bin, as F sees them
        below = (x / self.levels - mean) * rate
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)), which keeps all digits
        first, last = x == 0, x == self.levels - 1
        log_mass = (
            torch.where(last, 0.0, F.logsigmoid(above))
            + torch.where(first, 0.0, F.logsigmoid(-below))
            + torch.where(first | last, 0.0, (-torch.expm1(-rate / self.levels)).log())
        )
        return _summed(log_mass.masked_fill(outside, -math.inf), z)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] (*batch, *event): the sum over levels j >= 1 of P(x >= j)."""
        mean, log_scale = self._mean_and_log_scale(z)
        rate = (-log_scale).exp()
        total = torch.zeros_like(mean)
        for j in range(1, self.levels):  # one by one: all at once take L times the memory
            total = total + torch.sigmoid((mean - j / self.levels) * rate)
        return total

    @torch.no_grad()
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Integers x ~ P(x | z) (*batch, *event), as floats."""
        mean, log_scale = self._mean_and_log_scale(z)
        u = draw(torch.rand, mean.shape, like=mean, generator=generator)
        y = mean + log_scale.exp() * u.logit(torch.finfo(u.dtype).eps)
        return (self.levels * y).floor().clamp(0, self.levels - 1)

    def _mean_and_log_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """m and log s, each (*batch, *event)."""
        made = self.parameters_at(z)
        dim = z.ndim - 1
        if made.shape[dim] % 2:
            raise ValueError(
                f"the decoder's network returned {tuple(made.shape[dim:])} for each sample; "
                "expected means and log-scales, an even number in the first dimension"
            )
        mean, log_scale = made.chunk(2, dim)
        return mean, log_scale.clamp(min=-math.log(self.levels) - 5)


class Gaussian(Decoder):
    """Real data with normal noise of one scale.

        log p(x | z) = log N(x; network(z), s^2 I)

    Args:
        network: from latents (N, D) to means (N, *event).
        scale: s, or None to learn it, from 1 on.

    Shapes:
        x (*event), (B, *event) or more, z (*batch, D) -> (*batch,); x broadcasts against the batch.

    Raises:
        TypeError: a network that is no module, a scale that is no number.
        ValueError: a scale that is not positive; in a call, x of another shape or not finite.

    Example:
        >>> decoder = Gaussian(nn.Linear(2, 3), scale=0.1)
        >>> decoder.log_prob(torch.randn(4, 3), torch.randn(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module, scale: float | None = None) -> None:
        super().__init__(network)
        self.log_scale: nn.Parameter | float
        if scale is None:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            check_positive("scale", scale)
            self.log_scale = math.log(scale)

    @property
    def scale(self) -> Tensor | float:
        """The scale s."""
        if isinstance(self.log_scale, Tensor):
            return self.log_scale.exp()
        return math.exp(self.log_scale)

    def extra_repr(self) -> str:
        """The scale, where it is fixed."""
        learned = isinstance(self.log_scale, Tensor)
        return "scale=None" if learned else f"scale={self.scale:.6g}"

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (*batch,) of x (B, *event) given latents z (*batch, D)."""
        mean = self.parameters_at(z)
        x = _matched(x, mean, z)
        check_finite(x, min(x.ndim - 1, z.ndim - 1))
        log_density = -0.5 * ((x - mean) / self.scale).square() - self.log_scale
        return _summed(log_density - 0.5 * math.log(2 * math.pi), z)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] (*batch, *event)."""
        return self.parameters_at(z)

    @torch.no_grad()
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x | z) (*batch, *event)."""
        mean = self.parameters_at(z)
        return mean + self.scale * draw(torch.randn, mean.shape, like=mean, generator=generator)


def _matched(x: Tensor, made: Tensor, z: Tensor) -> Tensor:
    """x, checked, in the dtype of the parameters (*batch, *event)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    batch, event = made.shape[: z.ndim - 1], made.shape[z.ndim - 1 :]
    fits = x.ndim >= len(event) and x.shape[x.ndim - len(event) :] == event
    if not fits or not _broadcasts(x.shape[: x.ndim - len(event)], batch):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected {tuple(made.shape)}, or what broadcasts to it "
            f"with samples of shape {tuple(event)}, as the decoder's network makes of latents of "
            f"shape {tuple(z.shape)}"
        )
    return x.to(made.dtype)


def _levels(x: Tensor, levels: int, remedy: str = "") -> tuple[Tensor, Tensor]:
    """Whole numbers x, 0 for those that are none of the levels; and which these are.

    Raises:
        ValueError: fractions and NaN, where values can be looked at.
    """
    if not tracing() and not bool((x == x.round()).all()):
        low, high = x.min().item(), x.max().item()
        raise ValueError(
            f"x must hold whole numbers from 0 to {levels - 1}, got values from {low:.6g} to "
            f"{high:.6g}, with fractions or NaN{remedy}"
        )
    outside = (x < 0) | (x > levels - 1) | ((x != x.round()) & ~x.isnan())
    return x.masked_fill(outside, 0.0), outside


def _broadcasts(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether dimensions broadcast to those of a batch."""
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(n in (1, m) for n, m in pairs)


def _summed(values: Tensor, z: Tensor) -> Tensor:
    """(*batch,): the sum over the numbers of each sample, where z is (*batch, D)."""
    return values.sum(tuple(range(z.ndim - 1, values.ndim)))
