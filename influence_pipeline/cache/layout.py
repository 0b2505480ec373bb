"""Layouts: which arrays a group has, how they are cut into blocks, and which file holds what."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import google_crc32c
import numpy as np

from influence_pipeline import plan
from influence_pipeline.cache.encoding import SCALED, factors
from influence_pipeline.cache.record import Record
from influence_pipeline.cache.store import Files, files_at
from influence_pipeline.errors import CacheDamaged
from influence_pipeline.location import Location
from influence_pipeline.plan import tile_shape
from stages.stage import ArraySpec, Axis, Block, Grid

RECORDS, FINISHED, SCALE = "blocks", "finished", "scale"
CODECS = ("bytes", "blosc", "crc32c"), ("bytes", "crc32c")
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
INDEX = [LITTLE, {"name": "crc32c"}]
GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
TYPES = {"float16", "float32", "float64", "int8", "int64", "uint8"}
DESCRIPTION = "zarr.json"


class Layout:
    """The shape of a group: its grid, its arrays, and which file holds what.

    Attributes:
        grid: the blocks.
        arrays: what blocks fill, as stages give it.
        stored: the same with what encodings add, by name.
        merged: what is merged from all blocks, by name.
    """

    def __init__(self, grid: Grid, arrays: Sequence[ArraySpec], merged: Sequence[ArraySpec] = ()) -> None:
        """Lay out what blocks fill (``arrays``) and what is merged from them."""
        self.grid = grid
        self.arrays = tuple(arrays)
        scales = [self.scale(spec) for spec in arrays if spec.encoding in SCALED]
        self.stored = tuple(sorted((*self.arrays, *scales), key=lambda spec: spec.name))
        self.merged = tuple(sorted(merged, key=lambda spec: spec.name))
        self._shards: dict[ArraySpec, tuple[int, ...]] = {}

    @staticmethod
    def scale(spec: ArraySpec) -> ArraySpec:
        """Return the array of the factors by which another one's rows are kept."""
        shape = spec.shape[0], factors(spec.shape[-1], spec.encoding)
        return ArraySpec(SCALE, (spec.dims[0], "group"), shape, about=f"{spec.name} were multiplied by this")

    @property
    def records(self) -> ArraySpec:
        """The array of the blocks' records."""
        names = [f"{axis.name}_block" for axis in self.grid.axes]
        width = Record.size(self.files_each)
        about = "a block without a record does not exist"
        dims = (*(names if len(names) > 1 else ["block"]), "byte")
        return ArraySpec(RECORDS, dims, (*self.grid.shape, width), "uint8", about=about)

    @property
    def finished(self) -> ArraySpec:
        """The record of what was merged."""
        return ArraySpec(FINISHED, ("finished_byte",), (Record.size(0),), "uint8", about="record of what was merged")

    @property
    def all(self) -> tuple[ArraySpec, ...]:
        """Every array of the group."""
        return (*self.stored, *self.merged, self.records, *((self.finished,) if self.merged else ()))

    def shard_shape(self, spec: ArraySpec) -> tuple[int, ...]:
        """Return the shape of one file of an array: a block's part of it, in whole tiles."""
        if spec not in self._shards:  # asked for by every block
            self._shards[spec] = self._shard_shape(spec)
        return self._shards[spec]

    def _shard_shape(self, spec: ArraySpec) -> tuple[int, ...]:
        if spec.name == RECORDS:
            return (*(1 for _ in spec.shape[:-1]), spec.shape[-1])
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
        """Return the names of all files that one block fills, its record aside."""
        return [pattern.format(*block.index) for pattern in self._patterns]

    @functools.cached_property
    def _patterns(self) -> list[str]:
        """The names of the files of any block, with its index left open: a file along an axis is of one band."""
        axes = {name: n for n, axis in enumerate(self.grid.axes) for name in (axis.name, f"{axis.name}_block")}
        found = []
        for spec in self.stored:
            dims = zip(spec.dims, spec.shape, self.shard_shape(spec), strict=True)
            spans = [
                [f"{{{axes[dim]}}}"] if dim in axes else [str(i) for i in range(math.ceil(length / shard))]
                for dim, length, shard in dims
            ]
            found += [f"{spec.name}/c/{'/'.join(index)}" for index in itertools.product(*spans)]
        return found

    def merged_files(self) -> list[str]:
        """Return the names of all files that merging fills."""
        return [name for spec in self.merged for name in self.files(spec, tuple(slice(0, n) for n in spec.shape))]

    @property
    def files_each(self) -> int:
        """How many files a block fills, its record aside."""
        return len(self._patterns)

    @property
    def file_count(self) -> int:
        """How many files there are once all blocks are: each fills as many, beside its record."""
        described, summaries = len(self.all) + 1, len(self.grid) // plan.SEGMENT
        return (
            described
            + summaries
            + len(self.grid) * (self.files_each + 1)
            + len(self.merged_files())
            + bool(self.merged)
        )

    def blocks_of(self, name: str, index: tuple[Any, ...]) -> list[Block]:
        """Return the blocks that a part of an array is of; none where it is merged from all."""
        spec = next((spec for spec in self.stored if spec.name == name), None)
        if spec is None:
            return []
        spans = []
        for position, axis in enumerate(self.grid.axes):
            span = range(axis.count)
            for dim, part, length in zip(spec.dims, index, spec.shape, strict=False):
                if dim not in (axis.name, f"{axis.name}_block"):
                    continue
                if isinstance(part, slice):
                    start, stop, _ = part.indices(length)
                elif isinstance(part, (int, np.integer)):
                    start, stop = int(part), int(part) + 1
                else:
                    continue
                band = axis.band if dim == axis.name else 1
                span = range(start // band, min(axis.count, math.ceil(stop / band)))
            spans.append(span)
            assert position < len(self.grid.axes)
        return [self.grid.block(found) for found in itertools.product(*spans)]

    def bytes_bound(self, shares: Mapping[str, float] = MappingProxyType({})) -> int:
        """Return the bytes of all arrays, and of what describes them, at most.

        Args:
            shares: of its bytes, what an array of some name takes compressed, or all descriptions by their name.
        """
        described = math.ceil(self.described_bytes * shares.get(DESCRIPTION, 1.0))
        return described + sum(math.ceil(array_bytes(spec) * shares.get(spec.name, 1.0)) for spec in self.all)

    @property
    def described_bytes(self) -> int:
        """Bytes of all descriptions, at most."""
        return 4096 * (len(self.all) + 1)

    @property
    def merged_bytes(self) -> int:
        """Bytes of what is merged, uncompressed."""
        return sum(map(array_bytes, self.merged))

    @property
    def attributes(self) -> dict[str, Any]:
        """What a group says of its layout: the band of each axis, in order, and the names of its arrays."""
        return {
            "bands": {axis.name: axis.band for axis in self.grid.axes},
            "arrays": sorted(spec.name for spec in self.all),
        }


@dataclass(frozen=True)
class Kept:
    """How an array is kept, in the words of zarr's own arrays.

    Attributes:
        shape: of all of it.
        dtype: as it is on disk.
        shards: the shape of a file of several tiles; None where each is of one.
        chunks: the shape of a tile.
        fill_value: what unwritten entries read as.
        compressed: whether tiles are; all of them are checksummed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shards: tuple[int, ...] | None
    chunks: tuple[int, ...]
    fill_value: Any
    compressed: bool

    @classmethod
    def described(cls, description: dict[str, Any]) -> Kept:
        """Read it from an array's zarr.json.

        Raises:
            ValueError: it names codecs or a type that no cache has.
        """
        if description["data_type"] not in TYPES:
            raise ValueError(f"it has type {description['data_type']}")
        found, file = description["codecs"], tuple(description["chunk_grid"]["configuration"]["chunk_shape"])
        sharded = [codec["name"] for codec in found] == ["sharding_indexed"]
        inner = found[0]["configuration"]["codecs"] if sharded else found
        names = tuple(codec["name"] for codec in inner)
        if names not in CODECS:
            raise ValueError(f"it has codecs {', '.join(names)}")
        tile = tuple(found[0]["configuration"]["chunk_shape"]) if sharded else file
        dtype = np.dtype(description["data_type"])
        return cls(
            *(tuple(description["shape"]), dtype, file if sharded else None, tile),
            *(fill_value(description["data_type"]), "blosc" in names),
        )


def array_bytes(spec: ArraySpec) -> int:
    """Return the bytes of an array, uncompressed."""
    return math.prod(spec.shape) * np.dtype(spec.encoding or spec.dtype).itemsize


def fill_value(dtype: str) -> Any:
    """Return what unwritten entries read as: never a plausible value."""
    return np.nan if np.dtype(dtype).kind == "f" else 0 if np.dtype(dtype).kind == "u" else -1


def description(layout: Layout, spec: ArraySpec) -> dict[str, Any]:
    """Return the zarr.json of an array, as zarr itself writes it, several times slower."""
    dtype, shard = np.dtype(spec.encoding or spec.dtype), layout.shard_shape(spec)
    record = spec.name in (RECORDS, FINISHED)
    tile = shard if record else tile_shape(shard)
    codecs = _codecs(dtype, compressed=not record)
    if tile != shard:
        inside = {"chunk_shape": list(tile), "codecs": codecs, "index_codecs": INDEX, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": inside}]
    fill = fill_value(dtype.name)
    return {
        "shape": list(spec.shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if np.isnan(fill) else fill,
        "codecs": codecs,
        "attributes": {
            "about": spec.about,
            **({"encoding": spec.encoding} if spec.encoding else {}),
            **({"merged": True} if spec in layout.merged else {}),
        },
        **({"dimension_names": list(spec.dims)} if spec.dims else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _codecs(dtype: np.dtype[Any], *, compressed: bool) -> list[dict[str, Any]]:
    size, shuffle = dtype.itemsize, "shuffle" if dtype.itemsize > 1 else "noshuffle"
    options = {"typesize": size, "cname": "lz4", "clevel": 5, "shuffle": shuffle, "blocksize": 0}
    blosc = {"name": "blosc", "configuration": options}
    return [LITTLE if size > 1 else {"name": "bytes"}, *([blosc] if compressed else []), {"name": "crc32c"}]


# ---- descriptions: zarr.json files, which are checked as data are ----------------------------------------------------


def seal(path: Location, **changes: Any) -> None:
    """Write into a zarr.json, among its attributes, a checksum of all of it; after changing some entries.

    Raises:
        OSError: the disk refused; the file is as it was.
    """
    files = files_at(path.parent)
    write_description(files, path.name, {**json.loads(files.read(path.name)), **changes})


def write_description(files: Files, name: str, described: dict[str, Any]) -> None:
    """Write a zarr.json with its checksum, in one step for whoever looks.

    Raises:
        OSError: the disk refused; the file is as it was.
    """
    described = {**described, "attributes": {**described.get("attributes", {}), "checksum": 0}}
    described["attributes"]["checksum"] = _checksum(described)
    files.put(name, _written(described))


def sealed(path: Location, known: bytes | None = None) -> dict[str, Any]:
    """Return a zarr.json that is as it was sealed.

    Args:
        path: where it is.
        known: what it has, where it was read.

    Raises:
        CacheDamaged: it is missing, cannot be read, or is not.
    """
    try:
        raw = files_at(path.parent).read(path.name) if known is None else known
        described = json.loads(raw)
        fits = _fits(raw)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheDamaged(f"{path} cannot be read ({type(error).__name__}: {error}); a run mends it") from error
    if not fits:
        raise CacheDamaged(f"{path} is damaged (its checksum does not fit); a run mends it")
    return dict(described)


@functools.lru_cache(maxsize=1024)
def _fits(raw: bytes) -> bool:
    """Say whether the bytes of a zarr.json are those that were sealed; each is worked out once."""
    described = json.loads(raw)
    return bool(described["attributes"]["checksum"] == _checksum(described)) and raw == _written(described)


def _written(described: dict[str, Any]) -> bytes:
    return json.dumps(described, indent=2).encode()


def _checksum(described: dict[str, Any]) -> int:
    without = {name: value for name, value in described["attributes"].items() if name != "checksum"}
    return int(google_crc32c.value(json.dumps({**described, "attributes": without}, sort_keys=True).encode()))


def described_layout(bands: dict[str, int], arrays: dict[str, dict[str, Any]]) -> Layout:
    """Return the layout of a group from what its descriptions say.

    Args:
        bands: of the grid's axes, in order.
        arrays: the zarr.json of each array, by name.

    Returns:
        The layout. Where arrays differ in the length of an axis, growth was interrupted, or is under way: what all of
        them have is there.
    """
    counts = arrays[RECORDS]["shape"][:-1]
    axes = []
    for (name, band), count in zip(bands.items(), counts, strict=True):
        lengths = {
            length
            for described in arrays.values()
            for dim, length in zip(described.get("dimension_names") or (), described["shape"], strict=True)
            if dim == name
        }
        axes.append(Axis(name, min((*lengths, count * band)), band))
    specs: dict[bool, list[ArraySpec]] = {True: [], False: []}
    for name, described in sorted(arrays.items()):
        if name not in (RECORDS, FINISHED, SCALE):
            attributes, encoding = described["attributes"], described["attributes"].get("encoding", "")
            spec = ArraySpec(
                name,
                tuple(described.get("dimension_names") or ()),
                tuple(described["shape"]),
                "float32" if encoding else described["data_type"],
                encoding,
                attributes["about"],
            )
            specs[bool(attributes.get("merged"))].append(spec)
    return Layout(Grid(tuple(axes)), specs[False], specs[True])
