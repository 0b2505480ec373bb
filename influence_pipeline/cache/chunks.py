"""Files of small arrays: a tile each, compressed perhaps, then its CRC-32C, in the format of Zarr's chunks.

Zarr reads and writes the same files, many times slower (``scripts/benchmark/LOG.md``): each through tasks of an event
loop and several of its threads, which takes longer than all that is done with the few bytes of such a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from influence_pipeline.cache.layout import Kept
from influence_pipeline.cache.store import Location, files_at
from influence_pipeline.cache.tiles import (
    CHECKSUM_BYTES,
    Region,
    cells,
    checksum,
    file_name,
    intact,
    pack,
    unpack,
    within,
)
from stages.stage import Array


class Chunks:
    """The files of one array that has a file for each of its tiles."""

    def __init__(self, folder: Location, kept: Kept) -> None:
        """Read and write the files of an array at a folder, which is kept like that."""
        self._folder, self._kept, self._files = folder, kept, files_at(folder)

    def path(self, number: Sequence[int]) -> Location:
        """Return the path of a file by its position in the grid of files."""
        return self._folder / file_name(number)

    def read(self, region: Region) -> Array:
        """Return a region; what has no file is fill values.

        Raises:
            OSError: the disk refused.
            ValueError: a file is damaged.
        """
        out = np.empty([part.stop - part.start for part in region], self._kept.dtype)
        for number, part in cells(region, self._kept.chunks):
            try:
                raw = self._files.read(file_name(number))
            except FileNotFoundError:
                out[within(part, region)] = self._kept.fill_value
            else:
                tile = self._decoded(raw, self.path(number))
                out[within(part, region)] = tile[within(part, self._whole(number))]
        return out

    def write(self, region: Region, values: Array) -> None:
        """Write a region that is of whole files, as far as the array goes; each appears at once.

        Raises:
            OSError: the disk refused, or the array is gone.
        """
        for number, part in cells(region, self._kept.chunks):
            tile = np.full(self._kept.chunks, self._kept.fill_value, self._kept.dtype)
            tile[within(part, self._whole(number))] = values[within(part, region)]
            self._files.put(file_name(number), self._encoded(tile))

    def _whole(self, number: Sequence[int]) -> Region:
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(number, self._kept.chunks, strict=True))

    def _encoded(self, tile: Array) -> bytes:
        packed = pack(tile) if self._kept.compressed else tile.tobytes()
        return packed + checksum(packed)

    def _decoded(self, raw: bytes, path: Location) -> Array:
        """Return a tile.

        Raises:
            ValueError: it is damaged.
        """
        packed = raw[:-CHECKSUM_BYTES]
        if len(raw) < CHECKSUM_BYTES or not intact(raw):
            raise ValueError(f"{path}: a tile is damaged")
        if self._kept.compressed:
            tile = np.empty(self._kept.chunks, self._kept.dtype)
            unpack(packed, tile, path)
            return tile
        if len(packed) != math.prod(self._kept.chunks) * self._kept.dtype.itemsize:
            raise ValueError(f"{path}: a tile has another size")
        return np.frombuffer(packed, self._kept.dtype).reshape(self._kept.chunks)
