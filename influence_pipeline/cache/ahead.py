"""Reading ahead: what will be asked for of an array is fetched while other parts of it are used.

Parts that follow one another are fetched together, so that there is a request for a run of tiles and not for each; as
many such batches are under way as the memory allows that is given to it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from influence_pipeline.cache.tiles import Fetched, Region
from stages.stage import Array, ArrayLike

if TYPE_CHECKING:
    from influence_pipeline.cache.stored import DecodedRows

THREADS = 16
BATCH_BYTES = 2**23
"""Bytes that are fetched together, about."""


@dataclass
class _Batch:
    """Parts that are fetched together.

    Attributes:
        parts: regions of the array.
        size: bytes, at most.
        left: parts that were not yet asked for.
        fetched: what comes of it, once it was begun.
    """

    parts: list[Region]
    size: int = 0
    left: int = 0
    fetched: Future[Fetched] | None = None


class Ahead:
    """Rows of which the next parts are known; several threads may ask for them."""

    def __init__(self, rows: DecodedRows, items: Sequence[Sequence[Region]], at_once: int, most_bytes: int) -> None:
        """Begin to fetch.

        Args:
            rows: that are read.
            items: the parts that one thread will ask for in turn, for each piece of its work.
            at_once: threads, each of which takes the next item.
            most_bytes: that are fetched and not yet asked for.
        """
        self.shape, self._rows, self._most = rows.shape, rows, most_bytes
        self._batches = _in_order([_batches(item, rows.itemsize, most_bytes) for item in items], at_once)
        self._of = {_key(part): batch for batch in self._batches for part in batch.parts}
        self._next, self._held = 0, 0
        self._lock = threading.Lock()
        with self._lock:
            self._begin_next()

    @property
    def factors(self) -> ArrayLike | None:
        """What rows are to be multiplied by after :meth:`read_into`."""
        return self._rows.factors

    def __getitem__(self, index: Any) -> Array:
        """Return a part as float32."""
        return self._rows.part(index, self._taken(index))

    def read_into(self, index: tuple[slice, slice], out: Array) -> None:
        """Read a part as float32, but for the factors of whole rows."""
        self._rows.read_into(index, out, self._taken(index))

    def close(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._next = len(self._batches)
            for batch in self._batches:
                if batch.fetched is not None:
                    batch.fetched.cancel()

    def _taken(self, index: tuple[slice, slice]) -> Fetched | None:
        """Wait for a part; None where it was not foreseen, or could not be fetched: whoever reads it says why."""
        with self._lock:
            batch = self._of.pop(_key(index), None)
            if batch is None:
                return None
            fetched = self._begun(batch)
            batch.left -= 1
            if not batch.left:
                batch.fetched, self._held = None, self._held - batch.size
            self._begin_next()
        try:
            return fetched.result()
        except Exception:  # noqa: BLE001 - it is read again, and raises what it raises
            return None

    def _begin_next(self) -> None:
        while self._next < len(self._batches):
            batch = self._batches[self._next]
            if batch.left and batch.fetched is None:
                if self._held and self._held + batch.size > self._most:
                    break
                self._begun(batch)
            self._next += 1

    def _begun(self, batch: _Batch) -> Future[Fetched]:
        if batch.fetched is None:
            batch.fetched = _threads().submit(self._rows.fetch, batch.parts)
            self._held += batch.size
        return batch.fetched


def _batches(item: Sequence[Region], itemsize: int, most_bytes: int) -> list[_Batch]:
    """Join parts that follow one another, as far as they are few enough bytes."""
    found: list[_Batch] = []
    for part in item:
        size = itemsize * math.prod(side.stop - side.start for side in part)
        if not found or found[-1].size + size > min(BATCH_BYTES, most_bytes // 4):
            found.append(_Batch([]))
        found[-1].parts.append(part)
        found[-1].size += size
        found[-1].left += 1
    return found


def _in_order(items: Sequence[list[_Batch]], at_once: int) -> list[_Batch]:
    """Return batches in the order in which threads that go side by side, each through an item, ask for them."""
    together = (items[start : start + at_once] for start in range(0, len(items), at_once))
    return [batch for group in together for row in zip_longest(*group) for batch in row if batch is not None]


def _key(part: Sequence[slice]) -> tuple[tuple[int, int], ...]:
    return tuple((side.start, side.stop) for side in part)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "ahead")
