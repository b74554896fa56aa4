"""diffrax under jit: the user code of its CNF notebook, with the weights of the others.

The batch is one system, with one step size as the torch peers have it; "vmapped" solves every
sample by itself, as the notebook does. Evaluations are told from the steps: dopri5 makes six a
step, one before the first, and two to choose its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _peer import Contestant
from _problem import Problem, make_noise
from torch import Tensor


class RK4(diffrax.AbstractERK):
    """The 3/8 rule, torchdiffeq's "rk4": diffrax has no fourth-order method of four stages."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])),
        b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
        b_error=np.zeros(4),  # no embedded method: for constant steps
        c=np.array([1 / 3, 2 / 3, 1.0]),
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    )

    def order(self, terms: object) -> int:
        """Four."""
        return 4


def perceptron(params: Any, t: Any, x: Any) -> Any:
    """The network at x (..., D)."""
    h = jnp.concatenate((x, jnp.broadcast_to(t, (*x.shape[:-1], 1))), -1)
    *hidden, (weight, bias) = params
    for w, b in hidden:
        h = jnp.tanh(h @ w.T + b)
    return h @ weight.T + bias


def augmented(t: Any, state: Any, args: Any) -> Any:
    """(dx/dt, tr df/dx) by reverse mode, with noise e, or exact where e is None."""
    params, e = args
    x = state[0]
    dx, pull = jax.vjp(lambda x: perceptron(params, t, x), x)
    if e is not None:
        return dx, (pull(e)[0] * e).sum(-1)
    basis = jnp.broadcast_to(jnp.eye(x.shape[-1]), (*x.shape[:-1], x.shape[-1], x.shape[-1]))
    (rows,) = jax.vmap(pull)(jnp.moveaxis(basis, -2, 0))  # (D, ..., D)
    return dx, jnp.einsum("i...i->...", rows)


def integrate(problem: Problem, term: Any, y: Any, args: Any, span: Any, adjoint: Any) -> Any:
    """The end of a solve and its evaluations."""
    sign = 1.0 if span[1] > span[0] else -1.0
    if problem.fixed:
        solver, dt, control = RK4(), sign / problem.steps, diffrax.ConstantStepSize()
    else:
        control = diffrax.PIDController(rtol=problem.tol, atol=problem.tol)
        solver, dt = diffrax.Dopri5(), None
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(term), solver, *span, dt, y, args, stepsize_controller=control,
        adjoint=adjoint,
    )  # fmt: skip
    steps = solution.stats["num_steps"]
    nfe = 4 * steps if problem.fixed else 6 * steps + 3
    return jax.tree_util.tree_map(lambda leaf: leaf[-1], solution.ys), nfe


def log_prob(problem: Problem, adjoint: Any, *, vmapped: bool) -> Callable[..., Any]:
    """Mean log-likelihood and evaluations, a function of (params, x, e)."""

    def of_batch(params: Any, x: Any, e: Any) -> Any:
        state = (x, jnp.zeros(x.shape[:-1]))
        span = (1.0, 0.0)
        (z, log_det), nfe = integrate(problem, augmented, state, (params, e), span, adjoint)
        constant = 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi)
        return log_det - 0.5 * (z**2).sum(-1) - constant, nfe

    batched = jax.vmap(of_batch, (None, 0, 0)) if vmapped else of_batch

    def mean(params: Any, x: Any, e: Any) -> Any:
        values, nfe = batched(params, x, e)
        return values.mean(), nfe.max()

    return mean


