"""Checkpoints: one safetensors file that holds a whole state, checked against every accident,
without pickle.

The tensors of the state are the tensors of the file, under their paths (`model.flow.base.loc`,
`ema...`); everything else is JSON in its metadata, beside a SHA-256 of the whole file (computed
with zeros in its own place). The checksum detects accidents, not attacks: a forged file can hold
wrong numbers, but it cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cnf.errors import CheckpointError
from cnf.training.atomic import write_atomically
from cnf.training.extras import require
from cnf.training.tree import pack, unpack

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint", "weights_of"]

_FORMAT, _VERSION = "cnf checkpoint", "1"
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_BLANK = b"0" * 64
_PICKLE = (b"PK\x03\x04", b"\x80")  # what torch.save and pickle.dump write first


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state`, any nesting of dicts, lists, tuples, tensors and plain values, to `path`.

    The file is replaced atomically: a fault or a kill at any moment leaves the old file or the new
    one. Tied, non-contiguous and CUDA tensors are stored as independent copies.

    Raises:
        CheckpointError: The file cannot be written; an old one is intact.
        TypeError: The state holds a value of another type; the message names its path.

    Example:
        >>> import tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_checkpoint(file, {"model": nn.Linear(2, 1).state_dict(), "note": "untrained"})
        >>> load_checkpoint(file)["note"]
        'untrained'
    """
    path = Path(path)
    tensors, skeleton = pack(state)
    text = json.dumps(skeleton, allow_nan=False)
    metadata = {"format": _FORMAT, "version": _VERSION, "state": text, "sha256": _BLANK.decode()}
    data = require("safetensors.torch").save(tensors, metadata)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        write_atomically(path, _sealed(data))
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error.strerror or error}. "
            "An older file of that name is unchanged. Free space, or choose another folder."
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote to `path`, its tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or something else; the message says which,
            and names the good checkpoints in the same folder.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        good = [
            str(other)
            for other in sorted(path.parent.glob("*.safetensors"))
            if other != path and _is_good(other)
        ]
        remedy = f" Good checkpoint beside it: {', '.join(good)}." if good else ""
        raise CheckpointError(f"{error}{remedy}") from error.__cause__


def load_weights(
    module: nn.Module, path: str | Path, *, ema: bool = True, prefix: str = ""
) -> None:
    """Load the weights of a checkpoint of `fit` into `module`, all of them or none.

    Args:
        module: The objective that was trained, or a part of it.
        path: The checkpoint.
        ema: The moving average of the weights (else the weights of the last step).
        prefix: Where `module` sits in the objective, such as `"flow"` for `objective.flow`.

    Raises:
        CheckpointError: The file is no good checkpoint, or its weights are not those of such a
            module; the message lists the first ten differences, and `module` is unchanged.
    """
    section = "ema" if ema else "model"
    state = load_checkpoint(path)
    if section not in state:
        raise CheckpointError(
            f"checkpoint {path} holds no {section!r} weights, only {sorted(state)}."
        )
    start = f"{prefix}." if prefix else ""
    weights = {
        name[len(start) :]: value
        for name, value in state[section].items()
        if name.startswith(start)
    }
    inner = {name.partition(".")[2] for name in state[section]}
    if not prefix and weights.keys() != inner == module.state_dict().keys():
        first = next(iter(state[section])).partition(".")[0]
        raise CheckpointError(
            f"checkpoint {path} holds an objective, and this {type(module).__name__} is its part: "
            f"use load_weights(module, path, prefix={first!r})."
        )
    module.load_state_dict(weights_of(weights, module, path))


def weights_of(
    weights: Mapping[str, Any], module: nn.Module, path: str | Path
) -> Mapping[str, Any]:
    """`weights`, if they fit `module`; else an error that lists the differences."""
    own = module.state_dict()
    differences = [f"missing in the checkpoint: {name}" for name in own if name not in weights]
    differences += [f"unknown to the model: {name}" for name in weights if name not in own]
    differences += [
        f"{name}: shape {_shape(weights[name])} in the checkpoint, {_shape(own[name])} in the model"
        for name in own
        if name in weights and _shape(weights[name]) != _shape(own[name])
    ]
    if differences:
        more = [f"... and {len(differences) - 10} more"] if len(differences) > 10 else []
        raise CheckpointError(
            f"checkpoint {path} does not fit this {type(module).__name__}, which is unchanged. "
            "Build the model as it was trained. Differences:\n  "
            + "\n  ".join(differences[:10] + more)
        )
    return weights


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _load(path: Path) -> dict[str, Any]:
    data = _read(path)
    metadata = _metadata(path, data)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of cnf.")
    if metadata.get("version") != _VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {metadata.get('version')}, "
            f"this cnf reads version {_VERSION}. Load it with the cnf that wrote it."
        )
    match = _SEAL.search(data, 8, _header_end(data))
    if match is None or _digest(data, match) != match[1]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: checksum mismatch, it was truncated or changed."
        )
    state = unpack(json.loads(metadata["state"]), require("safetensors.torch").load(data))
    return dict(state)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist.") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read checkpoint {path}: {error.strerror or error}."
        ) from error
    if not data:
        raise CheckpointError(f"checkpoint {path} is empty.")
    if data.startswith(_PICKLE) and _header_end(data) > len(data):
        raise CheckpointError(
            f"{path} is a pickle (torch.save), which can run code when loaded, and was not opened. "
            "If you trust it, convert it in a sandbox: torch.load(..., weights_only=True), then "
            "cnf.training.save_checkpoint."
        )
    return data


def _metadata(path: Path, data: bytes) -> dict[str, str]:
    end = _header_end(data)
    try:
        if len(data) < 8 or end > len(data):
            raise ValueError("the header is longer than the file")
        metadata = json.loads(data[8:end])["__metadata__"]
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of cnf, or it is truncated or damaged: "
            "it has no readable header."
        ) from error


def _header_end(data: bytes) -> int:
    """Where the header ends: safetensors begins with its length, eight bytes, little-endian."""
    return 8 + int.from_bytes(data[:8], "little")


def _sealed(data: bytes) -> bytes:
    match = _SEAL.search(data, 8, _header_end(data))
    if match is None:
        raise CheckpointError(
            "safetensors wrote a header in an unknown form; use another version of it."
        )
    return b"".join([data[: match.start(1)], _digest(data, match), data[match.end(1) :]])


def _digest(data: bytes, seal: re.Match[bytes]) -> bytes:
    view = memoryview(data)
    digest = hashlib.sha256(view[: seal.start(1)])
    digest.update(_BLANK)
    digest.update(view[seal.end(1) :])
    return digest.hexdigest().encode()


def _is_good(path: Path) -> bool:
    try:
        _load(path)
    except CheckpointError:
        return False
    return True
