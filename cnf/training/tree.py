"""State as tensors and JSON: a nesting of dicts, lists and tuples, taken apart and rebuilt.

The state dicts of modules, of PyTorch's optimisers and of its schedulers are such trees, so
checkpoints need no pickle.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Take `tree` apart into its tensors, named by their path, and a skeleton for `json.dumps`.

    What JSON has no word for is written as an object with one key: `$tensor`, `$tuple`, `$float`,
    `$items`, `$counter`. The tensors are contiguous copies on the CPU that share no memory.

    Raises:
        TypeError: A value is of another type; the message names its path.

    Example:
        >>> import torch
        >>> tensors, skeleton = pack({"w": {"a": torch.ones(2)}, "betas": (0.9, 0.999)})
        >>> list(tensors), skeleton
        (['w.a'], {'w': {'a': {'$tensor': 'w.a'}}, 'betas': {'$tuple': [0.9, 0.999]}})
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "", tensors)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors of the state have the path {name!r}")
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, _join(name, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        return _pack_mapping(value, name, tensors)
    raise TypeError(
        f"{name} is of type {type(value).__name__}: a checkpoint holds tensors, numbers, strings, "
        "None, and dicts, lists and tuples of these"
    )


def _pack_mapping(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    packed = {key: _pack(item, _join(name, key), tensors) for key, item in value.items()}
    if isinstance(value, Counter):
        return {"$counter": [list(pair) for pair in packed.items()]}
    if all(isinstance(key, str) and not key.startswith("$") for key in packed):
        return packed
    if all(isinstance(key, (int, str)) for key in packed):
        return {"$items": [list(pair) for pair in packed.items()]}
    raise TypeError(f"{name or 'the state'} has keys that are neither strings nor integers")


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def unpack(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what `pack` took apart.

    Example:
        >>> unpack(*reversed(pack({"best": math.inf, 3: (1, 2)})))
        {'best': inf, 3: (1, 2)}
    """
    if isinstance(skeleton, list):
        return [unpack(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match next(iter(skeleton.items()), None):
        case ("$tensor", name):
            return tensors[name]
        case ("$float", text):
            return float(text)
        case ("$tuple", items):
            return tuple(unpack(item, tensors) for item in items)
        case ("$items", pairs):
            return {key: unpack(item, tensors) for key, item in pairs}
        case ("$counter", pairs):
            return Counter(dict(pairs))
    return {key: unpack(item, tensors) for key, item in skeleton.items()}