class Solves:
    """The arrays of a problem, and the contestants made of them."""

    def __init__(self, problem: Problem) -> None:
        if problem.method not in ("rk4", "dopri5"):
            raise NotImplementedError("written for rk4 and dopri5")
        if problem.x.device.type != "cpu":
            raise NotImplementedError("on the CPU only")
        self.problem = problem
        self.params = [tuple(jnp.asarray(p.numpy()) for p in pair) for pair in problem.weights()]
        self.x = jnp.asarray(problem.x.numpy())
        self.key = jax.random.key(0)
        shape = self.x.shape
        self.draw = jax.jit(lambda key: jax.random.rademacher(key, shape, jnp.float32))

    def noise(self) -> Any:
        """New noise e, or None for the exact trace."""
        if self.problem.trace == "exact":
            return None
        self.key, key = jax.random.split(self.key)
        return self.draw(key)

    def same_noise(self) -> Any:
        """The noise that the torch contestants draw from the seed 0."""
        torch.manual_seed(0)
        same = make_noise(self.problem)
        return None if same is None else jnp.asarray(same.numpy())

    def training(self, name: str, adjoint: Any, *, vmapped: bool = False) -> Contestant:
        """Value and gradient of the mean log-likelihood in the parameters."""
        mean = log_prob(self.problem, adjoint, vmapped=vmapped)

        def loss(params: Any, x: Any, e: Any) -> Any:
            value, nfe = mean(params, x, e)
            return -value, nfe

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def run(e: Any = None) -> Any:
            result = step(self.params, self.x, self.noise() if e is None else e)
            return jax.block_until_ready(result)

        def check() -> tuple[Tensor, Tensor]:
            (value, nfe), grads = run(self.same_noise())
            made.nfe = (int(nfe), None)
            flat = np.concatenate([np.ravel(g) for g in jax.tree_util.tree_leaves(grads)])
            return torch.tensor(float(value)), torch.from_numpy(flat)

        made = Contestant(name, run, check, in_torch=False)
        return made

    def evaluation(self, name: str, *, vmapped: bool = False) -> Contestant:
        """Mean log-likelihood without gradient."""
        step = jax.jit(log_prob(self.problem, _default(), vmapped=vmapped))

        def run(e: Any = None) -> Any:
            result = step(self.params, self.x, self.noise() if e is None else e)
            return jax.block_until_ready(result)

        def check() -> tuple[Tensor, None]:
            value, nfe = run(self.same_noise())
            made.nfe = (int(nfe), None)
            return torch.tensor(float(value)), None

        made = Contestant(name, run, check, in_torch=False)
        return made

    def sampling(self, name: str, number: int, *, vmapped: bool = False) -> Contestant:
        """Samples without a trace."""

        def of_batch(params: Any, z: Any) -> Any:
            def slope(t: Any, x: Any, params: Any) -> Any:
                return perceptron(params, t, x)

            return integrate(self.problem, slope, z, params, (0.0, 1.0), _default())

        step = jax.jit(jax.vmap(of_batch, (None, 0)) if vmapped else of_batch)
        draw = jax.jit(lambda key: jax.random.normal(key, (number, self.problem.dims)))

        def run(z: Any = None) -> Any:
            if z is None:
                self.key, key = jax.random.split(self.key)
                z = draw(key)
            return jax.block_until_ready(step(self.params, z))

        def check() -> tuple[Tensor, None]:
            torch.manual_seed(0)
            x, nfe = run(jnp.asarray(torch.randn(number, self.problem.dims).numpy()))
            made.nfe = (int(nfe.max()), None)
            return torch.from_numpy(np.array(x)), None

        made = Contestant(name, run, check, in_torch=False)
        return made


def _default() -> Any:
    return diffrax.RecursiveCheckpointAdjoint()


def training(problem: Problem) -> list[Contestant]:
    """One system, vmapped in low dimensions, and the backsolve in high ones."""
    solves = Solves(problem)
    made = [solves.training("diffrax jit", _default())]
    if problem.dims > 10:
        made.append(solves.training("diffrax jit backsolve", diffrax.BacksolveAdjoint()))
    else:
        made.append(solves.training("diffrax jit vmapped", _default(), vmapped=True))
    return made


def evaluation(problem: Problem) -> list[Contestant]:
    """One system, and vmapped."""
    solves = Solves(problem)
    return [
        solves.evaluation("diffrax jit"),
        solves.evaluation("diffrax jit vmapped", vmapped=True),
    ]


def sampling(problem: Problem, number: int) -> list[Contestant]:
    """One system, and vmapped."""
    solves = Solves(problem)
    return [
        solves.sampling("diffrax jit", number),
        solves.sampling("diffrax jit vmapped", number, vmapped=True),
    ]
