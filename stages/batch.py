"""Batches as trees of tensors: any nesting of dicts, tuples and lists whose tensors have the batch first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.stage import Batch, StageError


def map_leaves(function: Callable[[Any], Any], tree: Batch) -> Batch:
    """Apply a function to every leaf; mappings of any kind become dicts, named tuples stay what they are."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_leaves(function, value) for value in tree)
    return function(tree)


def leaves(tree: Batch) -> list[Any]:
    """List the leaves in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def split(tree: Batch) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """Take the tensors out of a batch; the second value puts others in their places."""
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]

    def join(others: list[Tensor]) -> Batch:
        rest = iter(others)
        return map_leaves(lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf, tree)

    return tensors, join


def size(tree: Batch) -> int:
    """Return the number of samples in a batch.

    Raises:
        StageError: the batch has no tensor, or its tensors differ in their first dimension.
    """
    tensors, _ = split(tree)
    sizes = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors}
    if len(sizes) != 1 or -1 in sizes:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise StageError(
            f"a batch must hold tensors with the batch first, all of one length; found shapes {shapes}. "
            "Give the Experiment a `collate` that makes such batches."
        )
    return int(sizes.pop())


def shapes(tree: Batch) -> str:
    """Say, for people, what tensors a batch holds."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in split(tree)[0])


def take(tree: Batch, index: int) -> Batch:
    """Return the batch that holds one sample of this one."""
    return part(tree, slice(index, index + 1))


def part(tree: Batch, index: slice) -> Batch:
    """Return the batch that holds some samples of this one; lists of the batch's length are cut as tensors are."""
    count = size(tree)

    def one(node: Any) -> Any:
        if isinstance(node, Tensor):
            return node[index]
        if isinstance(node, Mapping):
            return {key: one(value) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            if len(node) == count and not any(isinstance(leaf, Tensor) for leaf in leaves(node)):
                return type(node)(node[index])
            parts = (one(value) for value in node)
            return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
        return node

    return one(tree)


def only_tensors(tree: Batch) -> bool:
    """Say whether every leaf is a tensor or nothing."""
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves(tree))


def to_device(tree: Batch, device: torch.device) -> Batch:
    """Move every tensor to a device; to a GPU without waiting for it."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if device.type == "cuda" and leaf.device.type == "cpu":
            return leaf.pin_memory().to(device, non_blocking=True)
        return leaf.to(device)

    return map_leaves(moved, tree)
