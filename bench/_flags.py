"""The flags that the benches share, and what they set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from _problem import SIZES, Problem, make_field

STEPS = {"2d": 20, "43d": 5}
ROUNDS = {"2d": 15, "43d": 5}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the shared flags."""
    flags = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    flags.add_argument("--size", choices=[*SIZES, "all"], default="2d")
    flags.add_argument("--method", choices=["rk4", "dopri5", "all"], default="all")
    flags.add_argument("--tol", type=float, default=1e-5, help="of dopri5")
    flags.add_argument("--steps", type=int, help="of rk4: 20 in 2-D, 5 in 43-D")
    flags.add_argument("--rounds", type=int, help="15 in 2-D, 5 in 43-D")
    flags.add_argument("--batch", type=int, help="512 in 2-D, 1000 in 43-D")
    flags.add_argument("--width", type=int, help="64 in 2-D, 860 in 43-D")
    flags.add_argument("--scale", type=float, default=1.0, help="multiplies the weights")
    flags.add_argument("--only", metavar="NAMES", help="contestants with one of these in the name")
    flags.add_argument("--memory", action="store_true", help="a column of peak memory")
    flags.add_argument("--no-compile", action="store_true", help="leave cnf's compiled modes out")
    flags.add_argument("--no-check", action="store_true", help="do not compare what they compute")
    return device_flags(flags)


def device_flags(flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of every script."""
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--plot", type=Path, metavar="FILE")
    return flags


def set_threads(threads: int) -> None:
    """For torch and, before it is imported, for XLA; a quiet profiler."""
    torch.set_num_threads(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("NPROC", "PJRT_NPROC"):
        os.environ.setdefault(name, str(threads))


def sizes(args: argparse.Namespace) -> list[str]:
    """The sizes that were asked for."""
    return list(SIZES) if args.size == "all" else [args.size]


def methods(args: argparse.Namespace) -> list[str]:
    """The methods that were asked for."""
    return ["rk4", "dopri5"] if args.method == "all" else [args.method]


def rounds(args: argparse.Namespace, size: str) -> int:
    """How many rounds a size gets."""
    return args.rounds or ROUNDS[size]


def problem(args: argparse.Namespace, size: str, method: str, trace: str) -> Problem:
    """One problem of a size, as the flags have it."""
    dims, width, batch = SIZES[size]
    field = make_field(dims, args.width or width, args.scale, args.device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch or batch, dims, generator=generator).to(args.device)
    return Problem(field, x, method, args.steps or STEPS[size], args.tol, trace)


def title(what: str, args: argparse.Namespace, problem: Problem, number: int | None = None) -> str:
    """What a table shows."""
    width = problem.weights()[0][0].shape[0]
    how = f"rk4 x {problem.steps}" if problem.fixed else f"{problem.method} {problem.tol:g}"
    return (
        f"{what}: {problem.dims}-D, width {width}, scale {args.scale:g}, "
        f"batch {number or len(problem.x)}, {how}, {args.device}, threads {torch.get_num_threads()}"
    )
