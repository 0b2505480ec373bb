"""How many samples are on the device at once: as many as were chosen, halved where these are found not to fit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from stages.batch import part, shapes, size
from stages.stage import Batch

log = logging.getLogger(__name__)

T = TypeVar("T")


class DeviceBatch:
    """The number of samples that are computed together, which only falls."""

    def __init__(self, choose: Callable[[], int] | int) -> None:
        """Begin with a number, or with what gives one when it is first asked for."""
        self._choose = choose

    @functools.cached_property
    def size(self) -> int:
        """Samples at once."""
        return self._choose if isinstance(self._choose, int) else self._choose()

    def pieces(self, batch: Batch, compute: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
        """Yield the parts of a batch in order, each with what is computed of it; the batch itself where it fits.

        Raises:
            MemoryError: one sample alone is too much.
        """
        start, count = 0, size(batch)
        while start < count:
            piece = batch if self.size >= count else part(batch, slice(start, start + self.size))
            found = self._attempt(piece, compute)
            if found:
                start += size(piece)
                yield piece, found.pop()

    def _attempt(self, piece: Batch, compute: Callable[[Batch], T]) -> list[T]:
        """Return what is computed of a part; nothing where there is not enough memory, and try fewer from then on.

        Raises:
            MemoryError: one sample alone is too much.
        """
        try:
            return [compute(piece)]
        except Exception as error:
            if not no_memory(error):
                raise
            if (count := size(piece)) == 1:
                raise MemoryError(
                    f"not even one sample ({shapes(piece)}) fits: close other programs that use the device, or choose "
                    f"fewer parameters ([grad_z] parameters); {str(error).partition(chr(10))[0]}"
                ) from error
            self.size = count // 2
            log.warning("a batch of %d samples does not fit: %d from now on", count, self.size)
        # What the failed attempt held is free only here, behind its exception.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return []


def no_memory(error: Exception) -> bool:
    """Say whether an error is that there is not enough memory; torch has no type for that on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def refuse_memory(error: Exception) -> None:
    """Do nothing, unless an error says that there is not enough memory.

    Raises:
        MemoryError: it does.
        OutOfMemoryError: it does, of the device.
    """
    if no_memory(error):
        raise error if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else MemoryError(str(error)) from error
