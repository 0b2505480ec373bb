"""One stage's arrays in the cache: laid out once, filled block by block, read back.

``zarr.json`` files are written at creation only, aside, and renamed in; growth is one process under a lock.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from influence_pipeline.cache.encoding import encode
from influence_pipeline.cache.record import NOTHING, Record, digest
from influence_pipeline.cache.stored import DecodedRows, StoredArray
from influence_pipeline.errors import CacheDamaged, WorkError
from influence_pipeline.plan import tile_shape
from stages.stage import Array, ArrayLike, ArraySpec, Block, Grid

log = logging.getLogger(__name__)

RECORDS, FINISHED, SCALE = "blocks", "finished", "scale"
PARTIAL = "*.partial"


def fill_value(dtype: str) -> Any:
    """Return what unwritten entries read as: never a plausible value."""
    return np.nan if np.dtype(dtype).kind == "f" else 0 if np.dtype(dtype).kind == "u" else -1


class Layout:
    """The shape of a group: its grid, its arrays, and which file holds what."""

    def __init__(self, grid: Grid, arrays: Sequence[ArraySpec], merged: Sequence[ArraySpec]) -> None:
        """Lay out what blocks fill (``arrays``) and what is merged from them."""
        self.grid, self.merged = grid, tuple(merged)
        self.arrays = tuple(arrays)
        scales = [
            ArraySpec(SCALE, (spec.dims[0], "tile"), (spec.shape[0], 1), about=f"{spec.name} were multiplied by this")
            for spec in arrays
            if spec.encoding == "float16"
        ]
        self.stored = (*self.arrays, *scales)

    def shard_shape(self, spec: ArraySpec) -> tuple[int, ...]:
        """Return the shape of one file of an array: a block's part of it, in whole tiles."""
        parts = []
        for dim, length in zip(spec.dims, spec.shape, strict=True):
            axis = self.grid.axis(dim)
            of_band = dim.endswith("_block") and self.grid.axis(dim.removesuffix("_block")) is not None
            parts.append(axis.band if axis else 1 if of_band else length)
        tile = tile_shape(tuple(parts))
        return tuple(t * math.ceil(p / t) for t, p in zip(tile, parts, strict=True))

    def files(self, spec: ArraySpec, region: tuple[slice, ...]) -> list[str]:
        """Return the names of the files that hold a region of an array, relative to the group."""
        if not spec.shape:
            return [f"{spec.name}/c"]
        shard = self.shard_shape(spec)
        spans = [range(part.start // s, math.ceil(part.stop / s)) for part, s in zip(region, shard, strict=True)]
        return [f"{spec.name}/c/{'/'.join(map(str, index))}" for index in itertools.product(*spans)]

    def block_files(self, block: Block) -> list[str]:
        """Return the names of all files that one block fills."""
        return [name for spec in self.stored for name in self.files(spec, spec.region(self.grid, block))]

    def bytes_bound(self) -> int:
        """Return the bytes of all arrays, uncompressed, and of what describes them."""
        described = 4096 * (len(self.stored) + len(self.merged) + 2)
        return described + sum(
            math.prod(spec.shape) * np.dtype(spec.encoding or spec.dtype).itemsize
            for spec in (*self.stored, *self.merged)
        )

    def merged_files(self) -> list[str]:
        """Return the names of all files that merging fills."""
        return [name for spec in self.merged for name in self.files(spec, tuple(slice(0, n) for n in spec.shape))]


class Group:
    """A stage's arrays on disk."""

    def __init__(self, path: Path) -> None:
        """Open the group at this folder.

        Raises:
            CacheDamaged: its description cannot be read.
        """
        self.path = path
        try:
            self._zarr = zarr.open_group(path, mode="r+")
        except Exception as error:
            raise CacheDamaged(f"{path}/zarr.json cannot be read ({error}): delete the folder and run again") from error
        self.attributes: dict[str, Any] = dict(self._zarr.attrs)
        self._arrays: dict[str, Any] = {}

    @classmethod
    def create(cls, path: Path, layout: Layout, attributes: Mapping[str, Any]) -> Group:
        """Lay out a new group, so that it appears at once and whole; one that is there already is opened.

        Raises:
            OSError: the folder cannot be written.
        """
        if (path / "zarr.json").exists():
            return cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.parent.parent / f"{path.name}.{uuid.uuid4().hex}.partial"
        try:
            group = zarr.create_group(aside, attributes=dict(attributes))
            for spec in (*layout.stored, *layout.merged):
                encoded = spec.encoding if spec.encoding else spec.dtype
                shard = layout.shard_shape(spec)
                tile = tile_shape(shard)
                _create_array(group, spec, encoded, tile, None if tile == shard else shard)
            counts = layout.grid.shape
            width = Record.size(len(layout.block_files(next(iter(layout.grid)))))
            names = [f"{axis.name}_block" for axis in layout.grid.axes]
            names = ["block"] if len(names) == 1 else names
            about = "a block without a record does not exist"
            records = ArraySpec(RECORDS, (*names, "byte"), (*counts, width), "uint8", about=about)
            _create_array(group, records, "uint8", (*(1 for _ in counts), width), None)
            if layout.merged:
                width = Record.size(0)
                finished = ArraySpec(FINISHED, ("finished_byte",), (width,), "uint8", about="record of what was merged")
                _create_array(group, finished, "uint8", (width,), None)
            try:
                aside.rename(path)
            except OSError:
                if not (path / "zarr.json").exists():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls(path)

    # ---- reading -------------------------------------------------------------------------------------------------

    def zarr_array(self, name: str) -> Any:
        """Return the zarr array of this name, to be written, or to be given to users.

        Raises:
            CacheDamaged: its description cannot be read.
        """
        if name not in self._arrays:
            try:
                self._arrays[name] = self._zarr[name].with_config({"write_empty_chunks": True})
            except Exception as error:
                raise CacheDamaged(
                    f"{self.path}/{name}/zarr.json cannot be read ({error}): delete {self.path} and run again"
                ) from error
        return self._arrays[name]

    def array(self, name: str) -> StoredArray:
        """Return an array to be read."""
        return StoredArray(self.zarr_array(name), self.path / name)

    def __contains__(self, name: str) -> bool:
        """Say whether the group has an array of this name."""
        return (self.path / name / "zarr.json").exists()

    def rows(self, name: str) -> ArrayLike:
        """Return an array whose slices are decoded to float32."""
        scale = self.array(SCALE) if self.array(name).dtype == np.float16 else None
        return DecodedRows(self.array(name), scale)

    def records(self) -> Array:
        """Return all records, (…, byte) uint8."""
        return self.array(RECORDS)[...]

    def progress(self) -> tuple[int, int]:
        """Return how many blocks have a record, and how many there are."""
        records = self.records()
        return int(records.reshape(-1, records.shape[-1]).any(axis=1).sum()), math.prod(records.shape[:-1])

    def record(self, block: Block) -> Record | None:
        """Return the record of a block, None where it has none."""
        try:
            return Record.from_bytes(self.array(RECORDS)[block.index])
        except Exception:  # noqa: BLE001 - a record that cannot be read is no record; its block is computed again
            return None

    def valid(self, layout: Layout, block: Block, inputs: bytes | None = None) -> bool:
        """Say whether a block is there: its record, of this extent, of these inputs, with files of its lengths."""
        record = self.record(block)
        return (
            record is not None
            and record.rows == block.rows
            and (inputs is None or record.inputs == inputs)
            and record.lengths == self._lengths(layout.block_files(block))
        )

    def finished(self, layout: Layout) -> bool:
        """Say whether merging was done, of the blocks as they are now."""
        if not layout.merged:
            return True
        record = self.merged()
        return record is not None and record.samples == self._merged_lengths(layout)

    def merged(self) -> Record | None:
        """Return the record of what was merged, None where it is not of the blocks as they are now."""
        try:
            record = Record.from_bytes(self.array(FINISHED)[...])
        except Exception:  # noqa: BLE001 - as for blocks
            return None
        blocks = [Block(index, {}) for index in np.ndindex(self.array(RECORDS).shape[:-1])]
        same = record is not None and record.rows == len(blocks) and record.inputs == self.fingerprint(blocks)
        return record if same else None

    def lost_file(self) -> Path | None:
        """Return a file that should be there when all is computed, and is not or is empty; it would read as filled."""
        for name in sorted(self._zarr.array_keys()):
            array = self.zarr_array(name)
            counts = (math.ceil(n / s) for n, s in zip(array.shape, array.shards or array.chunks, strict=True))
            for index in np.ndindex(*counts):
                path = self.path.joinpath(name, "c", *map(str, index))
                if not self._length(path):
                    return path
        return None

    def fingerprint(self, blocks: Iterator[Block] | Grid | Sequence[Block]) -> bytes:
        """Return a digest of what some blocks hold, by their records."""
        found = [self.record(block) for block in blocks]
        return digest(record.content if record else b"missing" for record in found)

    def bytes_on_disk(self) -> int:
        """Return the bytes of all files."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    # ---- writing -------------------------------------------------------------------------------------------------

    def commit(
        self,
        layout: Layout,
        block: Block,
        values: Mapping[str, Array],
        samples: bytes = NOTHING,
        inputs: bytes = NOTHING,
    ) -> None:
        """Write what a block computed, its record last.

        Raises:
            WorkError: the disk refused; the block does not exist then.
        """
        try:
            if self.record(block) is not None:
                self.zarr_array(RECORDS)[block.index] = 0
            for spec in layout.arrays:
                self._write(spec, spec.region(layout.grid, block), values[spec.name])
            lengths = self._lengths(layout.block_files(block))
            self.zarr_array(RECORDS)[block.index] = Record(block.rows, samples, inputs, lengths).to_bytes()
        except OSError as error:
            raise WorkError(
                f"{self.path}: block {block.index} could not be written: {error}. Finished blocks are kept"
            ) from error

    def commit_merged(self, layout: Layout, values: Mapping[str, Array]) -> None:
        """Write what was merged, its record last.

        Raises:
            WorkError: the disk refused.
        """
        try:
            self.zarr_array(FINISHED)[...] = 0
            for spec in layout.merged:
                self._write(spec, tuple(slice(0, n) for n in spec.shape), values[spec.name])
            record = Record(len(layout.grid), self._merged_lengths(layout), self.fingerprint(layout.grid), ())
            self.zarr_array(FINISHED)[...] = record.to_bytes()
        except OSError as error:
            raise WorkError(f"{self.path}: could not be written: {error}. Finished blocks are kept") from error

    def _write(self, spec: ArraySpec, region: tuple[slice, ...], values: Array) -> None:
        if spec.encoding:
            values, scale = encode(values, spec.encoding)
            if scale is not None:
                self.zarr_array(SCALE)[region[0]] = scale
        target = self.zarr_array(spec.name)
        target[region if region else ...] = np.asarray(values, dtype=target.dtype)

    def _merged_lengths(self, layout: Layout) -> bytes:
        """Return a digest of the lengths of what is merged, of one size however many files growth makes of it."""
        return digest([np.asarray(self._lengths(layout.merged_files()), dtype="<u8")])

    def _lengths(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(self._length(self.path / name) for name in names)

    @staticmethod
    def _length(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that changes this group; others wait. The lock ends with the process that holds it."""
        with open(self.path / "zarr.json", "rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("%s: another process is at work there; waiting for it", self.path)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sweep(self) -> None:
        """Remove what a killed process left half written; only under the lock."""
        for path in self.path.rglob(PARTIAL):
            path.unlink(missing_ok=True)

    def fits(self, layout: Layout) -> bool:
        """Say whether the group can hold a layout: all that differs is that axes of the grid are longer."""
        for spec in (*layout.stored, *layout.merged):
            for dim, wanted, found in zip(spec.dims, spec.shape, self.array(spec.name).shape, strict=True):
                grows = layout.grid.axis(dim.removesuffix("_block")) is not None
                if wanted < found or (wanted > found and not grows):
                    return False
        return True

    def resize(self, layout: Layout) -> None:
        """Make the arrays as long as a layout that fits wants them; only under the lock."""
        records = ArraySpec(RECORDS, (), (*layout.grid.shape, self.array(RECORDS).shape[-1]))
        for spec in (*layout.stored, *layout.merged, records):
            if self.array(spec.name).shape != spec.shape:
                self.zarr_array(spec.name).resize(spec.shape)
        self._arrays.clear()
        self._zarr = zarr.open_group(self.path, mode="r+")


def _create_array(
    group: Any, spec: ArraySpec, dtype: str, tile: tuple[int, ...], shard: tuple[int, ...] | None
) -> None:
    size = np.dtype(dtype).itemsize
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle" if size > 1 else "noshuffle", typesize=size)
    group.create_array(
        spec.name,
        shape=spec.shape,
        dtype=dtype,
        chunks=tile,
        shards=shard,
        fill_value=fill_value(dtype),
        compressors=[blosc, Crc32cCodec()],
        dimension_names=list(spec.dims),
        attributes={"about": spec.about, **({"encoding": spec.encoding} if spec.encoding else {})},
        config={"write_empty_chunks": True},
    )
