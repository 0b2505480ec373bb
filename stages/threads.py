"""Independent pieces of work on several threads, each of which computes on one core."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from stages.stage import Array

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Do some work for every item, on as many threads as PyTorch may use, each of which computes on one core.

    Where one item fails, those that are under way are finished, and no other is begun.
    """
    import torch

    if torch.get_num_threads() == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    threads = one_core_threads()
    done = [threads.submit(work, item) for item in items]
    try:
        for future in done:
            future.result()
    finally:
        for future in reversed(done):
            future.cancel()
        wait(done)


class Threads:
    """Threads on each of which PyTorch's operations use that thread alone.

    What the caller computes meanwhile may use as many threads as before.

    Attributes:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        """Start as many threads as PyTorch may use."""
        import torch

        self.count = count
        self._threads: list[threading.Thread] = []
        ready = threading.Barrier(self.count + 1)

        def settle() -> None:
            # A thread takes the number of all others when it is first asked; told its own, that of all that start
            # later: so it is asked before, and the caller, once all are there, has the last word.
            torch.get_num_threads()
            torch.set_num_threads(1)
            self._threads.append(threading.current_thread())
            ready.wait()

        self._pool = ThreadPoolExecutor(self.count, "encode", settle)
        try:
            for _ in range(self.count):
                self._pool.submit(int)
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        finally:
            torch.set_num_threads(self.count)

    @property
    def there(self) -> bool:
        """Whether they still are; those of a parent are not there in what it forks."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a thread do some work; what is given is begun in order."""
        return self._pool.submit(work, *arguments)


def one_core_threads() -> Threads:
    """Return threads that this process keeps: new ones would each keep memory of their own."""
    import torch

    count = torch.get_num_threads()
    known = _kept.get(count)
    if known is None or not known.there:
        _kept.clear()
        known = _kept[count] = Threads(count)
    return known


_kept: dict[int, Threads] = {}


_own = threading.local()
MOST_OWN = 2**22
"""Entries of the largest array that a thread keeps."""


def own_memory(use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return memory of this thread's, the same each time for a use: new memory costs more than what is done in it."""
    known: dict[tuple[str, np.dtype[Any]], Array] = _own.__dict__.setdefault("known", {})
    size = math.prod(shape)
    if size > MOST_OWN:
        return np.empty(shape, dtype)
    key = use, dtype
    if key not in known or known[key].size < size:
        known[key] = np.empty(size, dtype)
    return known[key][:size].reshape(shape)
