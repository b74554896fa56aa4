"""Checkpoint files: exact, atomic, and loud about every fault."""

from __future__ import annotations

import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnf.errors import CheckpointError
from cnf.training import atomic, checkpoint, load_checkpoint, load_weights, save_checkpoint

STATE: dict[str, Any] = {
    "model": nn.Linear(3, 2).state_dict(),
    "numbers": (1, 2.5, math.inf, -math.inf, True, None, 0.1 + 0.2),
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0]}],
    },
    "counter": Counter([3, 3, 5]),
    "odd keys": {"$tensor": 1, "": [], "{}": {}},
    "types": [
        torch.ones(2, dtype=t)
        for t in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64)
    ],
    "empty": torch.empty(0, 3),
}


def same(a: object, b: object) -> bool:
    """Equality of two trees, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, STATE)
    return path


def test_state_returns_as_it_was(file: Path) -> None:
    loaded = load_checkpoint(file)
    types = [tensor.float() for tensor in loaded.pop("types")]
    assert same(types, [tensor.float() for tensor in STATE["types"]])
    assert [t.dtype for t in load_checkpoint(file)["types"]] == [t.dtype for t in STATE["types"]]
    assert same(
        loaded,
        {
            **{key: value for key, value in STATE.items() if key != "types"},
            "model": dict(STATE["model"]),
        },
    )
    assert isinstance(loaded["counter"], Counter)


def test_shared_and_strided_tensors(file: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base,
        "same": base,
        "transposed": base.T,
        "slice": base[:, ::2],
        "expanded": base[0].expand(5, 4),
    }
    save_checkpoint(file, state)
    loaded = load_checkpoint(file)
    assert same(loaded, {name: tensor.contiguous() for name, tensor in state.items()})
    loaded["a"].zero_()
    assert loaded["same"].sum() == base.sum()


@pytest.mark.parametrize(
    "value",
    [object(), Path("x"), {1.5: 2}, 1j, {None: 1}],
    ids=["object", "path", "float key", "complex", "none key"],
)
def test_other_types_are_named(file: Path, value: object) -> None:
    before = file.read_bytes()
    with pytest.raises(TypeError, match=r"config\.a"):
        save_checkpoint(file, {"config": {"a": value}})
    assert file.read_bytes() == before


def test_colliding_paths(file: Path) -> None:
    with pytest.raises(TypeError, match=r"'a\.b'"):
        save_checkpoint(file, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_every_bit_flip_is_noticed(tmp_path: Path) -> None:
    file, flipped = tmp_path / "last.safetensors", tmp_path / "flipped.bin"
    save_checkpoint(file, {"model": {"w": torch.randn(2)}, "step": 3})
    data = file.read_bytes()
    for position in range(len(data)):
        for bit in range(8) if position < 8 else [position % 8]:
            flipped.write_bytes(
                data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            )
            with pytest.raises(CheckpointError, match="flipped"):
                load_checkpoint(flipped)


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.safetensors"
    for length in [*range(0, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(
            CheckpointError, match=r"cut\.safetensors .*(empty|truncated)"
        ) as caught:
            load_checkpoint(cut)
        assert f"Good checkpoint beside it: {file}" in str(caught.value)
    cut.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="changed"):
        load_checkpoint(cut)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(CheckpointError, match="file does not exist"):
        load_checkpoint(file)
    with pytest.raises(CheckpointError, match="director"):
        load_checkpoint(tmp_path)
    torch.save(nn.Linear(1, 1).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"pickle.*sandbox"):
        load_checkpoint(file)
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match="pickle"):
        load_checkpoint(file)
    assert not (tmp_path / "exploded").exists()
    file.write_bytes(b"a text of some length")
    with pytest.raises(CheckpointError, match="not a checkpoint of cnf"):
        load_checkpoint(file)
    safetensors = pytest.importorskip("safetensors.torch")
    for metadata in (None, {"format": "pt"}):
        safetensors.save_file({"w": torch.ones(2)}, file, metadata)
        with pytest.raises(CheckpointError, match="not a checkpoint of cnf"):
            load_checkpoint(file)


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_other_format_version(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_VERSION", "7")
    with pytest.raises(CheckpointError, match="format version 1, this cnf reads version 7"):
        load_checkpoint(file)


@pytest.mark.parametrize("step", ["fsync", "open", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_disk_faults_leave_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    before = file.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(
            CheckpointError, match=f"cannot write checkpoint {file}: {os.strerror(code)}"
        ):
            save_checkpoint(file, {"step": 1})
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space"), Path("/dev/full").open("wb") as full:
        full.write(b"0" * 100_000)  # the error that the atomic write turns into CheckpointError


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        save_checkpoint(tmp_path / "missing" / "a.safetensors", {"step": 1})
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder"):
        save_checkpoint(tmp_path / "folder", {"step": 1})
    (tmp_path / "text").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "text" / "a.safetensors", {"step": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]


def test_interrupt_while_writing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(file, {"step": 1})
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_kill_while_writing(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, write_of(0))
    newest, leftovers = 0, 0
    for trial in range(20):
        child = os.fork()
        if child == 0:
            for step in range(newest + 1, newest + 10**6):
                save_checkpoint(file, write_of(step))
        time.sleep(0.02 + 0.0037 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = load_checkpoint(file)
        assert (state["w"] == state["step"]).all()
        newest = state["step"]
        leftovers += len(list(tmp_path.iterdir())) - 1
    save_checkpoint(file, write_of(0))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert newest > 20
    assert leftovers > 0  # else no kill hit a write, and the test shows nothing


def write_of(step: int) -> dict[str, Any]:
    """A state that tells whether it is whole; small enough that PyTorch starts no threads, which a
    fork would lose.
    """
    return {"step": step, "w": torch.full((30_000,), step)}


def test_sweep_spares_living_writers(file: Path) -> None:
    name = f".{file.name}.{atomic.platform.node()}-{{}}-0a.tmp"
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    living, stale = file.with_name(name.format(os.getpid())), file.with_name(name.format(dead.pid))
    living.touch()
    stale.touch()
    save_checkpoint(file, {"step": 1})
    assert living.exists()
    assert not stale.exists()


def test_load_weights(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    trained = nn.ModuleDict({"flow": nn.Linear(3, 2)})
    average = nn.ModuleDict({"flow": nn.Linear(3, 2)})
    save_checkpoint(file, {"model": trained.state_dict(), "ema": average.state_dict()})
    flow = nn.Linear(3, 2)
    load_weights(flow, file, prefix="flow")
    assert same(flow.weight, average["flow"].weight)
    load_weights(whole := nn.ModuleDict({"flow": nn.Linear(3, 2)}), file, ema=False)
    assert same(whole["flow"].weight, trained["flow"].weight)
    save_checkpoint(file, {"step": 1})
    with pytest.raises(CheckpointError, match="no 'ema' weights"):
        load_weights(flow, file)


def test_other_architecture_is_left_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    save_checkpoint(file, {"ema": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).state_dict()})
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(5, 1))
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(
        CheckpointError, match=r"(?s)missing.*2\.weight.*1\.weight: shape \(1, 2\).*\(5, 2\)"
    ):
        load_weights(other, file)
    assert same(before, [parameter.detach() for parameter in other.parameters()])
    deep = nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(deep, file)
    assert str(caught.value).count("\n") == 11
    assert "... and 7 more" in str(caught.value)


def test_weights_of_an_objective_are_not_those_of_its_part(tmp_path: Path) -> None:
    import cnf
    from cnf.training import fit, load_weights

    flow = cnf.FFJORD(2, (4,))
    result = fit(
        cnf.MaximumLikelihood(flow),
        torch.randn(8, 2),
        steps=1,
        batch_size=4,
        out=tmp_path,
        progress=False,
    )
    assert result.last is not None
    other = cnf.FFJORD(2, (4,))
    with pytest.raises(CheckpointError, match="prefix='flow'"):
        load_weights(other, result.last)
    load_weights(other, result.last, ema=False, prefix="flow")
    assert all(p.equal(q) for p, q in zip(other.parameters(), flow.parameters(), strict=True))
