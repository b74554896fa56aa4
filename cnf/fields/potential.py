"""OT-Flow's vector field: the negative gradient of a learned potential."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks import check_count
from cnf.fields.activations import Tanh, value_and_slope
from cnf.fields.base import Constants, VectorField, check_sizes
from cnf.fields.closed_form import is_linear, refuse_hooks

__all__ = ["PotentialField"]

_TANH = Tanh()
_NUMBERS_ON_CPU = 2**18  # in one piece of J: larger ones leave the cache, and took thrice as long
_LINEAR_ABOVE = 40.0  # where softplus(a) = a in float64 too


class PotentialField(VectorField):
    """A vector field that is the negative gradient of a potential, as optimal transport's is.

        f(t, x, c) = -grad_x Phi(s),    s = (x, t, c)
        Phi(s) = w^T u_{M-1}(s) + |A s|^2 / 2 + b^T s
        u_0 = sigma(K_0 s + b_0),    u_i = u_{i-1} + h sigma(K_i u_{i-1} + b_i),    h = 1 / (M - 1)
        sigma(a) = log(e^a + e^-a), whose derivative is tanh

    Its Jacobian is symmetric, and its exact divergence, minus the Laplacian of Phi, has a closed
    form, with the z_i of the backward pass and J_i = du_i/dx:

        div f = -sum_k tanh'(a_0)_k z_{1,k} |(K_0 E)_k|^2 - |A E|^2
                -h sum_{i>0} sum_k tanh'(a_i)_k z_{i+1,k} |(K_i J_{i-1})_k|^2

    For M layers of width m it costs at most (M - 1) min(D, 2 m) products with an m x m matrix, more
    than an estimate where D is large. Hutchinson's estimate has the same form, with J_i e in the
    place of J_i. `potential` and `potential_gradient` are there for regularisers.

    Args:
        features: dimensions of a sample, D, or its shape, such as (C, H, W).
        hidden: widths of the M layers of the residual network, all equal.
        context: number of context features, 0 for none.
        rank: number of rows of A; None for min(10, D + 1).

    Shapes:
        t (), x (B, *event), context (B, C) -> (B, *event).

    Raises:
        ValueError: widths that differ, sizes that are not positive, x or context of a wrong shape.

    Reference: OT-Flow, Onken et al., arXiv 2006.00104.

    Example:
        >>> field = PotentialField(2, hidden=(32, 32))
        >>> t, x = torch.tensor(0.5), torch.randn(10, 2)
        >>> field(t, x).shape, field.potential(t, x).shape
        (torch.Size([10, 2]), torch.Size([10]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        rank: int | None = None,
    ) -> None:
        super().__init__(features, context)
        check_sizes("hidden", hidden)
        if len(set(hidden)) != 1:
            raise ValueError(
                f"hidden={tuple(hidden)!r} must be one or more equal widths, such as (64, 64): "
                "the layers of a residual network"
            )
        rank = min(10, self.dims + 1) if rank is None else rank
        check_count("rank", rank)
        width, inputs = hidden[0], self.dims + 1 + context
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in pairwise([inputs, *hidden])
        )
        self.step = 1 / max(1, len(hidden) - 1)  # h
        # Of both signs, unlike OT-Flow's ones: a fresh field is of the order of x, in any width.
        self.w = nn.Parameter(torch.empty(width).uniform_(-1, 1) / width**0.5)
        self.A = nn.Parameter(torch.empty(rank, inputs).uniform_(-1, 1) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(inputs))

    @property
    def closed_form(self) -> bool:  # type: ignore[override]
        """Whether the layers are what they were built as; then both closed forms hold."""
        return all(map(is_linear, self._linears()))

    closed_quadratic_form = closed_form

    batched_time = True

    def potential(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Phi (B,) at time t () and state x (B, *event), given context (B, C).

        Example:
            >>> field = PotentialField(2)
            >>> field.potential(torch.tensor(0.5), torch.randn(10, 2)).shape
            torch.Size([10])
        """
        self._check(x, context)
        s = self._inputs(t, x.reshape(x.shape[0], self.dims), context)
        first, *others = self._linears()
        u = _log_cosh(first(s))
        for layer in others:
            u = u + self.step * _log_cosh(layer(u))
        return u @ self.w + 0.5 * F.linear(s, self.A).square().sum(-1) + s @ self.b

    def potential_gradient(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """grad_x Phi (B, *event) and dPhi/dt (B,), at the cost of f.

        Along an optimal transport dPhi/dt = |grad_x Phi|^2 / 2, the Hamilton-Jacobi-Bellman
        equation.

        Example:
            >>> field = PotentialField(2)
            >>> gradient, slope = field.potential_gradient(torch.tensor(0.5), torch.randn(10, 2))
            >>> residual = slope - gradient.square().sum(-1) / 2
        """
        self._check(x, context)
        s = self._inputs(t, x.reshape(x.shape[0], self.dims), context)
        gradient, *_ = self._evaluate(s, self.dims + 1)
        return gradient[:, :-1].reshape(x.shape), gradient[:, -1]

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """dx/dt (B, D) at x (B, D)."""
        s = self._inputs(t, x, context)
        gradient, *_ = self._evaluate(s, self.dims)
        return -gradient

    def divergence_constants(self) -> Constants:
        """(K_0 E)^T (D, m) or its Gram matrix (m, m), the |(K_0 E)_k|^2 (m,), and |A E|^2 ()."""
        k = self._first_weight()[: self.dims]
        norms, trace = k.square().sum(0), self.A[:, : self.dims].square().sum()
        return (k.t() @ k if self._by_gram() else k), norms, trace

    def derivative_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and its divergence (B,)."""
        start, norms, trace = constants
        s = self._inputs(t, x, context)
        gradient, slopes, curvatures = self._evaluate(s, self.dims)
        squares = self._squares(start, slopes)
        laplacian = trace
        for curvature, square in zip(curvatures, [norms, *squares], strict=True):
            laplacian = laplacian + (curvature * square).sum(-1)
        return -gradient, -laplacian

    def quadratic_form_constants(self, probes: Tensor) -> Constants:
        """K_0 E e (B, k, m) and |A E e|^2 (B, k) for probes e (B, k, *event)."""
        e = self._flat_probes(probes)
        quadratic = F.linear(e, self.A[:, : self.dims]).square().sum(-1)
        return e @ self._first_weight()[: self.dims], quadratic

    def derivative_and_quadratic_form(
        self, t: Tensor, x: Tensor, context: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """dx/dt (B, D) at x (B, D), and e^T J e (B, k)."""
        start, form = constants
        s = self._inputs(t, x, context)
        gradient, slopes, curvatures = self._evaluate(s, self.dims)
        tangents = [start, *self._tangents(start, slopes)]
        for curvature, v in zip(curvatures, tangents, strict=True):
            form = form + (curvature.unsqueeze(-2) * v * v).sum(-1)
        return -gradient, -form

    def _inputs(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """s = (x, t, c) (B, D + 1 + C)."""
        parts = [x, t.unsqueeze(-1).expand(x.shape[0], 1)]
        return torch.cat(parts if context is None else [*parts, context], -1)

    def _linears(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.layers))

    def _first_weight(self) -> Tensor:
        """K_0^T (D + 1 + C, m): products with its few rows are faster than with K_0's columns."""
        first = self._linears()[0]
        refuse_hooks(first)
        return first.weight.t().contiguous()

    def _evaluate(self, s: Tensor, columns: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """OT-Flow's passes forward and backward.

        Returns:
            The first columns of grad_s Phi (B, columns); of each layer, tanh(a_i) (B, m) and the
            factors of the squares in the Laplacian, h tanh'(a_i) z_{i+1} (B, m).
        """
        weight, u = self._first_weight(), s
        layers, slopes, seconds, curvatures = self._linears(), [], [], []
        for i, layer in enumerate(layers):
            a = layer(u) if i else torch.addmm(layer.bias, s, weight)
            if i + 1 < len(layers):
                sigma, d, dd = _log_cosh_and_slopes(a)
                u = u + self.step * sigma if i else sigma
            else:  # of the last layer the backward pass needs no value
                d, dd = value_and_slope(_TANH, a)
            slopes.append(d)
            seconds.append(dd)
        z = self.w.expand_as(slopes[0])
        for i in range(len(layers) - 1, 0, -1):
            curvatures.append(self.step * seconds[i] * z)  # z_{i+1}
            z = torch.addmm(z, slopes[i] * z, layers[i].weight, alpha=self.step)  # z_i
        curvatures.append(seconds[0] * z)
        gradient = F.linear(slopes[0] * z, weight[:columns]) + self.b[:columns]
        gradient = torch.addmm(gradient, F.linear(s, self.A), self.A[:, :columns])
        return gradient, slopes, curvatures[::-1]

    def _tangents(self, start: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
        """K_i J_{i-1} v (B, r, m), i = 1 ... M - 1, for K_0 E v (r, m) or (B, r, m)."""
        tangents: list[Tensor] = []
        v = start * slopes[0].unsqueeze(-2)
        for i, layer in enumerate(self._linears()[1:]):
            if i:
                v = torch.addcmul(v, slopes[i].unsqueeze(-2), tangents[-1], value=self.step)
            tangents.append(F.linear(v, layer.weight))
        return tangents

    def _squares(self, start: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
        """|(K_i J_{i-1})_k|^2 (B, m), i = 1 ... M - 1, with `start` from the constants."""
        squares = self._squares_by_gram if self._by_gram() else self._squares_by_columns
        rows = max(1, _NUMBERS_ON_CPU // start.numel())
        if torch.compiler.is_compiling() or start.is_cuda or len(slopes[0]) <= rows:
            return squares(start, slopes)
        parts = zip(*(d.split(rows) for d in slopes), strict=True)
        pieces = [squares(start, part) for part in parts]
        return [torch.cat(piece) for piece in zip(*pieces, strict=True)]

    def _by_gram(self) -> bool:
        """Whether D is so large that (K_0 E)(K_0 E)^T is cheaper to carry than the D columns."""
        layers, width = len(self.layers) - 1, len(self.w)
        return self.dims * layers > width * (2 * layers - 1)

    def _squares_by_columns(self, start: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
        """From the D columns of K_0 E."""
        return [v.square().sum(-2) for v in self._tangents(start, slopes)]

    def _squares_by_gram(self, gram: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
        """|(K_i J_{i-1})_k|^2 (B, m), i = 1 ... M - 1, as the diagonal of R G R^T.

        J_{i-1} = T K_0 E and R = K_i T, so that D enters through G alone.
        """
        squares: list[Tensor] = []
        r = t = gram
        for i, layer in enumerate(self._linears()[1:]):
            if i == 0:
                t = torch.diag_embed(slopes[0])
                r = layer.weight * slopes[0].unsqueeze(-2)
            else:
                t = torch.addcmul(t, slopes[i].unsqueeze(-1), r, value=self.step)
                r = layer.weight @ t
            squares.append((r @ gram * r).sum(-1))
        return squares


def _log_cosh(a: Tensor) -> Tensor:
    """sigma(a) = log(e^a + e^-a), in a form that neither overflows nor has a kink."""
    return a + F.softplus(-2 * a, threshold=_LINEAR_ABOVE)


class _LogCoshAndSlopes(torch.autograd.Function):
    """(sigma, d, dd), the second being tanh; its backward pass is three kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return _log_cosh(a), *value_and_slope(_TANH, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.save_for_forward(*output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, gd: Tensor, gdd: Tensor) -> Tensor:
        d, dd = ctx.saved_tensors
        return torch.addcmul(g * d, torch.addcmul(gd, gdd, d, value=-2), dd)

    @staticmethod
    def jvp(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d, dd = ctx.saved_tensors
        return d * da, dd * da, -2 * d * dd * da


def _log_cosh_and_slopes(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma(a), sigma'(a) = tanh(a) and sigma''(a) = 1 - tanh(a)^2, of any shape."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        triple: tuple[Tensor, Tensor, Tensor] = _LogCoshAndSlopes.apply(a)
        return triple
    return _log_cosh(a), *value_and_slope(_TANH, a)
