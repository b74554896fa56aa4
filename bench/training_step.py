"""A maximum-likelihood training step: cnf's modes beside its peers and the bare matrix products.

    pip install -e ".[bench]" && python bench/training_step.py --plot training.png

zero_grad, loss = -log_prob.mean(), backward; the same network, weights and batch for all. Every
round times each contestant once, in a random order; a ratio is the median over the rounds.
Peers hold other error norms at the same tolerance, so the evaluations (NFE) stand beside the times;
the bare products are those of as many evaluations as cnf made, three times for the backward pass.
"""

from __future__ import annotations

import _flags
import peers
from _report import plot
from _run import run

BASE = "torchdiffeq adjoint"


def main() -> None:
    """Time the steps and print the tables."""
    flags = _flags.parser(__doc__)
    flags.add_argument("--trace", choices=["hutchinson", "exact"], default="hutchinson")
    args = flags.parse_args()
    _flags.set_threads(args.threads)
    tables = []
    for size in _flags.sizes(args):
        for method in _flags.methods(args):
            problem = _flags.problem(args, size, method, args.trace)
            title = _flags.title(f"training step, {args.trace} trace", args, problem)
            tables.append(run(title, BASE, peers.training(problem), args, size))
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
