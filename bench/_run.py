"""One table: choose the contestants, check them, time them, print."""

from __future__ import annotations

import argparse

import _flags
from _measure import check, rounds
from _peer import Contestant
from _report import Table, make_table, show


def run(
    title: str, base: str, contestants: list[Contestant], args: argparse.Namespace, size: str
) -> Table:
    """The table of a problem; the first contestant is the reference of the check."""
    if args.no_compile:
        contestants = [c for c in contestants if not c.name.endswith("compiled")]
    chosen = [c for c in contestants if _asked(c.name, args.only)]
    if not chosen:
        raise SystemExit(f"--only {args.only}: there is {[c.name for c in contestants]}")
    if args.no_check:
        contestants[0].run()  # the floor needs its evaluations
        for contestant in chosen:
            contestant.run()
    else:
        check(chosen, contestants[0], args.tol)
    times = rounds(chosen, _flags.rounds(args, size), args.device)
    table = make_table(title, base, chosen, times, args.device, memory=args.memory)
    show(table, memory=args.memory)
    return table


def _asked(name: str, only: str | None) -> bool:
    return only is None or any(part.strip() in name for part in only.split(","))
