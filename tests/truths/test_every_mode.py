"""Nothing is silently wrong: each case of the table, in eager mode, torch.func, and compiled."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from .table import Case

# What torch's compiler imports when it first runs.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CASES: list[Case] = [
    case
    for path in sorted(Path(__file__).parent.glob("cases_*.py"))
    for case in importlib.import_module(f".{path.stem}", __package__).CASES
]
TABLE = [(case, mode) for case in CASES for mode in case.modes]


@pytest.mark.parametrize(("case", "mode"), TABLE, ids=[f"{c.name}, {m}" for c, m in TABLE])
def test_the_answer_is_right_in_every_mode(case: Case, mode: str) -> None:
    case.check(mode)


def test_no_name_stands_twice() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
