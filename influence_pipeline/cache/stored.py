"""Arrays of the cache as they are read: decoded, and damage is an error that names the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from influence_pipeline.cache.ahead import Ahead
from influence_pipeline.cache.chunks import Chunks
from influence_pipeline.cache.encoding import decode_into
from influence_pipeline.cache.layout import Kept
from influence_pipeline.cache.tiles import Fetched, Region, Tiles
from influence_pipeline.errors import CacheDamaged, WorkError
from influence_pipeline.location import Location
from stages.stage import Array

KEPT_FACTORS = 8
"""Bands of rows whose factors are kept."""


class StoredArray:
    """An array as it is read: damage is an error that names the place."""

    def __init__(self, kept: Kept, path: Location, suspect: Callable[[Any], str | None]) -> None:
        """Read what is kept like that at ``path``; ``suspect`` looks for damage in a part, and says what it is."""
        self.shape, self.dtype, self.path = kept.shape, kept.dtype, path
        self.tiles = Tiles(path, kept) if kept.shards else None
        self._file_shape = kept.shards or kept.chunks
        self._chunks = Chunks(path, kept)
        self._suspect = suspect

    def __getitem__(self, index: Any) -> Array:
        """Return a part, of whole numbers and slices of step 1.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: it is not as it was written, or was never written.
        """
        lost: list[str] = []
        part = self.checked(index, lambda: self._part(index, lost))
        if lost:
            raise self.damaged(self._suspect(index) or f"{self.path / lost[0]} is missing")
        return part

    def checked(self, index: Any, read: Callable[[], Array]) -> Array:
        """Return what ``read`` reads of a part, after looking for what is damaged where that fails.

        Raises:
            CacheDamaged: something is.
        """
        try:
            return read()
        except CacheDamaged as error:
            what = self._suspect(index)
            if what is None:
                # Nothing is wrong with the files: another process may have been writing them.
                return read()
            # Another thread may have been faster, and what it found is discarded.
            raise self.damaged(what if str(self.path) in what else f"{error} ({what})") from error

    def filled(self, index: Any) -> Array:
        """Return a part; what was never written is fill values.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: a checksum does not fit.
            MemoryError: there is not enough.
            IndexError: there is no such part.
        """
        return self._part(index)

    def _part(self, index: Any, lost: list[str] | None = None) -> Array:
        """Return a part; where ``lost`` is given, what was never written is refused or, of small files, named there."""
        region, inside = _region_around(index, self.shape)
        if self.tiles is None:
            if lost is not None:
                lost.clear()
            with self._named(index):
                out = self._chunks.read(region, lost)
        else:
            out = np.empty([part.stop - part.start for part in region], self.dtype)
            self.read(region, out, lambda tile, cell, place: np.copyto(place, tile), strict=lost is not None)
        found: Array = out[inside]
        return found

    def read(
        self,
        region: Region,
        out: Array,
        decoded: Callable[[Array, Region, Array], None],
        *,
        strict: bool = True,
        fetched: Fetched | None = None,
    ) -> None:
        """Read a region of an array of tiles, as :meth:`Tiles.read` does."""
        assert self.tiles is not None
        with self._named(region):
            self.tiles.read(region, out, decoded, strict=strict, fetched=fetched)

    @contextmanager
    def _named(self, index: Any) -> Iterator[None]:
        """Turn what goes wrong in reading into an error of the cache.

        Raises:
            WorkError: the disk refused.
            CacheDamaged: a checksum does not fit, or a file is missing.
            MemoryError: there is not enough.
            IndexError: there is no such part.
        """
        try:
            yield
        except (MemoryError, IndexError, WorkError):
            raise
        except FileNotFoundError as error:
            raise CacheDamaged(f"{error.filename} is missing") from error
        except OSError as error:
            raise WorkError(f"{self.path}: {index} cannot be read: {error}") from error
        except Exception as error:
            raise CacheDamaged(f"{self.path}: {index} cannot be read: {error}") from error

    def never_written(self, index: Any) -> CacheDamaged:
        """Make the error for a part that has entries that no block wrote."""
        return self.damaged(self._suspect(index) or f"{self.path} has entries that were never written")

    def damaged(self, what: str) -> CacheDamaged:
        """Make the error for a part that is not as it was written."""
        return CacheDamaged(f"{what}. Run again: it is computed anew, and nothing else", self.path.parent)


class DecodedRows:
    """Rows of float32 vectors, decoded as they are sliced; several threads may do so at once.

    Attributes:
        shape: of all of them.
        itemsize: bytes of an entry as it is kept.
        factors: (n, 1), what rows are to be multiplied by after :meth:`read_into`; None where they have no such factor.
    """

    def __init__(self, kept: StoredArray, scale: StoredArray | None) -> None:
        """Decode ``kept`` by the factors of its rows."""
        self.shape: tuple[int, ...] = kept.shape
        self.itemsize = kept.dtype.itemsize
        self._kept, self._scale = kept, scale
        self._known: dict[tuple[int, int], Array] = {}
        self.factors = None if scale is None or scale.shape[1] > 1 else RowFactors(kept, scale)

    def __getitem__(self, index: Any) -> Array:
        """Return a part as float32.

        Raises:
            CacheDamaged: a part was never written.
        """
        return self.part(index)

    def part(self, index: Any, fetched: Fetched | None = None) -> Array:
        """Return a part as float32, of which some was fetched before.

        Raises:
            CacheDamaged: a part was never written.
        """
        region = _region(index, self.shape)
        assert region is not None, index
        out = np.empty([part.stop - part.start for part in region], np.float32)
        self._read(region, out, self._scale, fetched)
        return out

    def read_into(self, index: tuple[slice, slice], out: Array, fetched: Fetched | None = None) -> None:
        """Read a part as float32, but for the factors of whole rows; these tell of rows that were never written.

        Raises:
            CacheDamaged: a part was never written, and rows have no factors of their own.
        """
        region = _region(index, self.shape)
        assert region is not None, index
        if self.factors is None:
            self._read(region, out, self._scale, fetched)
        else:
            self._decode(region, out, None, fetched)

    @contextmanager
    def ahead(
        self, items: Sequence[Sequence[tuple[slice, slice]]], at_once: int, most_bytes: int
    ) -> Iterator[DecodedRows | Ahead]:
        """Have parts fetched before they are asked for, where that takes long; see :class:`Ahead`."""
        if self._kept.tiles is None or not self._kept.tiles.files.far:
            yield self
            return
        with closing(Ahead(self, items, at_once, most_bytes)) as rows:
            yield rows

    def fetch(self, parts: Sequence[Region]) -> Fetched:
        """Read what some parts need, as it is kept."""
        assert self._kept.tiles is not None
        if self.factors is None and self._scale is not None:
            for part in parts:
                self._factors(self._scale, part[0])
        return self._kept.tiles.fetch(parts)

    def _factors(self, scale: StoredArray, rows: slice) -> Array:
        """Return the factors of some rows; where reading takes long, those that were read last are kept."""
        key = rows.start, rows.stop
        found = self._known.get(key)
        if found is None:
            found = scale[rows]
            if self._kept.tiles is not None and self._kept.tiles.files.far and not np.isnan(found).any():
                self._known[key] = found
                for oldest in list(self._known)[:-KEPT_FACTORS]:
                    self._known.pop(oldest, None)
        return found

    def _read(self, region: Region, out: Array, factors: StoredArray | None, fetched: Fetched | None) -> None:
        """Read a part.

        Raises:
            CacheDamaged: a part was never written.
        """
        scale = None if factors is None else self._factors(factors, region[0])
        self._decode(region, out, scale, fetched)
        looked_at = out if scale is None else scale
        if looked_at.size and np.isnan(looked_at.min()):  # the least of numbers with a NaN is NaN
            raise self._kept.never_written(region)

    def _decode(self, region: Region, out: Array, scale: Array | None, fetched: Fetched | None) -> None:
        first = region[0].start

        def decoded(tile: Array, cell: Region, place: Array) -> None:
            rows, columns = cell
            decode_into(
                tile, None if scale is None else scale[rows.start - first : rows.stop - first], columns.start, place
            )

        known = [fetched]

        def read() -> Array:
            if self._kept.tiles is None:
                decoded(self._kept[region], region, out)
            else:  # once more, from the files themselves, where that failed
                self._kept.read(region, out, decoded, fetched=known.pop() if known else None)
            return out

        self._kept.checked(region, read)


class RowFactors:
    """What rows are to be multiplied by that were multiplied by one factor each to be kept."""

    def __init__(self, kept: StoredArray, scale: StoredArray) -> None:
        """Read them from ``scale``, for the rows of ``kept``."""
        self.shape: tuple[int, ...] = scale.shape
        self._kept, self._scale = kept, scale

    def __getitem__(self, rows: slice) -> Array:
        """Return those of some rows, (n, 1) float32.

        Raises:
            CacheDamaged: a row was never written.
        """
        scale = self._scale[rows]
        if np.isnan(scale).any():
            raise self._kept.never_written((rows, slice(None)))
        found: Array = 1 / scale
        return found


def _region_around(index: Any, shape: tuple[int, ...]) -> tuple[Region, tuple[Any, ...]]:
    """Return the region that an index of whole numbers and slices is of, and the index inside of it.

    Raises:
        IndexError: there is no such part.
    """
    parts = index if isinstance(index, tuple) else (index,)
    inside: list[Any] = []
    around: list[Any] = []
    for part, length in zip(parts, shape, strict=False):
        if isinstance(part, (int, np.integer)):
            if not -length <= part < length:
                raise IndexError(f"{part} of {length}")
            around.append(slice(int(part) % length, int(part) % length + 1))
            inside.append(0)
        else:
            around.append(part)
            inside.append(slice(None))
    region = _region(index if index is Ellipsis else tuple(around), shape)
    assert region is not None, index
    return region, () if index is Ellipsis else tuple(inside)


def _region(index: Any, shape: tuple[int, ...]) -> Region | None:
    """Return an index as a slice of step 1 for each dimension; None where it is none of such slices."""
    parts = index if isinstance(index, tuple) else (index,)
    if parts == (Ellipsis,):
        parts = ()
    if not all(isinstance(part, slice) for part in parts):
        return None
    parts = (*parts, *(slice(None) for _ in shape[len(parts) :]))
    found = [slice(*part.indices(length)) for part, length in zip(parts, shape, strict=True)]
    return tuple(found) if all(part.step == 1 and part.stop >= part.start for part in found) else None
