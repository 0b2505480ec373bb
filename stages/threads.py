"""Independent pieces of work on several threads, each of which computes on one core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_threads(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Do some work for every item, on as many threads as PyTorch may use.

    PyTorch's own operations use one thread meanwhile, so that each core has one. Where one item fails, those that are
    under way are finished, and no other is begun.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        for done in pool.map(work, items):
            assert done is None
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
