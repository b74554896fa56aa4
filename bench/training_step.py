"""A maximum-likelihood training step: cnf's gradient modes beside torchdiffeq and zuko.

    pip install -e ".[bench]" && python bench/training_step.py

The same perceptron (2-D, exact trace), batch and tolerances for all; every round times each once,
in turn, and the table gives medians over the rounds, as ratios to cnf's default. The peers hold
other error norms at the same tolerance, so the evaluations of the field stand beside the times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

import cnf

Step = Callable[[Tensor], int]
"""One forward and backward pass over a batch; returns the forward evaluations."""


def cnf_step(field: nn.Module, tol: float, gradient: str) -> Step:
    """A step of cnf in one of its gradient modes."""
    solver = cnf.Solver(rtol=tol, atol=tol, gradient=gradient)
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.CNF(field, "exact", solver))

    def step(x: Tensor) -> int:
        with cnf.record_solves() as solves:
            (-flow.log_prob(x).mean()).backward()
        return solves[0].nfe

    return step


def torchdiffeq_step(field: nn.Module, tol: float, *, adjoint: bool) -> Step:
    """What users of torchdiffeq write: (x, log-density) as the state, and a loop for the trace."""

    class Augmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field
            self.nfe = 0

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            self.nfe += 1
            with torch.enable_grad():
                x = state[0].requires_grad_()
                dx = self.field(t.to(x), x)
                trace = sum(
                    torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0][:, i]
                    for i in range(x.shape[1])
                )
            return dx, trace

    function = Augmented()
    options = {"adjoint_options": {"norm": "seminorm"}} if adjoint else {}
    solve = odeint_adjoint if adjoint else odeint

    def step(x: Tensor) -> int:
        function.nfe = 0
        t = torch.tensor([1.0, 0.0])
        state = (x.clone(), x.new_zeros(len(x)))
        z, log_det = solve(function, state, t, rtol=tol, atol=tol, method="dopri5", **options)
        nfe = function.nfe
        log_prob = cnf.StandardNormal(2).log_prob(z[-1]) + log_det[-1]
        (-log_prob.mean()).backward()
        return nfe

    return step


def zuko_step(width: int, tol: float) -> Step:
    """zuko's CNF with the exact trace, a perceptron of the same widths, its own adjoint."""
    import zuko

    flow = zuko.flows.CNF(2, hidden_features=(width, width), activation=nn.Tanh, exact=True)
    flow.transform.atol = flow.transform.rtol = tol
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    flow.transform.ode.register_forward_hook(count)

    def step(x: Tensor) -> int:
        nonlocal calls
        calls = 0
        loss = -flow().log_prob(x).mean()
        nfe = calls
        loss.backward()
        return nfe

    return step


def main() -> None:
    """Time the steps and print the table."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--batch", type=int, default=512)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--tol", type=float, default=1e-5)
    flags.add_argument("--threads", type=int, default=1)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    field = cnf.MLPField(2, (args.width, args.width))
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    steps = {
        "cnf backprop": cnf_step(field, args.tol, "backprop"),
        "cnf checkpoint": cnf_step(field, args.tol, "checkpoint"),
        "cnf adjoint": cnf_step(field, args.tol, "adjoint"),
        "torchdiffeq odeint": torchdiffeq_step(field, args.tol, adjoint=False),
        "torchdiffeq adjoint": torchdiffeq_step(field, args.tol, adjoint=True),
        "zuko CNF (own weights)": zuko_step(args.width, args.tol),
    }
    x = torch.randn(args.batch, 2)
    nfe = {name: step(x) for name, step in steps.items()}  # warm-up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x)
            times[name].append(time.perf_counter() - start)
    print(f"batch {args.batch}, width {args.width}, tol {args.tol:g}, threads {args.threads}")
    print(f"{'':24}{'ms':>8}{'ratio':>8}{'NFE':>6}{'ms/NFE':>8}")
    base = statistics.median(times["cnf backprop"])
    for name, values in times.items():
        median = statistics.median(values)
        ms = 1e3 * median
        print(f"{name:24}{ms:8.1f}{median / base:8.2f}{nfe[name]:6d}{ms / nfe[name]:8.2f}")


if __name__ == "__main__":
    main()
