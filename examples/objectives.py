"""How the examples train a flow: the objectives, their flags, and their defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import cnf
from cnf.objectives.couplings import COUPLINGS
from cnf.objectives.paths import PATHS
from cnf.objectives.time_sampling import TIME_SAMPLING
from cnf.training import Muon

OBJECTIVES = {
    "likelihood": ("likelihood",),
    "flow-matching": ("flow-matching",),
    "both": ("flow-matching", "likelihood"),
}
"""The stages of each --objective."""

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "adam": lambda module, lr: torch.optim.Adam(module.parameters(), lr=lr),
    "muon": Muon,
}
MATCHING_OPTIMIZER = "muon" if hasattr(torch.optim, "Muon") else "adam"  # from torch 2.9 on
MATCHING = ("coupling", "path", "time_sampling")
FINE_TUNING = {"lr": 1e-3, "batch_size": 512, "ema_decay": 0.99, "optimizer": "adam"}
"""How the second stage of "both" is trained; its steps are --fine-tune."""


def add_objectives(flags: argparse.ArgumentParser) -> None:
    """The flags that choose an objective."""
    flags.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="likelihood",
        help="both matches first and then fine-tunes by likelihood",
    )
    flags.add_argument("--coupling", choices=COUPLINGS, help="of base and data in flow matching")
    flags.add_argument("--path", choices=PATHS, help="from base to data in flow matching")
    flags.add_argument("--time-sampling", choices=TIME_SAMPLING, help="in flow matching")
    add_optimizer(flags)
    flags.add_argument("--fine-tune", type=int, help="steps by likelihood, after flow matching")


def add_optimizer(flags: argparse.ArgumentParser) -> None:
    """The flag that chooses the optimiser."""
    flags.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=None,  # and not that of the examples without this flag
        help="muon learns fine structure in fewer steps, and needs torch 2.9",
    )


def complete_objective(
    args: argparse.Namespace, matching: dict[str, Any]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, and the defaults of others that the objective has.

    Args:
        args: the flags of the command line.
        matching: those defaults where flows are matched.

    Raises:
        ValueError: a flag without effect.
    """
    stages = OBJECTIVES[args.objective]
    idle = [name for name in MATCHING if "flow-matching" not in stages]
    idle += ["fine_tune"] if len(stages) == 1 else []
    for name in idle:
        if getattr(args, name) is not None:
            takers = ["both"] if name == "fine_tune" else ["flow-matching", "both"]
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect with --objective {args.objective}; "
                f"leave it out, or choose --objective {' or '.join(takers)}"
            )
    if stages == ("likelihood",):
        return args, {"optimizer": "adam"}
    if args.model != "ffjord" or args.blocks != 1:
        raise ValueError(
            f"--objective {args.objective} trains one vector field: use --model ffjord with "
            "--blocks 1"
        )
    own = {"coupling": "independent", "path": "linear", "time_sampling": "stratified"}
    own |= {"fine_tune": 300} if len(stages) > 1 else {}
    return args, {**own, **matching}


def make_objective(
    stage: str, args: argparse.Namespace, flow: cnf.Flow
) -> cnf.FlowMatching | cnf.MaximumLikelihood:
    """The objective of a stage."""
    if stage == "likelihood":
        return cnf.MaximumLikelihood(flow)
    return cnf.FlowMatching(
        flow, coupling=args.coupling, path=args.path, time_sampling=args.time_sampling
    )


def of_stage(stage: int, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of a stage: those of the second are its own."""
    if stage == 0:
        return args
    return argparse.Namespace(**{**vars(args), **FINE_TUNING, "steps": args.fine_tune})
