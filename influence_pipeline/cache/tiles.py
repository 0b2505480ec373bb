"""Files of large arrays: tiles that are compressed and checksummed one by one, in the format of Zarr's sharding codec.

A file is its tiles one after the other, then where each of them is (offset and length, 64 bits each, in row-major
order of the tiles), then a CRC-32C of that. Zarr reads and writes the same files, several times slower
(``scripts/benchmark/LOG.md``): here tiles are encoded and compressed by several threads, and one that reads takes just
the tiles that it needs, decodes each into place, and shares nothing with other threads that read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from influence_pipeline.cache.encoding import convert
from influence_pipeline.cache.record import FileSum
from influence_pipeline.cache.store import Files, Ranges, Rewritten, files_at
from influence_pipeline.location import Location
from stages.stage import Array
from stages.threads import Threads, own_memory

Region = tuple[slice, ...]
Part = Callable[[Region], Array]
"""Gives some columns of rows of a region, to be converted to what is kept, until the next call of this thread."""
Encode = Callable[[Array, int], Part]
"""Takes rows, and the position of the first in the region that is filled."""
EMPTY = 2**64 - 1
"""Offset and length of a tile that was never written."""
NOWHERE = EMPTY, EMPTY
CHECKSUM_BYTES = 4
AT_ONCE_BYTES = 2**25
"""Of a region, as it is kept, whose files are asked for at once where each request takes long."""
RESIDUE = 0x48674BC7
"""The CRC-32C of any bytes with their own CRC-32C behind them."""
CHUNK = 2**20
"""Entries that a thread encodes at once: they stay in its core's cache from the first look to the last."""
AHEAD = 2
"""Bands of tiles that may wait for the threads."""


