"""Log-likelihood without gradient, and sampling: cnf beside its peers.

    pip install -e ".[bench]" && python bench/log_prob.py --plot log_prob.png

The same network, weights and batch for all, under no_grad. Sampling solves without a trace;
cnf's `sample_and_log_prob` shows what the trace would cost. Rounds and ratios are those of
`training_step.py`.
"""

from __future__ import annotations

import argparse

import _flags
import peers
from _report import Table, plot
from _run import run

BASE = "torchdiffeq"


def main() -> None:
    """Time the solves and print the tables."""
    flags = _flags.parser(__doc__)
    flags.add_argument("--trace", choices=["hutchinson", "exact", "all"], default="all")
    flags.add_argument("--samples", type=int, default=10_000, help="0 for no sampling")
    args = flags.parse_args()
    _flags.set_threads(args.threads)
    traces = ["exact", "hutchinson"] if args.trace == "all" else [args.trace]
    tables: list[Table] = []
    for size in _flags.sizes(args):
        for method in _flags.methods(args):
            tables += [_log_prob(args, size, method, trace) for trace in traces]
            if args.samples:
                tables.append(_sampling(args, size, method))
    if args.plot:
        plot(tables, args.plot)


def _log_prob(args: argparse.Namespace, size: str, method: str, trace: str) -> Table:
    problem = _flags.problem(args, size, method, trace)
    title = _flags.title(f"log-likelihood, {trace} trace", args, problem)
    return run(title, BASE, peers.evaluation(problem), args, size)


def _sampling(args: argparse.Namespace, size: str, method: str) -> Table:
    problem = _flags.problem(args, size, method, "exact")
    title = _flags.title("sampling", args, problem, args.samples)
    return run(title, BASE, peers.sampling(problem, args.samples), args, size)


if __name__ == "__main__":
    main()
