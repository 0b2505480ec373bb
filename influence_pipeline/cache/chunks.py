"""Files of small arrays: a tile each, compressed perhaps, then its CRC-32C, in the format of Zarr's chunks.

Zarr reads and writes the same files, many times slower (``scripts/benchmark/LOG.md``): each through tasks of an event
loop and several of its threads, which takes longer than all that is done with the few bytes of such a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from influence_pipeline.cache.layout import Kept
from influence_pipeline.cache.record import FileSum
from influence_pipeline.cache.store import files_at
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
from influence_pipeline.location import Location
from stages.stage import Array


class Chunks:
    """The files of one array that has a file for each of its tiles."""

    def __init__(self, folder: Location, kept: Kept) -> None:
        """Read and write the files of an array at a folder, which is kept like that."""
        self._folder, self._kept, self._files = folder, kept, files_at(folder)

    def path(self, number: Sequence[int]) -> Location:
        """Return the path of a file by its position in the grid of files."""
        return self._folder / file_name(number)

    def read(self, region: Region, missing: list[str] | None = None) -> Array:
        """Return a region; what has no file is fill values.

        Args:
            region: of the array.
            missing: gets the names of the files that there are not.

        Raises:
            OSError: the disk refused.
            ValueError: a file is damaged.
        """
        out = np.empty([part.stop - part.start for part in region], self._kept.dtype)
        found = list(cells(region, self._kept.chunks))
        files = self._files.read_all([file_name(number) for number, _ in found])
        for (number, part), raw in zip(found, files, strict=True):
            if raw is None:
                if missing is not None:
                    missing.append(file_name(number))
                out[within(part, region)] = self._kept.fill_value
            else:
                tile = self._decoded(raw, self.path(number))
                out[within(part, region)] = tile[within(part, self._whole(number))]
        return out

    def write(self, region: Region, values: Array) -> dict[Location, FileSum]:
        """Write a region that is of whole files, as far as the array goes; each appears at once.

        Returns:
            What is known of the files.

        Raises:
            OSError: the disk refused, or the array is gone.
        """
        known = {}
        for number, data in self._files_of(region, values):
            self._files.put(file_name(number), data)
            known[self.path(number)] = FileSum().then(data)
        return known

    def write_once(self, region: Region, values: Array) -> bool:
        """Write a region that is of one file; false where another holder of the claim on it has written it before.

        Raises:
            OSError: the disk refused, or the array is gone.
        """
        ((number, data),) = self._files_of(region, values)
        return self._files.put_once(file_name(number), data)

    def _files_of(self, region: Region, values: Array) -> Iterator[tuple[tuple[int, ...], bytes]]:
        """Yield what goes into the files of a region, by their positions."""
        for number, part in cells(region, self._kept.chunks):
            tile = np.full(self._kept.chunks, self._kept.fill_value, self._kept.dtype)
            tile[within(part, self._whole(number))] = values[within(part, region)]
            yield number, self._encoded(tile)

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
