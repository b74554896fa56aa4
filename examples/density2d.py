"""Train a flow on a density of the plane, report its likelihood, and draw it.

python examples/density2d.py                         # 8gaussians
python examples/density2d.py --data checkerboard --trace hutchinson
python examples/density2d.py --model nsf             # discrete flows, too
python examples/density2d.py --data picture.png      # an image as a density
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import (
    PLANE,
    PLANE_MATCHING,
    add_models,
    default_out,
    describe_training,
    mean_and_error,
    notes,
    open_density,
    parse,
    parser,
    run_example,
    score,
    train,
    write_report,
)
from torch import Tensor

import cnf
from cnf.data import TOY_NAMES, PlaneDensity
from cnf.plotting import animate_path, plot_flow, plot_path
from cnf.training import FitResult


def main() -> int:
    """Run the example; the exit code is 0, or 130 after Ctrl-C."""
    flags = parser(__doc__)
    add_models(flags, PLANE)
    flags.add_argument(
        "--data", default="8gaussians", help=f"{', '.join(TOY_NAMES)}, or a picture file"
    )
    flags.add_argument("--test-size", type=int, default=10_000, help="test points")
    args = parse(flags, PLANE, PLANE_MATCHING)
    if args.test_size < 2:
        raise ValueError(f"--test-size={args.test_size} must be 2 or more, for a standard error")
    out = args.out or default_out("density2d", Path(args.data).stem, args.model)
    density = open_density(args.data)
    held_out = torch.Generator().manual_seed(args.seed + 1)
    val, test = (density.sample(n, held_out) for n in (2000, args.test_size))

    def batch(size: int, generator: torch.Generator) -> Tensor:
        return density.sample(size, generator)

    flow, result = train(args, batch, val, out)
    if result.signal is None:
        report(flow, density, test, result, out)
        draw(flow, density, test, out)
    return result.exit_code


def report(
    flow: cnf.Flow, density: PlaneDensity, test: Tensor, result: FitResult, out: Path
) -> None:
    """Test log-likelihood beside the true density's on the same points."""
    mine = score(flow, test)
    true = density.log_prob(test.double())
    gap = true - mine.log_prob
    minus_entropy = f"(minus entropy: {-density.entropy:.4f})"
    write_report(
        [
            f"data                  {density.name}, {len(test)} test points",
            f"test log-likelihood   {mine}",
            *notes(mine.log_prob),
            f"true log-likelihood   {mean_and_error(true)}  {minus_entropy}",
            f"KL(data || flow)      {mean_and_error(gap)}  nats, the mean difference",
            *describe_training(flow, result),
        ],
        out,
    )


def draw(flow: cnf.Flow, density: PlaneDensity, test: Tensor, out: Path) -> None:
    """flow.png (data, samples, densities), path.png (a strip) and path.gif (an animation)."""
    generator = torch.Generator().manual_seed(0)
    test = test.to(next(flow.parameters()).device)

    def truth(x: Tensor) -> Tensor:
        return density.log_prob(x.cpu())

    plot_flow(flow, test, truth=truth, generator=generator).savefig(out / "flow.png", dpi=100)
    plot_path(flow, test).savefig(out / "path.png", dpi=100)
    animate_path(flow, test, out / "path.gif", generator=generator)
    print(f"pictures              {out / 'flow.png'}, {out / 'path.png'}, {out / 'path.gif'}")


if __name__ == "__main__":
    run_example(main)
