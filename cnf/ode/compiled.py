"""Compiled steps: the field, its divergence and a whole Runge-Kutta step as one graph.

A program belongs to a field and is kept as long as the field lives. Times, step sizes and
tolerances enter as tensors, so that none of them compiles anew.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cnf.ode.control import Tolerance, first_step
from cnf.ode.inductor import inductor
from cnf.ode.methods import Coefficients
from cnf.ode.rhs import Derivative, Function, RightHandSide, evaluate
from cnf.ode.stats import SolveStats
from cnf.ode.step import Clock, Time, runge_kutta_step
from cnf.ode.stepper import EagerStepper, Step, finish, sized
from cnf.user_modules import copies
from cnf.warn import warn

__all__ = ["CompiledStepper"]


class Inputs(NamedTuple):
    """What a graph needs of a `RightHandSide`."""

    f: Function
    args: tuple[Tensor | None, ...]
    shared: tuple[Tensor, ...]
    batch_dims: int


def _inputs(f: RightHandSide) -> Inputs:
    return Inputs(f.f, f.args, f.shared, f.batch_dims)


def _evaluation(f: Inputs, t: Tensor, x: Tensor) -> Derivative:
    # A function gets copies of its own, which cost nothing in a graph: it may write into them.
    args, shared = f.args, f.shared
    if not hasattr(f.f, "identity"):
        t, args, shared = t.clone(), copies(args), copies(shared)
    return evaluate(f.f, t, x.clone(), args, shared, f.batch_dims)


def _start(
    f: Inputs,
    order: int,
    tolerance: Tolerance,
    t: Tensor,
    end: Tensor,
    x: Tensor,
) -> tuple[Derivative, Tensor]:
    def rhs(t: Tensor, x: Tensor) -> Derivative:
        return _evaluation(f, t, x)

    first = rhs(t.to(x), x)
    with torch.no_grad():
        return first, first_step(rhs, order, t, end, tolerance, x.detach(), first[0].detach())


def _step(
    f: Inputs,
    method: Coefficients,
    tolerance: Tolerance | None,
    t: Tensor,
    t_next: Tensor,
    x: Tensor,
    q: Tensor | None,
    first: Derivative | None,
) -> Step:
    def rhs(t: Tensor, x: Tensor) -> Derivative:
        return _evaluation(f, t, x)

    stages = runge_kutta_step(rhs, method, Clock(0.0, 1.0), t, t_next, x, first)
    return finish(method, tolerance, x, q, stages)


class CompiledStepper:
    """Steps as compiled graphs, with a compiled backward pass; eager where compiling fails.

    Args:
        f: right-hand side.
        method: the tableau.
        name: its name.
        tolerance: the error norm, None for fixed steps.
        trainable: whether a gradient will be asked, so that every step shall carry one: the
            first one, whose state needs none, would be another graph.
    """

    def __init__(
        self,
        f: RightHandSide,
        method: Coefficients,
        name: str,
        tolerance: Tolerance | None,
        x: Tensor,
        *,
        trainable: bool,
    ) -> None:
        self.f = f
        self.method = method
        self.trainable = trainable
        self.eager = EagerStepper(f, method, tolerance)
        if tolerance is not None:
            rtol, atol = (x.new_full((), float(v)) for v in tolerance[:2])
            tolerance = tolerance._replace(rtol=rtol, atol=atol)
        self.tolerance = tolerance
        self.program = _program(f.f, (name, tolerance is None), _step, x)
        self.evaluation = _program(f.f, (), _evaluation, x)
        self.starter = _program(f.f, (name,), _start, x)

    def evaluate(self, t: Tensor, x: Tensor) -> Derivative:
        """f(t, x)."""
        if self._replaced():
            return self.eager.evaluate(t, x)
        f = self.f
        f.stats.nfe += 1
        with f.in_precision(x), f.watched(x):
            return self.evaluation(_inputs(f), t.to(x), self._carrying(x))

    def start(
        self, clock: Clock, x: Tensor, order: int, first: Derivative | None
    ) -> tuple[Derivative, Tensor]:
        """f at the start, and the size of a first step."""
        if first is not None:
            return first, sized(self.evaluate, order, clock, self.tolerance, x, first)
        if self._replaced() or x.numel() == 0:
            return self.eager.start(clock, x, order, first)
        f = self.f
        f.stats.nfe += 2
        t, end = (clock.values.at(s, x) for s in (clock.start, clock.end))
        if clock.t0 is not None:
            t = clock.at(clock.start, x)
        with f.in_precision(x), f.watched(x):
            started: tuple[Derivative, Tensor] = self.starter(
                _inputs(f), order, self.tolerance, t, end, self._carrying(x)
            )
        return started

    def __call__(
        self,
        clock: Clock,
        t: Time,
        t_next: Time,
        x: Tensor,
        q: Tensor | None,
        first: Derivative | None,
    ) -> Step:
        """The step from t to t_next."""
        if self._replaced() or x.numel() == 0:
            return self.eager(clock, t, t_next, x, q, first)
        f = self.f
        begin, end = (s if isinstance(s, Tensor) else clock.at(s, x) for s in (t, t_next))
        x = self._carrying(x)
        if self.tolerance is None:
            q = None
        else:  # the same graph for every step: f at its start and the quadratures are there
            first = self.evaluate(begin, x) if first is None else first
            q = _so_far(q, first[1])
        f.stats.nfe += len(self.method.c) - (first is not None)
        with f.in_precision(x), f.watched(x):
            return self.program(_inputs(f), self.method, self.tolerance, begin, end, x, q, first)

    def counting(self, stats: SolveStats) -> CompiledStepper:
        """The same stepper, its evaluations counted elsewhere."""
        return self._of(self.f.counting(stats))

    def rows(self, index: Tensor) -> CompiledStepper:
        """The same stepper for some of the samples."""
        return self._of(self.f.rows(index))

    def _of(self, f: RightHandSide) -> CompiledStepper:
        other = object.__new__(CompiledStepper)
        other.__dict__.update(self.__dict__)
        other.f = f
        other.eager = EagerStepper(f, self.method, self.eager.tolerance)
        return other

    def _carrying(self, x: Tensor) -> Tensor:
        """The state, as one that requires grad where a gradient will be asked."""
        if self.trainable and torch.is_grad_enabled() and not x.requires_grad:
            return x.detach().requires_grad_()
        return x

    def _replaced(self) -> bool:
        """Whether the field's tensors are not those of the forward pass (functional_call)."""
        return bool(getattr(self.f.f, "replaced", False))


