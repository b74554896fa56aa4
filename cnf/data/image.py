"""A picture as a density on the plane: one more target for the two-dimensional examples.

Reference:
    Grathwohl et al., FFJORD: Free-form continuous dynamics for scalable reversible generative
    models, arXiv 1810.01367.
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.data.density import PlaneDensity, Source

__all__ = ["ImageDensity"]

CHUNK = 2**22  # numbers held at once while kernels are evaluated
TINY = 1e-280  # a density below it is summed again, in logarithms


class ImageDensity(PlaneDensity):
    """A mixture of Gaussians, one on each pixel of a picture, upright in [-extent, extent]^2.

        p(x) = sum_ij w_ij N(x1; a_j, (extent / W)^2) N(x2; b_i, (extent / H)^2)

    where w is proportional to the darkness max - grey, a runs from -extent in the first column to
    extent in the last, and b from extent in the top row down to -extent. The kernels separate, so
    log p at B points costs one B x H x W product. Computed in float64 whatever the dtype of x.
    Points so far from all ink that p would underflow (about 37 standard deviations) are summed in
    logarithms over the edge of the ink, which is slower and, there, just as exact.

    Args:
        image: grey values (H, W), first row on top; any real dtype. H and W at least 2.
        extent: half the side of the square.
        invert: True weighs a pixel by max - grey (dark is likely), False by the grey value itself.
        name: what the density is called.

    Raises:
        TypeError: if image is no numeric array.
        ValueError: if image is not of rank 2 or smaller than 2 x 2, has NaN or infinity, has
            negative values that are not inverted, or has no weight at all; or if extent is not
            positive.

    Example:
        >>> density = ImageDensity(torch.tensor([[0, 255], [255, 255]]))  # ink top left
        >>> density.log_prob(torch.tensor([-4.0, 4.0]))
        tensor(-3.2242)
    """

    def __init__(
        self, image: Any, *, extent: float = 4.0, invert: bool = True, name: str = "image"
    ) -> None:
        weights = pixel_weights(image, invert)  # (H, W)
        if not 0 < extent < math.inf:
            raise ValueError(f"extent must be positive and finite, got {extent}")
        height, width = weights.shape
        self.name = name
        self.weights = weights
        self.columns = torch.linspace(-extent, extent, width, dtype=torch.float64, device="cpu")
        self.rows = torch.linspace(extent, -extent, height, dtype=torch.float64, device="cpu")
        self.sd = (extent / width, extent / height)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, extent: float = 4.0, invert: bool = True
    ) -> ImageDensity:
        """Read a picture file, in any format that Pillow reads, as grey values.

        Args:
            path: the file. Transparent parts count as white.
            extent: half the side of the square.
            invert: see the class.

        Returns:
            The density, named after the file.

        Raises:
            ImportError: if Pillow is not installed.
            FileNotFoundError: if there is no such file.
            ValueError: if Pillow cannot read the file.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise ImportError(
                'reading a picture needs Pillow; pip install "cnf[examples]"'
            ) from error
        try:
            with Image.open(path) as file:
                layers = file.convert("RGBA")
        except UnidentifiedImageError as error:
            raise ValueError(
                f"path {os.fspath(path)!r} is no picture that Pillow can read; convert it to PNG"
            ) from error
        grey = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("L")
        name = os.path.splitext(os.path.basename(path))[0]
        return cls(np.asarray(grey), extent=extent, invert=invert, name=name)

    def draw(self, n: int, source: Source) -> Tensor:
        """Draw n points, (n, 2), from `source`."""
        ladder = self.weights.flatten().cumsum(0)
        # Not torch.multinomial, which stops at 2^24 pixels.
        ladder = (ladder / ladder[-1]).to(source.device)
        steps = torch.rand(n, generator=source.generator, dtype=torch.float64, device=source.device)
        pixel = torch.searchsorted(ladder, steps, right=True)  # never a pixel of weight 0
        row, column = pixel // self.weights.shape[1], pixel % self.weights.shape[1]
        rows, columns = self.rows.to(source.device), self.columns.to(source.device)
        centres = torch.stack((columns[column], rows[row]), -1).to(source.dtype)  # (n, 2)
        return centres + centres.new_tensor(self.sd) * source.normal(n, 2)

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate log p at x (B, 2), returning (B,)."""
        weights = self.weights.to(x.device)
        parts = [
            self._log_density(part, weights)
            for part in torch.split(x.double(), max(1, CHUNK // sum(weights.shape)))
        ]
        return torch.cat(parts).to(x.dtype)

    def _log_density(self, x: Tensor, weights: Tensor) -> Tensor:
        across = log_normal(x[:, :1], self.columns.to(x), self.sd[0])  # (B, W)
        down = log_normal(x[:, 1:], self.rows.to(x), self.sd[1])  # (B, H)
        # Far outside the square all kernels are small: scale by the largest.
        right = across.detach().amax(-1, keepdim=True)  # (B, 1)
        high = down.detach().amax(-1, keepdim=True)  # (B, 1)
        p = ((down - high).exp() @ weights * (across - right).exp()).sum(-1)  # (B,)
        thin = p < TINY
        result = torch.where(thin, 1.0, p).log() + (right + high).squeeze(-1)
        rows, columns = self.edge.to(x.device)  # (E,), (E,)
        for few in torch.split(thin.nonzero().flatten(), max(1, CHUNK // len(rows))):  # (b,)
            each = across[few][:, columns] + down[few][:, rows]  # (b, E)
            each = each + weights[rows, columns].log()
            result = result.index_put((few,), each.logsumexp(-1))
        return result

    @cached_property
    def edge(self) -> Tensor:
        """Rows and columns of the inked pixels (2, E) that are not surrounded by ink.

        For a point thirty standard deviations away from all ink, any other pixel counts for less
        than 1e-12 of its neighbour on the side of the point: the neighbours are two standard
        deviations apart.
        """
        pad = torch.nn.functional.pad(self.weights, (1, 1, 1, 1))
        sides = (pad[:-2, 1:-1], pad[2:, 1:-1], pad[1:-1, :-2], pad[1:-1, 2:])
        surrounded = (torch.stack(sides) >= 1e-6 * self.weights).all(0)  # (H, W)
        return ((self.weights > 0) & ~surrounded).nonzero().T

    @cached_property
    def entropy(self) -> float:  # type: ignore[override]  # an attribute, but computed late
        """The differential entropy in nats: a sum of -p log p over a fine grid.

        The grid has two lines a standard deviation. Computed when first asked for, in a time that
        grows like H W (H + W): half a second for 600 x 600 pixels.
        """
        spacing = 0.5
        reach = [
            sd * spacing * torch.arange(-20, 4 * len(c) + 21, dtype=torch.float64, device=c.device)
            + min(c[0], c[-1])
            for sd, c in zip(self.sd, (self.columns, self.rows), strict=True)
        ]
        across = log_normal(reach[0].unsqueeze(-1), self.columns, self.sd[0]).exp()  # (G, W)
        down = log_normal(reach[1].unsqueeze(-1), self.rows, self.sd[1]).exp()  # (F, H)
        held = down @ self.weights  # (F, W)
        strips = (held @ part.T for part in torch.split(across, 256))  # p on the grid, (F, 256)
        total = sum(float(torch.special.entr(strip).sum()) for strip in strips)
        return total * spacing**2 * self.sd[0] * self.sd[1]


def log_normal(x: Tensor, mean: Tensor, sd: float) -> Tensor:
    """Log-density of N(mean, sd^2) at x."""
    return ((x - mean) / sd).square() / -2 - math.log(sd * math.sqrt(2 * math.pi))


def pixel_weights(image: Any, invert: bool) -> Tensor:
    """Check grey values (H, W) and turn them into weights (H, W), float64, that sum to one."""
    try:
        grey = (
            image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"image must be an array of grey values, got {type(image).__name__}: {error}"
        ) from error
    if grey.is_complex() or grey.dim() != 2 or min(grey.shape) < 2:
        raise ValueError(
            f"image must be real grey values (H, W), at least 2 x 2, "
            f"got {grey.dtype} {tuple(grey.shape)}; "
            "average the channels, or use ImageDensity.open"
        )
    grey = grey.double()
    if not grey.isfinite().all():
        raise ValueError(
            f"image has {int((~grey.isfinite()).sum())} non-finite values; replace them"
        )
    weights = grey.max() - grey if invert else grey
    if weights.min() < 0:
        raise ValueError(
            f"image must not be negative when invert=False, "
            f"got a minimum of {float(grey.min())}; shift it"
        )
    if weights.sum() == 0:
        raise ValueError(
            f"image is constant at {float(grey.max())}, so no pixel has weight; "
            "invert must leave some ink"
        )
    return weights / weights.sum()
