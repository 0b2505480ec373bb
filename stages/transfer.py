"""From a GPU to memory, while the GPU computes what comes next."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def on_host(items: Iterable[Item], tensor: Callable[[Item], Tensor]) -> Iterator[tuple[Item, Tensor]]:
    """Yield items, each with a tensor of it as float32 in memory.

    From a GPU, a copy goes on while the item after it is computed, into memory that the GPU writes to by itself.
    """
    copying: deque[tuple[Item, Tensor, Callable[[], None]]] = deque()
    for item in items:
        copying.append((item, *begin_copy(tensor(item))))
        if len(copying) > 1 or tensor(item).device.type == "cpu":
            yield _finished(*copying.popleft())
    while copying:
        yield _finished(*copying.popleft())


def _finished(item: Item, copy: Tensor, wait: Callable[[], None]) -> tuple[Item, Tensor]:
    wait()
    return item, copy


def begin_copy(values: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Begin to copy to memory, as float32; return the copy, and what waits until it is there."""
    if values.device.type != "cuda":
        return values.detach().to("cpu", torch.float32), lambda: None
    values = values.detach().to(torch.float32)
    copies = _stream(values.device)
    copies.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(copies):
        copy = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        values.record_stream(copies)
        there = copies.record_event()
    return copy, there.synchronize


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies from a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
