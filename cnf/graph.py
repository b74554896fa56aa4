"""A look at the autograd graph: which tensors will receive a gradient."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["unknown_leaves"]


def unknown_leaves(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that require grad in the graph of the outputs, other than the known tensors.

    The graph behind a known tensor that is no leaf is not searched.

    Args:
        outputs: tensors of any shape.
        known: tensors of any shape.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
        >>> [leaf.shape for leaf in unknown_leaves([a.sum() * b], [a])]
        [torch.Size([3])]
    """
    known = list(known)
    names = {id(tensor) for tensor in known}
    seen = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    stack = [output.grad_fn for output in outputs]
    found: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in names:
            found.append(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found
