"""Arrays of the cache as they are read: decoded, and damage is an error that names the block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from influence_pipeline.cache.encoding import decode
from influence_pipeline.errors import CacheDamaged, WorkError
from stages.stage import Array


class StoredArray:
    """An array as it is read: damage is an error that names the place."""

    def __init__(self, array: Any, path: Path, suspect: Callable[[Any], str | None]) -> None:
        """Read ``array``, which is kept at ``path``; ``suspect`` looks for damage in a part, and says what it is."""
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.path = path
        self._array = array
        self._suspect = suspect

    def __getitem__(self, index: Any) -> Array:
        """Return a part.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: it is not as it was written, or was never written.
        """
        try:
            part = self.filled(index)
        except CacheDamaged as error:
            what = self._suspect(index)
            if what is None:
                # Nothing is wrong with the files: another process may have been writing them.
                return self.filled(index)
            raise self.damaged(what) from error
        lost = next((path for path in self._files(index) if not path.exists()), None)
        if lost is not None:
            raise self.damaged(self._suspect(index) or f"{lost} is missing")
        return part

    def filled(self, index: Any) -> Array:
        """Return a part; what was never written is fill values.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: a checksum does not fit.
            MemoryError: there is not enough.
            IndexError: there is no such part.
        """
        try:
            part: Array = self._array[index]
        except (MemoryError, IndexError):
            raise
        except OSError as error:
            raise WorkError(f"{self.path}: {index} cannot be read: {error}") from error
        except Exception as error:
            raise CacheDamaged(f"{self.path}: {index} cannot be read: {error}") from error
        return part

    def _files(self, index: Any) -> Iterator[Path]:
        """Yield the files that a part is in: Zarr reads one that is missing as fill values, without a word."""
        parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not Ellipsis]
        spans = []
        for number, (length, shard) in enumerate(
            zip(self.shape, self._array.shards or self._array.chunks, strict=True)
        ):
            part = parts[number] if number < len(parts) else slice(None)
            if isinstance(part, (int, np.integer)):
                part = slice(int(part) % length, int(part) % length + 1)
            start, stop, _ = part.indices(length)
            spans.append(range(start // shard, math.ceil(stop / shard)))
        for found in itertools.product(*spans):
            yield self.path.joinpath("c", *map(str, found))

    def never_written(self, index: Any) -> CacheDamaged:
        """Make the error for a part that has entries that no block wrote."""
        return self.damaged(self._suspect(index) or f"{self.path} has entries that were never written")

    def damaged(self, what: str) -> CacheDamaged:
        """Make the error for a part that is not as it was written."""
        return CacheDamaged(f"{what}. Run again: it is computed anew, and nothing else", self.path.parent)


class DecodedRows:
    """Rows of float32 vectors, decoded as they are sliced."""

    def __init__(self, kept: StoredArray, scale: StoredArray | None) -> None:
        """Decode ``kept`` by its row factors."""
        self.shape: tuple[int, ...] = kept.shape
        self._kept, self._scale = kept, scale

    def __getitem__(self, index: Any) -> Array:
        """Return a part as float32.

        Raises:
            CacheDamaged: a part was never written.
        """
        index = index if isinstance(index, tuple) else (index,)
        rows = decode(self._kept[index], None if self._scale is None else self._scale[index[0]])
        if np.isnan(rows).any():
            raise self._kept.never_written(index)
        return rows
