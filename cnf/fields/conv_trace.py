"""Closed-form traces of a convolutional Jacobian, for about the price of one more convolution.

Convolutions of stride 1 and zero padding, K[o, i, delta] with delta = -radius ... radius each way:

    a(p) = sum_delta K[:, :, delta] x(p + delta)        (x is zero outside the image)

With one hidden layer of slopes d(p), the trace is the sum of d times a map V that is fixed:

    V[i, p] = sum K_2[c, i, p - r] K_1[i, c, r - p]      over channels c and pixels r

With two, a path from the pixel r to itself goes by p1 of the first layer and p2 of the second:

    tr J = sum d_2[o, p2] K_3[c, o, p2 - r] K_2[o, i, p1 - p2] K_1[i, c, r - p1] d_1[i, p1]

If r went over the whole plane, this would be d_2 . (M * d_1) with one kernel M of K_2's size. As
[0 <= r < n] = 1 - [r < 0] - [r >= n] on each axis, the trace is that, less a one-dimensional
convolution along each of the four edges, plus a matrix product in each of the four corners: a frame
as wide as the kernels reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_trace", "conv_trace_constants"]


def conv_trace_constants(kernels: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
    """What the trace needs of the kernels, differentiable.

    Args:
        kernels: K_1 (H_1, C, k_1, k_1), ..., K_n (C, H_{n-1}, k_n, k_n), two or three, odd.
        size: (H, W) of the image.

    Returns:
        One hidden layer: the map V (H_1, H, W).
        Two: kernels of the plane, M (H_2, H_1, k, k); of the first and last rows, which count as
        channels (2 H_2 n_2, H_1 n_1, k); of the columns, likewise; and of the corners,
        (4 H_2 n_2' n_2, H_1 n_1' n_1, 1). The plane's alone if no path leaves the image.
        n_1 and n_2 are how far from the edges of the image paths through the outside may pass.
    """
    if len(kernels) == 2:
        return (_fixed_map(kernels[0], kernels[1], size),)
    first, middle, last = kernels
    k = middle.shape[-1]
    radii = [kernel.shape[-1] // 2 for kernel in kernels]
    (down, step_y, ends_y), (across, step_x, ends_x) = (_places(radii, n, first) for n in size)
    # q, s: where p2 and p1 stand on each axis; a, e: p2 - r; b, f: r - p1; g, h: p1 - p2
    reads = torch.einsum("sef,icbf->icbse", across, first)
    reads = torch.einsum("qab,icbse->icqsae", down, reads)
    paths = torch.einsum("coae,icqsae->oiqs", last, reads)  # (H_2, H_1, Q, S)
    paths = paths * torch.einsum("qg,sh,oigh->oiqs", step_y, step_x, middle)
    plane = paths[:, :, :k, :k].contiguous()
    if not radii[0] or not radii[2]:
        return (plane,)
    rows = paths[:, :, k:, :k].unflatten(2, ends_y)  # (H_2, H_1, 2, n_2, n_1, k)
    rows = rows.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(0, 2)
    columns = paths[:, :, :k, k:].unflatten(3, ends_x)  # (H_2, H_1, k, 2, n_2', n_1')
    columns = columns.permute(3, 0, 4, 1, 5, 2).flatten(3, 4).flatten(0, 2)
    corners = paths[:, :, k:, k:].unflatten(3, ends_x).unflatten(2, ends_y)
    corners = corners.permute(5, 2, 0, 6, 3, 1, 7, 4)  # (2, 2, H_2, n_2', n_2, H_1, n_1', n_1)
    return plane, rows, columns, corners.flatten(5).flatten(0, 4).unsqueeze(2)


def conv_trace(
    slopes: Sequence[Tensor], gates: Sequence[Tensor | None], constants: tuple[Tensor, ...]
) -> Tensor:
    """tr J (B,).

    Args:
        slopes: (B, H_1, H, W), (B, H_2, H, W) of the hidden layers, one or two.
        gates: (H_1, 1, 1) or (B, H_1, 1, 1), ..., or None; d_l is a slope times its gate.
        constants: from `conv_trace_constants`.
    """
    if len(slopes) == 1:
        shares = (slopes[0] * constants[0]).sum((2, 3))
    else:
        first = slopes[0] if gates[0] is None else slopes[0] * gates[0]
        shares = _shares(first, slopes[1], constants)
    if gates[-1] is not None:  # the last gates need no pass over images
        shares = shares * gates[-1].flatten(-3)
    return shares.sum(1)


def _shares(first: Tensor, last: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
    """The trace by channels of the second layer (B, H_2), of slopes (B, H_1, H, W), ..."""
    plane, *frame = constants
    shares = (F.conv2d(first, plane, padding=plane.shape[-1] // 2) * last).sum((2, 3))
    if not frame:
        return shares
    h1, h2 = first.shape[1], last.shape[1]
    rows, columns, _ = frame
    near = _border(first, rows.shape[1] // h1, columns.shape[1] // h1)
    far = _border(last, rows.shape[0] // (2 * h2), columns.shape[0] // (2 * h2))
    for kernel, d1, d2, groups in zip(frame, near, far, (2, 2, 4), strict=True):
        part = F.conv1d(d1, kernel, padding=kernel.shape[-1] // 2, groups=groups) * d2
        shares = shares + part.unflatten(1, (groups, h2, -1)).sum((1, 3, 4))
    return shares


def _fixed_map(first: Tensor, last: Tensor, size: Sequence[int]) -> Tensor:
    k = min(first.shape[-1], last.shape[-1])
    loops = _middle(first, k).transpose(0, 1) * _middle(last, k).flip(-2, -1)  # (C, H_1, k, k)
    inside = first.new_ones(1, 1, *size)
    return F.conv2d(inside, loops.sum(0).unsqueeze(1), padding=k // 2).squeeze(0)  # (H_1, H, W)


def _middle(kernel: Tensor, k: int) -> Tensor:
    cut = (kernel.shape[-1] - k) // 2
    return kernel[:, :, cut : cut + k, cut : cut + k]


def _places(
    radii: Sequence[int], size: int, like: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Where (p2, p1) may stand on one axis, signed by how [0 <= r < size] counts it.

    That is anywhere, at each p1 - p2; both near 0, for r < 0; both near the end, for r >= size.

    Returns:
        whether p2 - r and r - p1 make a path, (Q, k_3, k_1) of -1, 0 and 1; whether p1 - p2 makes
        one, (Q, k_2); and (2, n_2, n_1), the places at both ends.
    """
    r1, r2, r3 = radii
    n1, n2 = min(r1, size), min(r3, size)
    places = [(0, p1) for p1 in range(-r2, r2 + 1)]
    places += [(p2, p1) for p2 in range(n2) for p1 in range(n1)]
    places += [(p2, p1) for p2 in range(-n2, 0) for p1 in range(-n1, 0)]  # counted from the end
    p2, p1 = torch.tensor(places, device=like.device).unbind(1)
    d1, d2, d3 = (torch.arange(-n, n + 1, device=like.device) for n in radii)
    r = p2.unsqueeze(1) - d3  # (Q, k_3)
    anywhere, start, end = r.split((2 * r2 + 1, n2 * n1, n2 * n1))
    sign = torch.cat((torch.ones_like(anywhere), -(start < 0).long(), -(end >= 0).long()))
    path = sign.unsqueeze(2) * (r.unsqueeze(2) - p1.view(-1, 1, 1) == d1)
    step = (p1 - p2).unsqueeze(1) == d2
    return path.to(like), step.to(like), (2, n2, n1)


