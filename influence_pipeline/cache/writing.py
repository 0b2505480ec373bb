"""Blocks while they are written: values come part by part, and are encoded and written while the next are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from influence_pipeline.cache.chunks import Chunks
from influence_pipeline.cache.encoding import SCALED, convert, factors, scaled, scales
from influence_pipeline.cache.layout import SCALE
from influence_pipeline.cache.record import FileSum
from influence_pipeline.cache.tiles import Filling, Part, Region, Tiles
from influence_pipeline.location import Location
from stages.stage import Array, ArraySpec, Block
from stages.threads import Threads, one_core_threads

if TYPE_CHECKING:
    from influence_pipeline.cache.group import Group


class ArrayWriting:
    """What a block, or merging, has of one array, while it is written.

    Attributes:
        group: of which.
        spec: the array.
        region: what is filled of it.
        scale: the factors of the rows, (n, g), once they are all there; None where rows have none.
    """

    def __init__(self, group: Group, spec: ArraySpec, region: Region, pool: Threads | None) -> None:
        """Begin with the first row of a region; arrays of tiles need a pool of threads."""
        self.group, self.spec, self.region = group, spec, region
        self._kept = group.kept(spec.name)
        self._values: list[Array] = []
        self.scale: Array | None = None
        if spec.encoding in SCALED:
            rows = region[0].stop - region[0].start
            self.scale = np.empty((rows, factors(spec.shape[1], spec.encoding)), np.float32)
        self._filling: Filling | None = None
        if self._kept.shards:
            assert pool is not None
            self._filling = Filling(Tiles(group.path / spec.name, self._kept), region, self._encode, pool)

    def add(self, values: Array) -> None:
        """Take the next rows, which must not change any more.

        Raises:
            OSError: the disk refused.
        """
        values = np.asarray(values, dtype=self.spec.dtype)
        if self._filling is None:
            self._values.append(values)
        else:
            self._filling.add(values)

    def finish(self) -> None:
        """Have all rows encoded, and what is large written aside.

        Raises:
            OSError: the disk refused.
        """
        if self._filling is not None:
            self._filling.finish()

    def appear(self) -> dict[Location, FileSum]:
        """Put all into its place; return what is known of the files.

        Raises:
            OSError: the disk refused.
        """
        if self._filling is not None:
            return self._filling.appear()
        values = np.concatenate(self._values) if len(self._values) > 1 else self._values[0]
        if self.scale is not None:
            found = np.empty(values.shape, self._kept.dtype)
            convert(self._encode(values, 0)((slice(0, values.shape[1]),)), found)
            values = found
        return Chunks(self.group.path / self.spec.name, self._kept).write(self.region, values)

    def abandon(self) -> None:
        """Remove what is left aside, and let go of all values."""
        self._values.clear()
        if self._filling is not None:
            self._filling.abandon()
            self._filling = None

    def _encode(self, values: Array, first: int) -> Part:
        """Return what gives columns of some rows, scaled; note the factors of the rows."""
        if self.scale is None:
            return lambda columns: values[(slice(None), *columns)]
        encoding = self.spec.encoding
        scale = self.scale[first : first + len(values)] = scales(values, encoding)
        return lambda columns: scaled(values[:, columns[0]], scale, encoding, columns[0].start)


class BlockWriting:
    """A block while it is written, to be used in a ``with``. Before :meth:`Group.commit`, what was there stays."""

    def __init__(self, group: Group, block: Block) -> None:
        """Begin to write a block of a group; only under its claim.

        Raises:
            WorkError: the disk refused, or the group is gone.
        """
        self._group, self._block = group, block
        tiled = any(group.kept(spec.name).shards for spec in group.layout.stored)
        self._pool = one_core_threads() if tiled else None
        self._arrays = {spec.name: self._begin(spec) for spec in group.layout.arrays}
        try:
            group.tidy(block)
        except OSError as error:
            raise group.refused(f"block {block.index}", error) from error

    def _begin(self, spec: ArraySpec) -> ArrayWriting:
        return ArrayWriting(self._group, spec, spec.region(self._group.layout.grid, self._block), self._pool)

    def add(self, values: Mapping[str, Array]) -> None:
        """Take the next rows of some arrays, which must not change any more.

        Raises:
            WorkError: the disk refused, or the group is gone.
        """
        try:
            for name, part in values.items():
                self._arrays[name].add(part)
        except OSError as error:
            raise self._group.refused(f"block {self._block.index}", error) from error

    def finish(self) -> list[ArrayWriting]:
        """Have everything written aside that is large; return all arrays, for :meth:`ArrayWriting.appear`.

        Raises:
            OSError: the disk refused.
        """
        for spec in self._group.layout.arrays:
            self._arrays[spec.name].finish()
            factors_ng = self._arrays[spec.name].scale
            if factors_ng is not None:
                scale = self._arrays[SCALE] = self._begin(self._group.layout.scale(spec))
                scale.add(factors_ng)
                scale.finish()
        return list(self._arrays.values())

    def __enter__(self) -> BlockWriting:
        """Take it as it is."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove what is left aside."""
        for array in self._arrays.values():
            array.abandon()