def _so_far(q: Tensor | None, dq: Tensor | None) -> Tensor | None:
    """The quadratures so far, as values: zero at the start."""
    if q is not None:
        return q.detach()
    return None if dq is None else torch.zeros_like(dq)


_Programs = dict[Hashable, "_Program"]
_programs: WeakKeyDictionary[Any, _Programs] = WeakKeyDictionary()
_numbers = itertools.count()


def _program(f: Function, key: Hashable, function: Callable[..., Any], x: Tensor) -> _Program:
    """The compiled function of a field, made at its first use."""
    owner, own = _identity(f)
    programs = _programs.setdefault(owner, {})
    key = (function.__name__, own, key, x.device.type)
    if key not in programs:
        programs[key] = _Program(function, x.device.type)
    return programs[key]


def _identity(f: Function) -> tuple[Any, Hashable]:
    """The object with which a program lives, and what else tells it from others of that object."""
    identity: tuple[Any, Hashable] | None = getattr(f, "identity", None)
    if identity is not None:
        return identity
    return getattr(getattr(f, "__func__", f), "__code__", f), ()


class _Program:
    """A function compiled at its first call; run eagerly, with one warning, where that fails."""

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        # Code of its own: torch.compile counts the graphs of a code object, up to a limit.
        code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
        own = types.FunctionType(code, function.__globals__, code.co_name)
        self.eager = function
        self.compiled = torch.compile(own, fullgraph=True, backend=inductor(device))
        self.failed = False

    def __call__(self, *args: Any) -> Any:
        if self.failed:
            return self.eager(*args)
        try:
            return self._run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise errors of every kind
            result = self.eager(*args)  # where the field is at fault, this raises its own error
            self.failed = True
            warn(
                f"compile=True: the step could not be compiled, so it runs eagerly from here on "
                f"({type(error).__name__}: {_first_line(error)}). A field compiles if it is made "
                "of PyTorch operations without data-dependent Python; a C++ compiler is needed on "
                "CPU.",
                RuntimeWarning,
            )
            return result

    def _run(self, *args: Any) -> Any:
        try:
            return self.compiled(*args)
        except Exception as error:
            if not _is_warning(error):
                raise
        with warnings.catch_warnings():  # torch's own, where warnings are errors
            warnings.simplefilter("ignore")
            return self.compiled(*args)


def _is_warning(error: BaseException | None) -> bool:
    """Whether a warning turned error is behind it."""
    while error is not None and not isinstance(error, Warning):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error is not None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")[:200]
