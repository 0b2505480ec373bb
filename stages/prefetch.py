"""Reading ahead: a background thread reads what comes next while the caller computes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

Id = TypeVar("Id")
Sample = TypeVar("Sample")
PATIENCE = 2.0
"""Seconds that closing waits for a read that is under way: whoever interrupts a run is not to wait for a disk."""


def ahead(
    read: Callable[[Id], Sample], parts: Iterable[Sequence[Id]], depth: int = 2
) -> Generator[list[Sample], None, None]:
    """Yield, for every part in turn, what ``read`` gives for each of its ids.

    Where ``read`` raises in the thread, the caller's thread reads that part again, and all that follow: errors are
    raised where they are expected, and what only one thread may read is read in that one. No two threads are in
    ``read`` at once, unless the caller is there for something else: close this generator before. That ends the thread
    after the one read that is under way, and waits for that for ``PATIENCE`` seconds.

    Args:
        read: from an id to a sample.
        parts: of ids; they need not end.
        depth: parts to be ahead of the caller.
    """
    asked: queue.SimpleQueue[Sequence[Id]] = queue.SimpleQueue()
    found: queue.SimpleQueue[list[Sample] | None] = queue.SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(read, asked, found, stop), name="read-ahead", daemon=True)
    pending: deque[Sequence[Id]] = deque()
    failed = False

    def take() -> list[Sample]:
        nonlocal failed
        part = pending.popleft()
        samples = None if failed else found.get()
        if samples is not None:
            return samples
        failed = True
        return [read(i) for i in part]

    thread.start()
    try:
        for part in parts:
            pending.append(part)
            asked.put(part)
            if len(pending) > depth:
                yield take()
        while pending:
            yield take()
    finally:
        stop.set()
        asked.put(())
        thread.join(PATIENCE)


def _work(
    read: Callable[[Id], Sample],
    asked: queue.SimpleQueue[Sequence[Id]],
    found: queue.SimpleQueue[list[Sample] | None],
    stop: threading.Event,
) -> None:
    """Read the parts that are asked for, until one raises (None is found then) or all is to stop."""
    while True:
        samples = []
        try:
            for i in asked.get():
                if stop.is_set():
                    return
                samples.append(read(i))
        except BaseException:  # noqa: BLE001 - the caller's thread reads this part again, and raises what it raises
            found.put(None)
            return
        if stop.is_set():
            return
        found.put(samples)
