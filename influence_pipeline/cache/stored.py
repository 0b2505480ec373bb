"""Arrays of the cache as they are read: decoded, and damage is an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from influence_pipeline.cache.encoding import decode
from influence_pipeline.errors import CacheDamaged, WorkError
from stages.stage import Array


class StoredArray:
    """An array as it is read: damage is an error that names the place."""

    def __init__(self, array: Any, path: Path) -> None:
        """Read ``array``, which is kept at ``path``."""
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.path = path
        self._array = array

    def __getitem__(self, index: Any) -> Array:
        """Return a part.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: a checksum does not fit.
        """
        try:
            part: Array = self._array[index]
        except OSError as error:
            raise WorkError(f"{self.path}: {index} cannot be read: {error}") from error
        except Exception as error:
            raise self.damaged(index, str(error)) from error
        return part

    def damaged(self, index: Any, what: str) -> CacheDamaged:
        """Make the error for a part that is not as it was written; it names the files that the part is in."""
        parts = index if isinstance(index, tuple) else (index,)
        spans = []
        for part, length, shard in zip(parts, self.shape, self._array.shards or self._array.chunks, strict=False):
            if not isinstance(part, slice):
                break
            start, stop, _ = part.indices(length)
            spans.append(f"{start // shard}" if stop <= (start // shard + 1) * shard else "*")
        files = "/".join([str(self.path), "c", *spans])
        return CacheDamaged(f"{files} is damaged ({what}). Delete it and run again: what was in it is made anew")


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
            raise self._kept.damaged(index, "entries that were never written")
        return rows
