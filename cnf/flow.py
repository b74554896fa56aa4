"""`Flow`: a base density and a transform; and its view as a torch distribution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.base import Base, DistributionBase, as_base
from cnf.bits import bits_per_dim
from cnf.checks import check_bool, check_count, check_values, tracing
from cnf.distribution import FlowDistribution
from cnf.divergence import Divergence, Exact, as_divergence
from cnf.ode import Solver, TorchDiffEq
from cnf.ode.inputs import check_finite
from cnf.ode.odeint import as_solver
from cnf.regularizers import Regularizer
from cnf.transforms.base import Choices, Transform, over_samples
from cnf.transforms.context import check_context, expand_context
from cnf.transforms.continuous import CNF
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.inputs import check_dtype, check_like
from cnf.transforms.regularization import check_regularization
from cnf.user_modules import has_suspects, refuse_unfit

__all__ = ["Flow"]

_REMEDY = (
    "log_prob is then not the density of one distribution: leave the module out, put it into "
    "eval(), take nn.LayerNorm for a batch norm, or set check_modules = False on the flow"
)


class Flow(nn.Module):
    """A normalizing flow: x = f(z), z ~ p_0, with f invertible.

        log p(x) = log p_0(f^-1(x)) + log |det df^-1/dx|

    Every method takes `solver=` and `generator=`, and those that return densities `divergence=`,
    for that call alone: they reach every `CNF` in the transform. With Hutchinson's estimator
    `log_prob` is random, unbiased, and exactly repeated by a generator of the same seed.

    A transform that ends in a dequantization makes it a flow of integers, such as pixels: then
    `log_prob(x)` is a draw of a lower bound of log P(x), in nats, `bits_per_dim` the bound in bits.

    Args:
        base: a base module, such as `StandardNormal(2)`, or a torch distribution.
        transform: from base to data.

    Attributes:
        check_modules: whether densities and samples are refused while a part of the flow is random
            or mixes the samples of a batch, such as an encoder of context with dropout in
            `train()`. Layers have the same attribute for their own parts, fields
            `Solver(check_field=...)`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a base and a CNF of different event shapes.

    Example:
        >>> import cnf
        >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(cnf.MLPField(2)))
        >>> x = flow.sample((5,))
        >>> x.shape, flow.log_prob(x, divergence="exact").shape
        (torch.Size([5, 2]), torch.Size([5]))

        A flow is exported as its `log_prob`, and its transform as samples x of base samples z, with
        any batch size; also to ONNX, by `torch.onnx.export(..., dynamo=True)`. A `CNF` needs fixed
        steps, `Solver("rk4", steps=20)`. Nothing is checked in a program but shapes and dtypes.

        >>> flow, rows = cnf.RealNVP(2, hidden=(8,)), {0: torch.export.Dim("batch")}
        >>> log_prob = torch.export.export(flow, (x,), dynamic_shapes=(rows,)).module()
        >>> sample = torch.export.export(flow.transform, (x,), dynamic_shapes=(rows,)).module()
        >>> log_prob(sample(flow.base.rsample((100,)))).shape
        torch.Size([100])
    """

    check_modules: bool = True
    checked: bool | None = None  # the training mode in which all parts were found to be fit

    def __init__(self, base: Base | Distribution, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a Transform, got {type(transform).__name__}")
        self.base = as_base(base)
        self.transform = transform
        _check_events(self.base.event_shape, transform)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.transform.event_shape or self.base.event_shape

    def forward(self, x: Tensor, context: Tensor | None = None, **choices: Any) -> Tensor:
        """`log_prob`, so that DDP wraps a flow as any module."""
        return self.log_prob(x, context, **choices)

    @overload
    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = ...,
        *,
        divergence: str | Divergence | None = ...,
        solver: Solver | TorchDiffEq | None = ...,
        generator: torch.Generator | None = ...,
        on_nonfinite: str = ...,
        return_stderr: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = ...,
        *,
        divergence: str | Divergence | None = ...,
        solver: Solver | TorchDiffEq | None = ...,
        generator: torch.Generator | None = ...,
        on_nonfinite: str = ...,
        return_stderr: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
        on_nonfinite: str = "raise",
        return_stderr: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-density (*batch,) of x (*batch, *event); with its standard error, where asked.

        Of integers, a draw of a lower bound of their log-probability: the mean over draws of the
        noise is at most log P(x).

        Outside the support, where the density is zero, it is -inf: no error, and no change to the
        other rows. A base on intervals or half-lines is widened by the error of a solve, 50 times
        the solver's tolerance (of the width of an interval, of the standard deviation on a
        half-line).
        Rows so far out that a discrete flow overflows on its way to the base are -inf, too.

        Args:
            x: data.
            context: conditions (*batch, C), or broadcastable to it.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.
            generator: source of the estimator's noise, and of dequantization's.
            on_nonfinite: "raise" refuses rows of x or context that are not finite; "nan" gives
                them NaN, and the others the value that they have without them.
            return_stderr: whether to return the standard error of each log-density too, from the
                spread of k >= 2 independent probes over one solve: sqrt(var / k), summed over the
                CNFs in quadrature; zero where the divergence is exact. It says nothing of the noise
                on integers: see `bits_per_dim`.

        Returns:
            log p(x) (*batch,), or log p(x) and its standard error (*batch,).

        Raises:
            SolverError: a solve that cannot end.
            TypeError: x of a wrong dtype.
            ValueError: x of a wrong shape or not finite; a standard error of less than two probes
                or of orthogonal ones.

        Example:
            >>> import cnf
            >>> flow, x = cnf.FFJORD(8), torch.randn(5, 8)
            >>> estimate = cnf.Hutchinson(probes=16)
            >>> log_prob, stderr = flow.log_prob(x, divergence=estimate, return_stderr=True)
            >>> log_prob.shape, stderr.shape
            (torch.Size([5]), torch.Size([5]))
        """
        self._check_shape(x)
        choices = _choices(divergence, solver, generator)
        if on_nonfinite not in ("raise", "nan"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} is not known; use 'raise' or 'nan'")
        check_bool("return_stderr", return_stderr)
        if return_stderr:
            choices["variances"] = []
        if on_nonfinite == "raise":
            found = self._log_prob(x, context, choices)
        else:
            found = self._log_prob_of_finite(x, context, choices)
        return (found[0], found[1]) if return_stderr else found[0]

    def _log_prob(self, x: Tensor, context: Tensor | None, choices: Choices) -> list[Tensor]:
        """Log-density (*batch,), and its standard error where variances are asked for."""
        self._check_modules()
        far = self._check_values(x, context, choices)
        z, log_det = self.transform.inverse_and_log_det(x, context, **choices)
        log_prob = self._joined(z, self._of_samples(log_det, x), choices)
        if far is not None:
            log_prob = self._without_overflow(log_prob, far, x, context, choices)
        if "variances" not in choices:
            return [log_prob]
        variance = sum(choices["variances"], torch.zeros_like(log_prob))
        return [log_prob, variance.sqrt().detach()]

    def _joined(self, z: Tensor, log_det: Tensor, choices: Choices) -> Tensor:
        """log p_0(z) + log_det (*batch,) for z that the transform computed."""
        if not (isinstance(self.base, DistributionBase) and self.base.bounded):
            log_prob = self.base.log_prob(z) + log_det
            if self.transform.bounded:  # no gradient, where only some numbers lie outside, too
                log_prob = log_prob.masked_fill(log_det == -torch.inf, -torch.inf)
            return log_prob
        parts = (part for part in self.transform.modules() if isinstance(part, CNF))
        solvers = [as_solver(choices.get("solver", part.solver)) for part in parts]
        tolerances = [max(solver.rtol, solver.atol) for solver in solvers]
        log_prob = self.base.log_prob(z, 50 * max(tolerances) if tolerances else None)
        # At an end of its support a density may be infinite: not so where no z is mapped to x.
        return torch.where(log_det == -torch.inf, log_det, log_prob + log_det)

    def log_prob_and_integrals(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        regularizers: Sequence[Regularizer] = (),
        steer: float = 0.0,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-density (*batch,) and what regularisers integrate on the way (*batch, n).

        Args:
            x: data.
            context: conditions (*batch, C), or broadcastable to it.
            regularizers: n of them; each integral is the sum over all CNFs, without its weight.
            steer: every CNF ends at a time drawn uniformly within this distance of its end, one
                for the batch; see `MaximumLikelihood`.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.
            generator: source of all noise.

        Raises:
            SolverError: a solve that cannot end.
            TypeError: a regulariser that is none, or not for this flow's fields.
            ValueError: a flow without a CNF, two regularisers of one name, too large a steer.

        Example:
            >>> import cnf
            >>> flow, x = cnf.FFJORD(2), torch.randn(5, 2)
            >>> penalties = [cnf.KineticEnergy(0.01), cnf.JacobianFrobenius(0.01)]
            >>> log_prob, integrals = flow.log_prob_and_integrals(x, regularizers=penalties)
            >>> log_prob.shape, integrals.shape
            (torch.Size([5]), torch.Size([5, 2]))
        """
        self._check_shape(x)
        check_regularization(self.transform, regularizers, steer)
        choices = _choices(divergence, solver, generator)
        choices["regularizers"] = tuple(regularizers)
        choices["integrals"] = []
        choices["steer"] = steer
        (log_prob,) = self._log_prob(x, context, choices)
        none = log_prob.new_zeros((*log_prob.shape, len(regularizers)))
        return log_prob, sum(choices["integrals"], none)

    def bits_per_dim(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        samples: int = 1,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
        return_stderr: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Bits for each dimension of integers x (*batch, *event): the codelength, from above.

            -log2( 1/k sum_j w_j ) / D,    w_j = p(y_j) / (L^D q(u_j | x)),  y_j = (x + u_j) / L

        In the mean it is at least -log2 P(x) / D, and comes nearer with more draws (importance
        weights). Where a divergence is estimated, whose noise would make such weights overstate the
        likelihood, it is the mean of the k bounds, -1/k sum_j log2(w_j) / D.

        Args:
            x: integers, as the flow's dequantization expects them.
            context: conditions (*batch, C), or broadcastable to it.
            samples: k, the number of draws of the noise, one after the other.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call.
            solver: a solver, for this call.
            generator: source of all noise.
            return_stderr: whether to return the standard error of each value too, from the spread
                of k >= 2 draws.

        Returns:
            bits (*batch,), or bits and their standard errors (*batch,).

        Raises:
            SolverError: a solve that cannot end.
            TypeError: a flow of real numbers; x that are not integers.
            ValueError: x that are not of the flow's levels; a standard error of one draw.

        Reference: Burda et al., arXiv 1509.00519; Ho et al., arXiv 1902.00275.

        Example:
            >>> import cnf
            >>> ends = cnf.Sigmoid(), cnf.UniformDequantization(4)
            >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(*ends))
            >>> x = torch.tensor([[0, 3], [1, 2]])
            >>> bits, stderr = flow.bits_per_dim(x, samples=100, return_stderr=True)
            >>> bits.shape, stderr.shape
            (torch.Size([2]), torch.Size([2]))
        """
        check_count("samples", samples)
        check_bool("return_stderr", return_stderr)
        if not self.transform.quantized:
            raise TypeError(
                "bits_per_dim needs integers, and a flow whose transform ends in a dequantization: "
                "cnf.Compose(transform, cnf.Sigmoid(), cnf.UniformDequantization(levels)); for "
                "real numbers use log_prob"
            )
        levels = self.transform.levels
        if isinstance(levels, tuple) and None in levels:
            raise TypeError(
                f"bits_per_dim needs integers in all columns, but levels={levels} has None for "
                "real ones; use log_prob"
            )
        if return_stderr and samples < 2:
            raise ValueError(f"return_stderr=True needs samples of 2 or more, got {samples}")
        self._check_shape(x)
        choices = _choices(divergence, solver, generator)
        weights = torch.stack([self._log_prob(x, context, choices)[0] for _ in range(samples)])
        bits, stderr = bits_per_dim(weights, self.event_shape, self._averages(choices))
        return (bits, stderr) if return_stderr else bits

    def score(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
    ) -> Tensor:
        """The score of the density at x (*batch, *event): grad_x log p(x).

        Outside the support, where log p(x) is -inf, there is none: NaN.

        Args:
            x: data.
            context: conditions (*batch, C), or broadcastable to it.
            divergence: "exact", "hutchinson" or a `Divergence`, for this call; an estimate makes
                the score one too.
            solver: a solver, for this call.
            generator: source of the estimator's noise.
            create_graph: whether the score shall be differentiable itself, which needs
                gradient="backprop" and compile=False.

        Raises:
            RuntimeError: create_graph with a solver that has no second derivatives.
            SolverError: a solve that cannot end.
            TypeError: a flow of integers.

        Example:
            >>> import cnf
            >>> flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(lambda t, x: 0 * x, "exact"))
            >>> flow.score(torch.tensor([[1.0, -2.0]]))
            tensor([[-1.,  2.]])
        """
        self._check_shape(x)
        self._check_real("score", "they have no density to differentiate")
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "score takes its own derivative, which cannot be used under torch.func; there use "
                "torch.func.grad of log_prob: vmap(grad(lambda x: flow.log_prob(x[None])[0]))(x)"
            )
        choices = _choices(divergence, solver, generator)
        with torch.inference_mode(False), torch.enable_grad():
            if not (create_graph and x.requires_grad):
                x = x.clone().detach().requires_grad_(x.is_floating_point())
            (log_prob,) = self._log_prob(x, context, choices)
            total = log_prob.sum() + 0.0 * x.sum()  # a uniform density has no graph
            (score,) = torch.autograd.grad(total, x, create_graph=create_graph)
        if create_graph and not score.requires_grad:
            raise RuntimeError(
                "this solver gives a score without a gradient of its own; use "
                "cnf.Solver(gradient='backprop', compile=False)"
            )
        unknown = ~log_prob.isfinite().reshape((*log_prob.shape, *[1] * len(self.event_shape)))
        return score.masked_fill(unknown, torch.nan)

    def trajectory(
        self,
        z: Tensor,
        times: Iterable[float] | Tensor,
        context: Tensor | None = None,
        *,
        solver: Solver | TorchDiffEq | None = None,
    ) -> Tensor:
        """The path of base samples z to the data: x (T, *batch, *event) at given times.

        Args:
            z: base samples (*batch, *event), as `flow.base.rsample((n,))` draws them.
            times: strictly monotone, from the base time (0) towards the data time (1), (T,).
            context: conditions (*batch, C), or broadcastable to it.
            solver: a solver, for this call.

        Raises:
            SolverError: a solve that cannot end.
            TypeError: a flow of another transform than one CNF.
            ValueError: times that are not finite, beyond the span, or not in order.

        Example:
            >>> import cnf
            >>> flow = cnf.FFJORD(2)
            >>> flow.trajectory(flow.base.rsample((5,)), [0, 0.5, 1]).shape
            torch.Size([3, 5, 2])
        """
        self._check_shape(z)
        if not isinstance(self.transform, CNF):
            raise TypeError(
                f"the path of a {type(self.transform).__name__} has no times of its own; where "
                "flow.transform holds CNFs, call their trajectory, one after the other"
            )
        return self.transform.trajectory(z, times, context, **_choices(None, solver, None))

    def sample(
        self,
        shape: tuple[int, ...] | int = (),
        context: Tensor | None = None,
        *,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples (*shape, *context_batch, *event), without gradient; of a flow of integers, those.

        Args:
            shape: how many; an int n means (n,).
            context: conditions (*context_batch, C).
            solver: a solver, for this call.
            generator: source of randomness.
        """
        with torch.no_grad():
            return self._sample(shape, context, _choices(None, solver, generator))

    def rsample(
        self,
        shape: tuple[int, ...] | int = (),
        context: Tensor | None = None,
        *,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples as `sample`, differentiable in parameters and context (reparameterised).

        Raises:
            TypeError: a flow of integers, whose samples have no gradient.
        """
        self._check_real("rsample", "they have no gradient; use sample")
        return self._sample(shape, context, _choices(None, solver, generator))

    def _sample(
        self, shape: tuple[int, ...] | int, context: Tensor | None, choices: Choices
    ) -> Tensor:
        z = self._draw(shape, context, choices.get("generator"))
        return self.transform.forward(z, context, **choices)

    def sample_and_log_prob(
        self,
        shape: tuple[int, ...] | int = (),
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities from one solve, without gradient.

        Of a flow of integers, samples and then `log_prob` of them: two solves, since the noise that
        a sample was made with overstates its likelihood.

        Returns:
            x (*shape, *context_batch, *event) and log p(x) (*shape, *context_batch).
        """
        with torch.no_grad():
            if self.transform.quantized:
                choices = _choices(divergence, solver, generator)
                x = self._sample(shape, context, choices)
                return x, self._log_prob(x, context, choices)[0]
            return self.rsample_and_log_prob(
                shape, context, divergence=divergence, solver=solver, generator=generator
            )

    def rsample_and_log_prob(
        self,
        shape: tuple[int, ...] | int = (),
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sample_and_log_prob`, differentiable in parameters and context (reparameterised)."""
        self._check_real("rsample_and_log_prob", "they have no gradient; use sample_and_log_prob")
        choices = _choices(divergence, solver, generator)
        return self._carry(self._draw(shape, context, generator), context, choices)

    def distribution(
        self,
        context: Tensor | None = None,
        *,
        divergence: str | Divergence | None = None,
        solver: Solver | TorchDiffEq | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowDistribution:
        """The flow, given context, as a `torch.distributions.Distribution`.

        Args:
            context: conditions (*batch, C); the batch is the distribution's batch shape.
            divergence: "exact", "hutchinson" or a `Divergence`, for all its calls.
            solver: a solver, for all its calls.
            generator: source of randomness, for all its calls.

        Example:
            >>> import cnf
            >>> q = cnf.FFJORD(2, context=3).distribution(torch.randn(4, 3))
            >>> q.batch_shape, q.event_shape, q.rsample((10,)).shape
            (torch.Size([4]), torch.Size([2]), torch.Size([10, 4, 2]))
        """
        if context is not None:
            check_context(context)
        return FlowDistribution(self, context, **_choices(divergence, solver, generator))

    def _carry(self, z: Tensor, context: Tensor | None, choices: Choices) -> tuple[Tensor, Tensor]:
        """x (*batch, *event) of base samples z, and log p(x) (*batch,)."""
        x, log_det = self.transform.forward_and_log_det(z, context, **choices)
        return x, self.base.log_prob(z) - self._of_samples(log_det, x)

    def _draw(
        self,
        shape: tuple[int, ...] | int,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Base samples (*shape, *context_batch, *event)."""
        if context is not None:
            check_context(context)
        self._check_modules()
        self._check_values(None, context, {})
        batch = () if context is None else tuple(context.shape[:-1])
        z = self.base.rsample((*_sample_shape(shape), *batch), generator)
        if z.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"the flow's base draws {z.dtype}, but states and log-densities are never below "
                "float32; use flow.float()"
            )
        return z

    def _of_samples(self, log_det: Tensor, x: Tensor) -> Tensor:
        """(*batch,), also where the transform tells that of every number of x."""
        return over_samples(log_det, x.ndim - len(self.event_shape))

    def _check_modules(self) -> None:
        """Refuse parts that are random or mix samples; most transforms look after their own."""
        compiling = torch.compiler.is_compiling()
        if self.check_modules and (compiling or self.checked != self.training):
            apart = (CNF, DiscreteTransform)
            refuse_unfit(self, type(self).__name__, _REMEDY, apart)
            if not (compiling or has_suspects(self, apart)):
                self.checked = self.training

    def _check_shape(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x)")
        event = self.event_shape
        if x.ndim < len(event) or tuple(x.shape[x.ndim - len(event) :]) != event:
            expected = f"(..., D={event[0]})" if len(event) == 1 else f"(..., {str(event)[1:-1]})"
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {expected}")

    def _check_values(
        self, x: Tensor | None, context: Tensor | None, choices: Choices
    ) -> Tensor | None:
        """Refuse x and context that are not finite; a `CNF` checks most of it itself.

        Returns the rows of x (*batch,) that are so far out that a layer may overflow, if there are
        any; where values cannot be looked at, whether there are.
        """
        if isinstance(self.transform, CNF):
            if x is not None and not x.is_meta and self.transform.gives_up(choices):
                check_finite(x, x.ndim - len(self.event_shape))
            return None
        far = None
        if x is not None and not self.transform.quantized:  # a dequantization checks its integers
            check_dtype(x, self.transform)
            check_like(x, self.transform)
            far = _far(x, x.ndim - len(self.event_shape))
        if context is not None:
            check_context(context)
            check_finite(context, context.ndim - 1, "context")
        return far

    def _without_overflow(
        self, log_prob: Tensor, far: Tensor, x: Tensor, context: Tensor | None, choices: Choices
    ) -> Tensor:
        """-inf for rows far out whose log-density (*batch,) is NaN because a layer overflowed.

        A CNF tells overflow itself, and has NaN where its solver was told to.
        """
        if any(isinstance(part, CNF) for part in self.transform.modules()):
            return log_prob
        lost = far & log_prob.isnan()
        if not tracing() and bool(lost.any()):  # once more without them: their gradient is NaN
            rows = lost.reshape((*lost.shape, *[1] * len(self.event_shape)))
            log_prob = self._log_prob(x.masked_fill(rows, 0.0), context, choices)[0]
            lost = lost & ~log_prob.isnan()  # where 0 has NaN, too, it is the parameters
        return log_prob.masked_fill(lost, -torch.inf)

    def _check_real(self, method: str, why: str) -> None:
        """Refuse a flow of integers."""
        if self.transform.quantized:
            raise TypeError(
                f"{method} is for flows of real numbers; this one is of integers: {why}"
            )

    def _averages(self, choices: Choices) -> bool:
        """Whether log-densities are estimates, which may be averaged but not be weights."""
        used = (part.divergence for part in self.transform.modules() if isinstance(part, CNF))
        return any(not isinstance(as_divergence(choices.get("divergence", d)), Exact) for d in used)

    def _log_prob_of_finite(
        self, x: Tensor, context: Tensor | None, choices: Choices
    ) -> list[Tensor]:
        """The same, with NaN for rows of x or context that are not finite."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        finite = x.isfinite().unsqueeze(-1).flatten(len(batch)).all(-1)  # (*batch,)
        if context is not None:
            context = expand_context(context, batch)
            finite = finite & context.isfinite().all(-1)
            context = context[finite]
        found = self._log_prob(x[finite], context, choices)
        unknown = found[0].new_full(batch, torch.nan)
        return [unknown.masked_scatter(finite, values) for values in found]


def _far(x: Tensor, batch_dims: int) -> Tensor | None:
    """Rows (*batch,) with a number so large that its square, times a weight, is none; else None.

    Raises:
        ValueError: x not finite.
    """
    bound = torch.finfo(x.dtype).max ** 0.4
    check_values(x, "x")
    if not tracing() and x.numel():
        size = torch.linalg.vector_norm(x.detach(), torch.inf).item()
        if size < bound:
            return None
        check_finite(x, batch_dims)
    return (x.detach().abs() > bound).unsqueeze(-1).flatten(batch_dims).any(-1)


def _check_events(event_shape: tuple[int, ...], transform: Transform) -> None:
    """Refuse a transform that reads samples of another shape than the base draws."""
    if transform.base_shape not in (None, event_shape):
        raise ValueError(
            f"base has event_shape {event_shape}, but the transform reads base samples of shape "
            f"{transform.base_shape}"
        )
    for part in transform.modules():
        if isinstance(part, CNF) and part.event_dims != len(event_shape):
            raise ValueError(
                f"base has event_shape {event_shape}, but the CNF has event_dims="
                f"{part.event_dims}; use CNF(field, ..., event_dims={len(event_shape)})"
            )


def _choices(
    divergence: str | Divergence | None,
    solver: Solver | TorchDiffEq | None,
    generator: torch.Generator | None,
) -> Choices:
    """What a call chose, checked, and nothing else."""
    choices: Choices = {}
    if divergence is not None:
        choices["divergence"] = as_divergence(divergence)
    if solver is not None:
        choices["solver"] = as_solver(solver)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}; "
                "use torch.Generator().manual_seed(seed)"
            )
        choices["generator"] = generator
    return choices


def _sample_shape(shape: tuple[int, ...] | int) -> tuple[int, ...]:
    """The shape of samples, checked; an int n means (n,)."""
    if isinstance(shape, Tensor) and shape.ndim:
        raise TypeError(
            f"sample shape is a tensor of shape {tuple(shape.shape)}; it comes before context: use "
            "sample((), context) for one sample a row, sample((n,), context) for n"
        )
    sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
    if not all(hasattr(n, "__index__") and not isinstance(n, bool) for n in sizes):
        raise TypeError(f"sample shape {shape!r} must be an integer or a tuple of integers")
    if any(n < 0 for n in sizes):
        raise ValueError(f"sample shape {shape!r} must not be negative")
    return tuple(n if isinstance(n, torch.SymInt) else int(n) for n in sizes)
