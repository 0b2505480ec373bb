"""How much memory this process holds, now and at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Give what says how many bytes were held at most since the beginning, beside those held then.

    Where the system cannot begin to count anew, it is 0 for what stays below an earlier peak.
    """
    try:
        before = _resident("VmRSS")
        CLEAR.write_text("5")
    except (OSError, StopIteration):
        before = _most()
    yield lambda: max(0, most_held() - before)


def most_held() -> int:
    """Return the bytes that this process held at most: since :func:`peak` began to count anew, where it could."""
    try:
        return _resident("VmHWM")
    except (OSError, StopIteration):
        return _most()


def _resident(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _most() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
