"""Files of small arrays: a tile each, compressed perhaps, then its CRC-32C, in the format of Zarr's chunks.

Zarr reads and writes the same files, many times slower (``scripts/benchmark/LOG.md``): each through tasks of an event
loop and several of its threads, which takes longer than all that is done with the few bytes of such a file.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence_pipeline.cache.layout import Kept
from influence_pipeline.cache.tiles import CHECKSUM_BYTES, Region, cells, checksum, pack, unpack, within
from stages.stage import Array


class Chunks:
    """The files of one array that has a file for each of its tiles."""

    def __init__(self, folder: Path, kept: Kept) -> None:
        """Read and write the files of an array at a folder, which is kept like that."""
        self._folder, self._kept = folder, kept

    def path(self, number: Sequence[int]) -> Path:
        """Return the path of a file by its position in the grid of files."""
        return self._folder.joinpath("c", *map(str, number))

    def read(self, region: Region) -> Array:
        """Return a region; what has no file is fill values.

        Raises:
            OSError: the disk refused.
            ValueError: a file is damaged.
        """
        out = np.empty([part.stop - part.start for part in region], self._kept.dtype)
        for number, part in cells(region, self._kept.chunks):
            path = self.path(number)
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                out[within(part, region)] = self._kept.fill_value
            else:
                out[within(part, region)] = self._decoded(raw, path)[within(part, self._whole(number))]
        return out

    def write(self, region: Region, values: Array) -> None:
        """Write a region that is of whole files, as far as the array goes; each appears at once.

        Raises:
            OSError: the disk refused, or the array is gone.
        """
        for number, part in cells(region, self._kept.chunks):
            tile = np.full(self._kept.chunks, self._kept.fill_value, self._kept.dtype)
            tile[within(part, self._whole(number))] = values[within(part, region)]
            path = self.path(number)
            for folder in reversed(path.parents[: len(number)]):  # not what they are in: that may have been removed
                folder.mkdir(exist_ok=True)
            aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                aside.write_bytes(self._encoded(tile))
                aside.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
                raise

    def _whole(self, number: Sequence[int]) -> Region:
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(number, self._kept.chunks, strict=True))

    def _encoded(self, tile: Array) -> bytes:
        packed = pack(tile) if self._kept.compressed else tile.tobytes()
        return packed + checksum(packed)

    def _decoded(self, raw: bytes, path: Path) -> Array:
        """Return a tile.

        Raises:
            ValueError: it is damaged.
        """
        packed = raw[:-CHECKSUM_BYTES]
        if raw[-CHECKSUM_BYTES:] != checksum(packed):
            raise ValueError(f"{path}: a tile is damaged")
        if self._kept.compressed:
            tile = np.empty(self._kept.chunks, self._kept.dtype)
            unpack(packed, tile, path)
            return tile
        if len(packed) != math.prod(self._kept.chunks) * self._kept.dtype.itemsize:
            raise ValueError(f"{path}: a tile has another size")
        return np.frombuffer(packed, self._kept.dtype).reshape(self._kept.chunks)
