"""Solves under torch.func: which choices its transforms allow, and what replaces the others."""

from __future__ import annotations

import dataclasses

import torch

from cnf.ode.solver import Solver
from cnf.ode.torchdiffeq import TorchDiffEq

__all__ = ["transformable"]

_FIXED = "Solver('rk4', steps=...)"


def transformable(solver: Solver | TorchDiffEq, *, mapped: bool) -> Solver | TorchDiffEq:
    """The solver as it can be used here: under torch.func, compiled steps run eagerly.

    Fixed steps do not need batch="independent": no sample's steps depend on another.

    Args:
        solver: the choices.
        mapped: whether `torch.func.vmap` maps over the state or what the field depends on.

    Raises:
        ValueError: a gradient that torch.func cannot transform; steps of each sample's own, or
            samples to be singled out, under `torch.func.vmap`, which hides the samples.
    """
    if not torch._C._are_functorch_transforms_active():
        return solver
    if torch.is_grad_enabled() and solver.gradient != "backprop":
        raise ValueError(
            f"gradient={solver.gradient!r} cannot be used under torch.func (grad, vmap, jacrev, "
            "...), which differentiates the steps themselves; use gradient='backprop'"
        )
    if isinstance(solver, TorchDiffEq):
        if mapped or solver.adaptive:
            raise ValueError(
                f"TorchDiffEq({solver.method!r}) cannot be used under torch.func (grad, vmap, "
                f"jacrev, ...); use cnf.Solver(), or cnf.{_FIXED}"
            )
        return solver
    if mapped and solver.adaptive:
        for name, default in (("batch", "shared"), ("on_failure", "raise")):
            value = getattr(solver, name)
            if value != default:
                raise ValueError(
                    f"{name}={value!r} needs the samples one by one, which torch.func.vmap hides; "
                    f"use {_FIXED}, whose result for a sample depends on no other, or "
                    f"{name}={default!r}"
                )
    return dataclasses.replace(
        solver, compile=False, batch=solver.batch if solver.adaptive else "shared"
    )
