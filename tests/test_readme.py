"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_api_in_ten_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    nfe, accepted, rejected = map(int, capsys.readouterr().out.split())
    assert nfe == 2 + 6 * (accepted + rejected)  # dopri5: the start, a first step, six a step


def test_the_choices_of_the_solver_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[1], names)
    assert names["path"].shape == (3, 100, 2)
    assert "log-det" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # hessian's own
def test_the_modes_of_torch_run() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[2], names)
    assert names["curvature"].shape == (8, 2, 2)
    assert names["ensemble"].shape == (3, 1000)


def test_estimates_and_the_comparison_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[3], names)
    assert names["stderr"].shape == (256,)
    assert "Hutchinson" in capsys.readouterr().out


def test_a_closed_form_of_your_own_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[4], names)
    assert names["flow"].transform.divergence == names["cnf"].Exact()
    assert names["report"].ok, str(names["report"])


def test_discrete_flows_run() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[5], names)
    assert names["log_prob"].shape == (512,)


def test_flows_of_integers_run() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[6], names)
    assert names["bits"].shape == names["stderr"].shape == (32,)
    assert str(names["images"].dtype) == "torch.uint8"


def test_ways_to_train_run(recwarn: pytest.WarningsRecorder) -> None:
    names: dict[str, object] = {}
    for block in (0, 7, 8, 9):
        exec(BLOCKS[block], names)
    assert "effective samples" in str(names["estimate"])
    assert names["bound"].shape == (10,)
    assert 0.4 < names["accuracy"] <= 1.0
    assert all("effective sample size" in str(warning.message) for warning in recwarn)


def test_own_fields_run() -> None:
    import torch

    import cnf

    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(x)) * t

    names = {"torch": torch, "cnf": cnf, "my_conv_net": Convolution()}
    exec(BLOCKS[10], names)
    assert names["flow"].log_prob(torch.randn(2, 1, 28, 28)).shape == (2,)