def _border(d: Tensor, rows: int, columns: int) -> list[Tensor]:
    """The first and last rows, columns, and the corners where they meet, as channels.

    (B, C, H, W) -> (B, 2 C rows, W), (B, 2 C columns, H), (B, 4 C rows columns, 1).
    """
    height, width = d.shape[2:]
    # In one selection: the backward pass of each one fills a whole image.
    pixels = torch.arange(height * width, device=d.device).view(height, width)
    edges = _ends(pixels, rows), _ends(pixels.t(), columns)  # (2, rows, W), (2, columns, H)
    corners = _ends(edges[0].flatten(0, 1).t(), columns)  # (2, columns, 2 rows)
    places = [*edges, corners.unflatten(2, (2, rows)).transpose(1, 2).flatten(0, 1)]
    found = d.flatten(2).index_select(2, torch.cat([p.flatten() for p in places]))
    parts = found.split([p.numel() for p in places], 2)
    channels = [
        part.unflatten(2, p.shape).transpose(1, 2) for part, p in zip(parts, places, strict=True)
    ]  # (B, 2, C, rows, W), (B, 2, C, columns, H), (B, 4, C, columns, rows)
    row, column, corner = channels
    return [row.flatten(1, 3), column.flatten(1, 3), corner.flatten(1).unsqueeze(2)]


def _ends(p: Tensor, n: int) -> Tensor:
    return torch.stack((p[:n], p[-n:]))
