"""Train a flow with Hutchinson's trace, evaluate its checkpoint exactly, and compare the traces.

python examples/trace.py                                # a table inside scikit-learn
python examples/trace.py --data FILE                    # .csv, .txt, .npy, .npz
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import REFERENCE, mean_and_error, notes, parser, run_example, train, write_report
from models import ffjord
from torch import Tensor

import cnf
from cnf.data import read_table, sklearn_table, split_table
from cnf.training import load_weights


def main() -> int:
    """Run the example; the exit code is 0, or 130 after Ctrl-C."""
    flags = parser(
        __doc__,
        steps=500,
        batch_size=500,
        lr=3e-3,
        hidden=[64, 64],
        trace="hutchinson",
        ema_decay=0.98,
    )
    flags.add_argument(
        "--data", help="table file; none takes breast_cancer, a table in scikit-learn"
    )
    flags.add_argument("--probes", type=int, default=16, help="of Hutchinson's estimate")
    args = flags.parse_args()
    name = Path(args.data).stem if args.data else "breast_cancer"
    out = args.out or Path("runs") / f"trace-{name}"
    data = read_table(args.data) if args.data else sklearn_table(name)
    table = split_table(data, drop_constant=True)
    trained, result = train(args, table.train, table.val, out, validate_every=100)
    if result.signal is None:
        flow = ffjord(args, table.test.shape[1])  # another one, from the checkpoint
        load_weights(flow, result.best or out / "last.safetensors", prefix="flow")
        report(flow.to(next(trained.parameters()).device), table.test, args.probes, out)
    return result.exit_code


@torch.no_grad()
def report(flow: cnf.FFJORD, test: Tensor, probes: int, out: Path) -> None:
    """The test log-likelihood both ways; trace.png and the table of every estimator."""
    x = test.to(next(flow.parameters()).device)
    exact = flow.log_prob(x, divergence="exact", solver=REFERENCE)
    estimate, stderr = flow.log_prob(
        x,
        divergence=cnf.Hutchinson(probes=probes),
        solver=REFERENCE,
        generator=torch.Generator().manual_seed(0),
        return_stderr=True,
    )
    off = (estimate - exact) / stderr
    rows = x[:: max(1, len(x) // 128)][:128]
    comparison = cnf.compare_trace(flow, rows, verbose=False)
    comparison.plot().savefig(out / "trace.png", dpi=100)
    write_report(
        [
            f"test log-likelihood   {mean_and_error(exact)}  (exact trace)",
            f"                      {mean_and_error(estimate)}  ({probes} probes)",
            *notes(exact),
            f"                      each row's to {stderr.mean().item():.2f} nats, its standard "
            f"error; in units of that it is off by {off.mean().item():+.2f} +- "
            f"{off.std().item():.2f} (mean, standard deviation)",
            "",
            str(comparison),
            f"picture               {out / 'trace.png'}",
        ],
        out,
    )


if __name__ == "__main__":
    run_example(main)
