"""Files of large arrays: tiles that are compressed and checksummed one by one, in the format of Zarr's sharding codec.

A file is its tiles one after the other, then where each of them is (offset and length, 64 bits each, in row-major
order of the tiles), then a CRC-32C of that. Zarr reads and writes the same files, several times slower
(``scripts/benchmark/LOG.md``): here tiles are encoded and compressed by several threads, and one that reads takes just
the tiles that it needs, decodes each into place, and shares nothing with other threads that read.
"""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from stages.stage import Array

Region = tuple[slice, ...]
EMPTY = 2**64 - 1
"""Offset and length of a tile that was never written."""
CHECKSUM_BYTES = 4

_scratch = threading.local()


class Tiles:
    """The files of one array."""

    def __init__(self, folder: Path, array: Any) -> None:
        """Read and write the files of a zarr array that has shards, at a folder."""
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.file_shape: tuple[int, ...] = array.shards
        self.tile_shape: tuple[int, ...] = array.chunks
        self._folder, self._fill = folder, array.fill_value
        self._counts = tuple(f // t for f, t in zip(self.file_shape, self.tile_shape, strict=True))
        self._shuffle = blosc.SHUFFLE if self.dtype.itemsize > 1 else blosc.NOSHUFFLE

    def path(self, number: Sequence[int]) -> Path:
        """Return the path of a file by its position in the grid of files."""
        return self._folder.joinpath("c", *map(str, number))

    # ---- writing -------------------------------------------------------------------------------------------------

    def write(self, region: Region, encoded: Callable[[Region], Array], threads: int) -> None:
        """Write all files that a region fills; it begins where files do.

        Args:
            region: of the array.
            encoded: gives any part of the region as it is kept, called from several threads.
            threads: that encode and compress.

        Raises:
            OSError: the disk refused; files are whole or not there.
        """
        with ThreadPoolExecutor(threads) as pool:
            for number, part in _cells(region, self.file_shape):
                inside = [cell for _, cell in _cells(part, self.tile_shape)]
                self._write_file(self.path(number), part, list(pool.map(lambda c: self._packed(c, encoded), inside)))

    def _packed(self, cell: Region, encoded: Callable[[Region], Array]) -> bytes:
        values = encoded(cell)
        if values.shape != self.tile_shape:  # tiles are whole; what is beyond the end of the array is fill values
            whole = np.full(self.tile_shape, self._fill, self.dtype)
            whole[tuple(slice(0, n) for n in values.shape)] = values
            values = whole
        values = np.ascontiguousarray(values, self.dtype)
        packed: bytes = blosc.compress(values, b"lz4", 5, self._shuffle)
        return packed + _checksum(packed)

    def _write_file(self, path: Path, part: Region, tiles: list[bytes]) -> None:
        index = np.full((*self._counts, 2), EMPTY, "<u8")
        offset = 0
        spans = [range(math.ceil((p.stop - p.start) / t)) for p, t in zip(part, self.tile_shape, strict=True)]
        for position, tile in zip(itertools.product(*spans), tiles, strict=True):
            index[position] = offset, len(tile)
            offset += len(tile)
        raw = index.tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(aside, "wb") as file:
                for piece in (*tiles, raw, _checksum(raw)):
                    file.write(piece)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(
        self, region: Region, out: Array, decoded: Callable[[Array, Region, Array], None], *, strict: bool
    ) -> None:
        """Read a region, tile by tile.

        Args:
            region: of the array.
            out: where the region goes, of its shape.
            decoded: puts a part of a tile, and where it is in the array, into its place in ``out``.
            strict: refuse what was never written, instead of fill values.

        Raises:
            OSError: the disk refused.
            FileNotFoundError: a file is missing, and ``strict``.
            ValueError: a file is damaged.
        """
        for number, part in _cells(region, self.file_shape):
            try:
                with open(self.path(number), "rb") as file:
                    index = self._index(file)
                    for position, cell in _cells(part, self.tile_shape):
                        inside = tuple(p % n for p, n in zip(position, self._counts, strict=True))
                        tile = self._tile(file, *map(int, index[inside]), strict=strict)
                        corner = [p * t for p, t in zip(position, self.tile_shape, strict=True)]
                        piece = tile[tuple(slice(c.start - o, c.stop - o) for c, o in zip(cell, corner, strict=True))]
                        decoded(piece, cell, out[_within(cell, region)])
            except FileNotFoundError:
                if strict:
                    raise
                out[_within(part, region)] = self._fill

    def _index(self, file: Any) -> Array:
        """Read where the tiles of a file are.

        Raises:
            ValueError: it is damaged.
        """
        size = 16 * math.prod(self._counts) + CHECKSUM_BYTES
        length = file.seek(0, 2)
        file.seek(max(0, length - size))
        raw = file.read(size)
        if len(raw) != size or raw[-CHECKSUM_BYTES:] != _checksum(raw[:-CHECKSUM_BYTES]):
            raise ValueError(f"{file.name}: where its tiles are is damaged")
        return np.frombuffer(raw[:-CHECKSUM_BYTES], "<u8").reshape(*self._counts, 2)

    def _tile(self, file: Any, offset: int, length: int, *, strict: bool) -> Array:
        """Read one tile into this thread's own memory, where it stays until the next.

        Raises:
            ValueError: it is damaged, or was never written.
        """
        if offset == length == EMPTY:
            if strict:
                raise ValueError(f"{file.name}: a tile was never written")
            return np.full(self.tile_shape, self._fill, self.dtype)
        file.seek(offset)
        raw = file.read(length)
        if len(raw) != length or raw[-CHECKSUM_BYTES:] != _checksum(raw[:-CHECKSUM_BYTES]):
            raise ValueError(f"{file.name}: a tile is damaged")
        tile = _own_memory(self.tile_shape, self.dtype)
        if int.from_bytes(raw[4:8], "little") != tile.nbytes:  # as Blosc's header has it
            raise ValueError(f"{file.name}: a tile has another size")
        blosc.decompress(raw[:-CHECKSUM_BYTES], tile)
        return tile


def _own_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array of this thread's, the same one each time: new memory costs more than decoding into it."""
    known: Array | None = getattr(_scratch, "tile", None)
    if known is None or known.shape != shape or known.dtype != dtype:
        known = _scratch.tile = np.empty(shape, dtype)
    return known


def _cells(region: Region, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Yield the cells of a regular grid that a region touches: their positions, and what the region has of each."""
    spans = [range(p.start // n, math.ceil(p.stop / n)) for p, n in zip(region, shape, strict=True)]
    for position in itertools.product(*spans):
        yield (
            position,
            tuple(
                slice(max(p.start, i * n), min(p.stop, (i + 1) * n))
                for p, i, n in zip(region, position, shape, strict=True)
            ),
        )


def _within(part: Region, whole: Region) -> Region:
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def _checksum(raw: bytes) -> bytes:
    return int(google_crc32c.value(raw)).to_bytes(CHECKSUM_BYTES, "little")
