"""Train a flow on a table of numbers and compare it with a Gaussian.

python examples/table.py                                # a table inside scikit-learn
python examples/table.py --data FILE                    # .csv, .txt, .npy, .npz
python examples/table.py --data FILE --trace hutchinson
python examples/table.py --data FILE --model maf        # discrete flows, too
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import (
    TABLE,
    TABLE_MATCHING,
    add_models,
    default_out,
    describe_training,
    mean_and_error,
    notes,
    parse,
    parser,
    run_example,
    score,
    standard_error,
    train,
    write_report,
)
from torch import Tensor

import cnf
from cnf.data import Table, gaussian_log_prob, read_table, sklearn_table, split_table
from cnf.plotting import plot_table
from cnf.training import FitResult


def main() -> int:
    """Run the example; the exit code is 0, or 130 after Ctrl-C."""
    flags = parser(__doc__)
    add_models(flags, TABLE)
    flags.add_argument(
        "--data", help="table file; none takes breast_cancer, a table in scikit-learn"
    )
    flags.add_argument("--split-seed", type=int, default=0, help="seed of the split")
    flags.add_argument("--patience", type=int, default=6, help="validations without a new best")
    args = parse(flags, TABLE, TABLE_MATCHING)
    name = Path(args.data).stem if args.data else "breast_cancer"
    out = args.out or default_out("table", name, args.model)
    data = read_table(args.data) if args.data else sklearn_table(name)
    table = split_table(data, seed=args.split_seed, drop_constant=True)
    gaussian = gaussian_log_prob(table.train, table.test)  # refuses dependent columns
    if len(table.names) < data.shape[1]:
        print(f"constant columns are left out; {', '.join(table.names)} stay")
    flow, result = train(
        args, table.train, table.val, out, patience=args.patience, validate_every=100
    )
    if result.signal is None:
        report(name, flow, table, gaussian, result, out)
        draw(flow, table, out)
    return result.exit_code


def report(
    name: str, flow: cnf.Flow, table: Table, gaussian: Tensor, result: FitResult, out: Path
) -> None:
    """Test log-likelihood beside that of the full-covariance Gaussian fitted to the same rows."""
    mine = score(flow, table.test)
    gain = mine.log_prob - gaussian
    sizes = " / ".join(str(len(x)) for x in (table.train, table.val, table.test))
    write_report(
        [
            f"data                  {name}: {table.train.shape[1]} columns, {sizes} rows to train, "
            "validate, test",
            f"test log-likelihood   {mine}",
            *notes(mine.log_prob),
            f"Gaussian              {mean_and_error(gaussian)}",
            f"gain                  {mean_and_error(gain)}  nats a row, "
            f"{gain.mean().item() / standard_error(gain):.1f} standard errors",
            f"in the data's units   add {table.log_det_standardisation:.4f} to each",
            *describe_training(flow, result),
        ],
        out,
    )


def draw(flow: cnf.Flow, table: Table, out: Path) -> None:
    """table.png: pairs of columns, data and samples."""
    samples = flow.sample((1000,), generator=torch.Generator().manual_seed(0))
    plot_table(table.train, samples).savefig(out / "table.png", dpi=100)
    print(f"picture               {out / 'table.png'}")


if __name__ == "__main__":
    run_example(main)
