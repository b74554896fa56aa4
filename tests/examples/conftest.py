from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script in this process, which spares the imports; returns what it prints."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(script: str, *arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        printed = capsys.readouterr().out
        if isinstance(end.value.code, str):  # what Python prints, with exit code 1
            assert code == 1, end.value.code
            return end.value.code
        assert end.value.code == code
        return printed

    yield run
    torch.set_num_threads(threads)
    own = ("common", "models", "objectives", "images")
    for name in own:  # bench and tests may have some of that name
        sys.modules.pop(name, None)