class Tiles:
    """The files of one array."""

    def __init__(self, folder: Location, array: Any) -> None:
        """Read and write the files of an array that has shards, at a folder."""
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.file_shape: tuple[int, ...] = array.shards
        self.tile_shape: tuple[int, ...] = array.chunks
        self.fill = array.fill_value
        self.counts = tuple(f // t for f, t in zip(self.file_shape, self.tile_shape, strict=True))
        self.files = files_at(folder)
        self._folder = folder

    def path(self, number: Sequence[int]) -> Location:
        """Return the path of a file by its position in the grid of files."""
        return self._folder / file_name(number)

    # ---- reading -------------------------------------------------------------------------------------------------

    def fetch(self, regions: Sequence[Region]) -> Fetched:
        """Read the tiles that some regions need, as they are kept; a file that is not there is left out.

        Raises:
            OSError: the disk refused.
            ValueError: a file is damaged.
        """
        wanted: dict[tuple[int, ...], list[Region]] = {}
        for region in regions:
            for number, part in cells(region, self.file_shape):
                wanted.setdefault(number, []).append(part)
        jobs = [functools.partial(self._fetched, number, parts) for number, parts in wanted.items()]
        return {n: file for n, file in zip(wanted, self.files.together(jobs), strict=True) if file is not None}

    def _fetched(self, number: tuple[int, ...], parts: Sequence[Region]) -> _FetchedRanges | None:
        """Read the tiles of a file that some parts need; None where there is no such file."""
        try:
            with self.files.reading(file_name(number)) as file:
                index = self._index(file, number)
                found = (place for part in parts for _, _, place in self._places(index, part) if place != NOWHERE)
                places = list(dict.fromkeys(found))
                return _FetchedRanges(index, dict(zip(places, file.parts(places), strict=True)))
        except FileNotFoundError:
            return None

    def read(
        self,
        region: Region,
        out: Array,
        decoded: Callable[[Array, Region, Array], None],
        *,
        strict: bool,
        fetched: Fetched | None = None,
    ) -> None:
        """Read a region, tile by tile.

        Args:
            region: of the array.
            out: where the region goes, of its shape.
            decoded: puts a part of a tile, and where it is in the array, into its place in ``out``.
            strict: refuse what was never written, instead of fill values.
            fetched: what was read before of some files.

        Raises:
            OSError: the disk refused.
            FileNotFoundError: a file is missing, and ``strict``.
            ValueError: a file is damaged.
        """
        files = list(cells(region, self.file_shape))
        size = self.dtype.itemsize * math.prod(side.stop - side.start for side in region)
        if fetched is None and self.files.far and len(files) > 1 and size <= AT_ONCE_BYTES:
            with contextlib.suppress(Rewritten):  # one by one then
                fetched = self.fetch([region])
        for number, part in files:
            place = out[within(part, region)]
            try:
                known = fetched.get(number) if fetched else None
                try:
                    self._read_file(number, part, place, decoded, known, strict=strict)
                except Rewritten:  # what was known of where its tiles are was of the file before
                    self._read_file(number, part, place, decoded, strict=strict)
            except FileNotFoundError:
                if strict:
                    raise
                place[...] = self.fill

    def _read_file(
        self,
        number: Sequence[int],
        part: Region,
        out: Array,
        decoded: Callable[[Array, Region, Array], None],
        known: _FetchedRanges | None = None,
        *,
        strict: bool,
    ) -> None:
        """Read what a region has of one file."""
        with self.files.reading(file_name(number)) if known is None else nullcontext(known) as file:
            for position, cell, tile in self._tiles(file, number, part, strict=strict):
                corner = [p * t for p, t in zip(position, self.tile_shape, strict=True)]
                piece = tile[tuple(slice(c.start - o, c.stop - o) for c, o in zip(cell, corner, strict=True))]
                decoded(piece, cell, out[within(cell, part)])

    def _tiles(
        self, file: Ranges | _FetchedRanges, number: Sequence[int], part: Region, *, strict: bool
    ) -> Iterator[tuple[tuple[int, ...], Region, Array]]:
        """Yield the tiles of a file that a part needs, each in this thread's own memory, where it stays until the next.

        Yields:
            Its position in the grid of tiles, what the part has of it, and the tile.

        Raises:
            ValueError: one is damaged, or was never written.
        """
        index = file.index if isinstance(file, _FetchedRanges) else self._index(file, number)
        wanted = list(self._places(index, part))
        there = file.parts([place for _, _, place in wanted if place != NOWHERE])
        for position, cell, place in wanted:
            if place == NOWHERE:
                if strict:
                    raise ValueError(f"{self.path(number)}: a tile was never written")
                yield position, cell, np.full(self.tile_shape, self.fill, self.dtype)
                continue
            raw = next(there)
            if len(raw) != place[1] or not intact(raw):
                raise ValueError(f"{self.path(number)}: a tile is damaged")
            tile = own_memory("tile", self.tile_shape, self.dtype)
            unpack(memoryview(raw)[:-CHECKSUM_BYTES], tile, self.path(number))
            yield position, cell, tile

    def _places(self, index: Array, part: Region) -> Iterator[tuple[tuple[int, ...], Region, tuple[int, int]]]:
        """Yield the tiles that a part of a file needs: position, what the part has of it, and its offset and length."""
        for position, cell in cells(part, self.tile_shape):
            offset, length = index[tuple(p % n for p, n in zip(position, self.counts, strict=True))]
            yield position, cell, (int(offset), int(length))

    def _index(self, file: Ranges, number: Sequence[int]) -> Array:
        """Read where the tiles of a file are.

        Raises:
            ValueError: it is damaged.
        """
        size = 16 * math.prod(self.counts) + CHECKSUM_BYTES
        raw = file.tail(size)
        if len(raw) != size or not intact(raw):
            raise ValueError(f"{self.path(number)}: where its tiles are is damaged")
        return np.frombuffer(raw[:-CHECKSUM_BYTES], "<u8").reshape(*self.counts, 2)


class _FetchedRanges:
    """Parts of a file that were read, and where its tiles are."""

    def __init__(self, index: Array, known: Mapping[tuple[int, int], bytes]) -> None:
        self.index, self._known = index, known

    def parts(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return (self._known[place] for place in places)


Fetched = Mapping[tuple[int, ...], _FetchedRanges]
"""What was read of files, by their positions in the grid of files."""


@dataclass
class _Band:
    """Tiles side by side: rows from ``start``, at most as many as a tile has."""

    start: int
    stop: int
    tiles: list[Array]
    rows: list[Future[None]] = field(default_factory=list)


class Filling:
    """A region of the files while it is written: rows come part by part, and are encoded behind the caller's back.

    All files appear at once, when all rows are there. Errors of the threads are raised by whatever is called next.
    """

    def __init__(self, tiles: Tiles, region: Region, encode: Encode, pool: Threads) -> None:
        """Begin with the first row of a region, which begins where files do.

        Args:
            tiles: the files.
            region: of the array, of two dimensions at least.
            encode: called from several threads.
            pool: threads that each compute on one core, and begin what they are given in order.
        """
        self._tiles, self._region, self._encode, self._pool = tiles, region, encode, pool
        self._columns = [cell for _, cell in cells(region[1:], tiles.tile_shape[1:])]
        self._runs = _runs(self._columns)
        self._next = region[0].start
        self._band: _Band | None = None
        self._pending: deque[Future[Any]] = deque()
        self._bands: deque[Future[None]] = deque()
        self._free: list[list[Array]] = []
        self._files: dict[tuple[int, ...], _File] = {}

    def add(self, values: Array) -> None:
        """Take the next rows, which must not change any more.

        Raises:
            OSError: the disk refused.
        """
        share = max(1, math.ceil(len(values) / self._pool.count))
        start = 0
        while start < len(values):
            band = self._band = self._band or self._open()
            part = values[start : start + min(share, band.stop - self._next)]
            placed = self._pool.submit(self._place, band, self._next, part)
            self._pending.append(placed)
            band.rows.append(placed)
            start += len(part)
            self._next += len(part)
            if self._next == band.stop:
                self._close(band)
                self._band = None
        while len(self._pending) > self._pool.count:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Complete the files, aside.

        Raises:
            OSError: the disk refused.
        """
        assert self._next == self._region[0].stop, "rows are missing"
        while self._bands:
            self._bands.popleft().result()
        self._pending.clear()
        self._free.clear()
        for file in self._files.values():
            file.finish()

    def appear(self) -> dict[Location, FileSum]:
        """Have the files appear; return what is known of each.

        Raises:
            OSError: the disk refused, or they were removed meanwhile.
        """
        written = [file.written for file in self._files.values()]
        for file in written:
            file.appear()
        return {file.path: file.sum for file in written}

    def abandon(self) -> None:
        """Begin nothing more, wait for what is under way, remove what is left aside, and let go of all memory."""
        left = [*self._pending, *self._bands]
        for future in reversed(left):
            future.cancel()
        wait(left)
        self._band = None
        self._free.clear()
        self._pending.clear()
        self._bands.clear()
        for file in self._files.values():
            file.written.abandon()

    def _open(self) -> _Band:
        while len(self._bands) >= AHEAD:
            self._bands.popleft().result()
        height = self._tiles.tile_shape[0]
        start = self._next
        stop = min(self._region[0].stop, (start // height + 1) * height)
        tiles = (
            self._free.pop()
            if self._free
            else [np.empty(self._tiles.tile_shape, self._tiles.dtype) for _ in self._columns]
        )
        for tile, cell in zip(tiles, self._columns, strict=True):
            if (stop - start, *(c.stop - c.start for c in cell)) != self._tiles.tile_shape:
                tile.fill(self._tiles.fill)  # what is beyond the end of the array
        return _Band(start, stop, tiles)

    def _place(self, band: _Band, first: int, values: Array) -> None:
        """Encode some rows of a band into its tiles."""
        step = max(1, CHUNK * len(values) // max(1, values.size))
        for start in range(0, len(values), step):
            rows = values[start : start + step]
            inside = slice(first + start - band.start, first + start - band.start + len(rows))
            encoded = self._encode(rows, first + start - self._region[0].start)
            for columns, cells in self._runs:
                part = encoded(within(columns, self._region[1:]))
                for number, cell in cells:
                    where = tuple(slice(0, c.stop - c.start) for c in cell)
                    convert(part[(slice(None), *within(cell, columns))], band.tiles[number][(inside, *where)])

    def _close(self, band: _Band) -> None:
        packed = [self._pool.submit(self._packed, band, tile) for tile in band.tiles]
        self._pending += packed
        before = self._bands[-1] if self._bands else None
        self._bands.append(self._pool.submit(self._append, band, packed, before))

    def _packed(self, band: _Band, tile: Array) -> bytes:
        for placed in band.rows:
            placed.result()
        return pack(tile)

    def _append(self, band: _Band, packed: list[Future[bytes]], before: Future[None] | None) -> None:
        """Write a band's tiles behind those of the band before."""
        if before is not None:
            before.result()
        shapes = zip(self._tiles.file_shape, self._tiles.tile_shape, strict=True)
        sizes = list(shapes)
        for cell, tile in zip(self._columns, packed, strict=True):
            at = (band.start, *(c.start for c in cell))
            number = tuple(a // f for a, (f, _) in zip(at, sizes, strict=True))
            position = tuple(a % f // t for a, (f, t) in zip(at, sizes, strict=True))
            if number not in self._files:
                self._files[number] = _File(self._tiles.files, number, self._tiles.counts)
            self._files[number].append(position, tile.result())
        self._free.append(band.tiles)


def _runs(cells: list[Region]) -> list[tuple[Region, list[tuple[int, Region]]]]:
    """Join cells side by side, as far as they are few enough columns to be encoded at once; with their numbers."""
    found: list[tuple[Region, list[tuple[int, Region]]]] = []
    for number, cell in enumerate(cells):
        if found and len(cell) == 1 and cell[0].stop - found[-1][0][0].start <= CHUNK:
            (columns,), inside = found.pop()
            found.append(((slice(columns.start, cell[0].stop),), [*inside, (number, cell)]))
        else:
            found.append((cell, [(number, cell)]))
    return found


class _File:
    """A file while it is written, aside."""

    def __init__(self, files: Files, number: tuple[int, ...], counts: tuple[int, ...]) -> None:
        self.written = files.grow(file_name(number))
        self._index = np.full((*counts, 2), EMPTY, "<u8")

    def append(self, position: tuple[int, ...], packed: bytes) -> None:
        self._index[position] = self.written.sum.length, len(packed) + CHECKSUM_BYTES
        self.written.write(packed)
        self.written.write(checksum(packed))

    def finish(self) -> None:
        raw = self._index.tobytes()
        self.written.write(raw)
        self.written.write(checksum(raw))
        self.written.finish()


def file_name(number: Sequence[int]) -> str:
    """Return the name of a file of an array by its position in the grid of files."""
    return "/".join(("c", *map(str, number)))


def cells(region: Region, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Region]]:
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


def within(part: Region, whole: Region) -> Region:
    """Return where a part is inside of a region that has it."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def pack(tile: Array) -> bytes:
    """Compress a tile."""
    shuffle = blosc.SHUFFLE if tile.itemsize > 1 else blosc.NOSHUFFLE
    packed: bytes = blosc.compress(tile, b"lz4", 5, shuffle)
    return packed


def unpack(packed: bytes | memoryview, tile: Array, file: object) -> None:
    """Decompress a tile into its place.

    Raises:
        ValueError: it is of another size; what ``file`` it is in is said.
    """
    if int.from_bytes(packed[4:8], "little") != tile.nbytes:  # as Blosc's header has it
        raise ValueError(f"{file}: a tile has another size")
    blosc.decompress(packed, tile)


def checksum(raw: bytes) -> bytes:
    """Return the CRC-32C that stands behind some bytes."""
    return int(google_crc32c.value(raw)).to_bytes(CHECKSUM_BYTES, "little")


def intact(raw: bytes) -> bool:
    """Say whether what stands behind some bytes is their CRC-32C."""
    return int(google_crc32c.value(raw)) == RESIDUE
