"""Muon and Adam as one optimiser: the steps of each, schedules, and a run that is resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import cnf
from cnf.training import Muon, fit

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2))


def loss_of(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 50).reshape(10, 5)
    return (module(x) - x[:, :2].sin()).square().mean()


def test_each_part_takes_its_own_step() -> None:
    """Adam's first step is lr in each number; Muon's is orthogonal, of the size of lr."""
    module = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = Muon(module, lr=1e-2, ratio=3.0)
    loss_of(module).backward()
    optimizer.step()
    for name, parameter in module.named_parameters():
        change = parameter.detach() - before[name]
        if name in ("0.weight", "2.weight"):
            rows, columns = change.shape
            singular = torch.linalg.svdvals(change) / (3e-2 * max(1, rows / columns) ** 0.5)
            assert 0.5 < singular[:2].min() <= singular.max() < 1.5
        else:
            torch.testing.assert_close(
                change.abs(), torch.full_like(change, 1e-2), rtol=1e-3, atol=0
            )


def test_a_schedule_reaches_both() -> None:
    module = network()
    optimizer = Muon(module, lr=1e-2, ratio=3.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loss_of(module).backward()
    optimizer.step()
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [1.5e-2, 0.5e-2]
    assert optimizer.param_groups[0]["lr"] == 0.5e-2  # Adam's is the one that is logged


def test_a_resumed_run_has_the_same_weights(tmp_path: Path) -> None:
    x = torch.randn(40, 2)
    ends = []
    for parts in ((8,), (3, 8)):
        out = tmp_path / str(len(parts))
        for steps in parts:
            torch.manual_seed(0)
            flow = cnf.FFJORD(2, (8, 8))
            optimizer = Muon(flow)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            fit(
                cnf.FlowMatching(flow), x, steps=steps, batch_size=10, optimizer=optimizer,
                scheduler=schedule, out=out, resume=steps != parts[0], progress=False,
            )  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
    assert ends[0].equal(ends[1])


def test_vectors_alone_and_matrices_alone() -> None:
    for module in (nn.Linear(5, 5, bias=False), nn.LayerNorm(4)):
        optimizer = Muon(module)
        module(torch.randn(3, *next(module.parameters()).shape[-1:])).square().sum().backward()
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        changed = zip(before, module.parameters(), strict=True)
        assert any(not a.equal(b) for a, b in changed)


def test_closure_and_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    optimizer = Muon(module)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(loss_of(network()).item())
    with pytest.raises(TypeError, match=r"got generator; use Muon\(flow\)"):
        Muon(module.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters"):
        Muon(nn.Tanh())
    with pytest.raises(ValueError, match=r"lr=0\.0"):
        Muon(module, lr=0.0)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"torch 2\.9"):
        Muon(module)


def test_copies_have_their_parts() -> None:
    module = network()
    optimizer = Muon(module)
    loss_of(module).backward()
    optimizer.step()
    optimizer.zero_grad()  # copies of parameters have no gradient
    twin, twins_optimizer = copy.deepcopy((module, optimizer))
    for own, by in ((module, optimizer), (twin, twins_optimizer)):
        loss_of(own).backward()
        by.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    twins_optimizer.param_groups[0]["lr"] = 0.5
    assert 0.5 in [group["lr"] for part in twins_optimizer.parts for group in part.param_groups]


def test_parameters_that_no_part_would_move_are_refused() -> None:
    optimizer = Muon(network())
    with pytest.raises(TypeError, match="build it anew"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
