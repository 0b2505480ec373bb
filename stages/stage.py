"""What the machine needs to know of a stage, and what a stage may ask of the machine.

A stage cuts its work into the cells of a :class:`Grid`. For every cell (:class:`Block`) it returns the
values of its output arrays (:class:`ArraySpec`); when all cells are there, it may merge them. The machine
that runs stages keeps, resumes, distributes and times blocks without knowing what is computed.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Batch = Any
"""Whatever a data set's samples collate to: tensors with the batch first, in tuples, lists or dicts."""


class StageError(Exception):
    """The mathematics cannot go on as asked; the message says what would work."""


@dataclass(frozen=True)
class Progress:
    """One sign of life from inside a block.

    Attributes:
        done: units finished so far in this block.
        total: units in this block, 0 where unknown.
        note: what is being done, for people.
    """

    done: int = 0
    total: int = 0
    note: str = ""


Report = Callable[[Progress], None]
"""Carries progress out; may raise to carry a cancellation in."""


def silent(progress: Progress) -> None:
    """Report to nobody."""


class Samples(Protocol):
    """A data set as stages see it: batches by ids, again as often as they like."""

    def __len__(self) -> int:
        """Count the samples."""

    def batch(self, ids: Sequence[int]) -> Batch:
        """Collate the samples at these positions, on the device of the model."""

    def batches(self, ids: Sequence[int], size: int) -> Generator[Batch, None, None]:
        """Yield the samples at these positions in order, ``size`` at a time."""

    def stream(self, parts: Iterable[Sequence[int]]) -> Generator[Batch, None, None]:
        """Yield a batch for each of these parts, which need not end; close it before going on to other reads."""


class ArrayLike(Protocol):
    """A matrix that can be sliced: NumPy, Zarr, or rows computed as they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each dimension."""

    def __getitem__(self, index: Any) -> Array:
        """Read a rectangular part of it."""


class Positions:
    """Ids that are positions, as an array of which nothing is in memory."""

    def __init__(self, count: int) -> None:
        """Count from 0 to ``count`` - 1."""
        self.shape: tuple[int, ...] = (count,)

    def __len__(self) -> int:
        """Count them."""
        return self.shape[0]

    def __getitem__(self, part: slice) -> Array:
        """Return some of them, int64."""
        return np.arange(*part.indices(len(self)), dtype=np.int64)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return all of them, int64."""
        return self[:].astype(dtype or np.int64, copy=False)


Ids = Array | Positions
"""What samples are named by, (n,) int64."""


@runtime_checkable
class FactoredRows(ArrayLike, Protocol):
    """A matrix whose rows are read faster without a factor that each of them has."""

    @property
    def factors(self) -> ArrayLike | None:
        """What rows are to be multiplied by after :meth:`read_into`, (n, 1); None where there is no such factor."""

    def read_into(self, index: tuple[slice, slice], out: Array) -> None:
        """Read a rectangular part, but for the factors of its rows where these have some."""


@runtime_checkable
class FetchedRows(ArrayLike, Protocol):
    """A matrix of which parts may be fetched before they are asked for."""

    def ahead(
        self, items: Sequence[Sequence[tuple[slice, slice]]], at_once: int, most_bytes: int
    ) -> AbstractContextManager[ArrayLike]:
        """Have parts fetched while others are used.

        Args:
            items: the parts that a thread will ask for in turn, for each piece of its work.
            at_once: threads, each of which takes the next item.
            most_bytes: that are fetched and not yet asked for.

        Returns:
            What gives a matrix of the same kind, from which they are read.
        """


def ahead(
    rows: ArrayLike, items: Sequence[Sequence[tuple[slice, slice]]], at_once: int, most_bytes: int
) -> AbstractContextManager[ArrayLike]:
    """Have parts fetched before they are asked for, see :class:`FetchedRows`, of a matrix where that helps."""
    return rows.ahead(items, at_once, most_bytes) if isinstance(rows, FetchedRows) else nullcontext(rows)


@dataclass(frozen=True)
class Axis:
    """One direction of a grid: ``length`` entries cut into bands of ``band`` (the last may be shorter)."""

    name: str
    length: int
    band: int

    @property
    def count(self) -> int:
        """The number of bands."""
        return math.ceil(self.length / self.band)

    @property
    def bands(self) -> Array:
        """The number of entries of each band, (n,) int64."""
        found = np.full(self.count, self.band, np.int64)
        found[-1:] = self.length - (self.count - 1) * self.band
        return found

    def bounds(self, index: int) -> slice:
        """Return the entries of band ``index``."""
        return slice(index * self.band, min((index + 1) * self.band, self.length))


@dataclass(frozen=True)
class Block:
    """One cell of a grid: its position, and the entries that it covers of each axis."""

    index: tuple[int, ...]
    bounds: Mapping[str, slice]

    def ids(self, axis: str) -> range:
        """Return the positions along one axis."""
        return range(self.bounds[axis].start, self.bounds[axis].stop)

    @property
    def rows(self) -> int:
        """The number of entries, over all axes."""
        return math.prod(b.stop - b.start for b in self.bounds.values())


@dataclass(frozen=True)
class Grid:
    """The blocks of a stage: every entry of the product of the axes is in exactly one block."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of bands along each axis."""
        return tuple(axis.count for axis in self.axes)

    def __len__(self) -> int:
        """Count the blocks."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """The number of entries of all blocks."""
        return math.prod(axis.length for axis in self.axes)

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks in row-major order."""
        for index in itertools.product(*(range(n) for n in self.shape)):
            yield self.block(index)

    def block(self, index: tuple[int, ...]) -> Block:
        """Return the block at this position."""
        return Block(index, {axis.name: axis.bounds(i) for axis, i in zip(self.axes, index, strict=True)})

    def number(self, block: Block) -> int:
        """Return how many blocks come before this one in row-major order."""
        return functools.reduce(lambda before, at: before * at[0] + at[1], zip(self.shape, block.index, strict=True), 0)

    def at(self, number: int) -> Block:
        """Return the block of this number, in row-major order."""
        return self.block(tuple(map(int, np.unravel_index(number, self.shape))))

    @property
    def rows(self) -> Array:
        """The number of entries of each block, (n,) int64."""
        found = np.ones((), np.int64)
        for axis in self.axes:
            found = found[..., np.newaxis] * axis.bands
        return found.reshape(-1)

    def axis(self, name: str) -> Axis | None:
        """Return the axis of this name, if the grid has one."""
        return next((axis for axis in self.axes if axis.name == name), None)


class Blocks(Sequence[Block]):
    """Some blocks of a grid, of which only the numbers are in memory.

    Attributes:
        grid: their grid.
        numbers: which, (n,), in row-major order of the grid.
    """

    def __init__(self, grid: Grid, numbers: Array) -> None:
        """Take the blocks of these numbers."""
        self.grid, self.numbers = grid, numbers

    def __len__(self) -> int:
        """Count them."""
        return len(self.numbers)

    @overload
    def __getitem__(self, part: int) -> Block: ...
    @overload
    def __getitem__(self, part: slice) -> Blocks: ...
    def __getitem__(self, part: int | slice) -> Block | Blocks:
        """Return one, or some of them."""
        if isinstance(part, slice):
            return Blocks(self.grid, self.numbers[part])
        return self.grid.at(int(self.numbers[part]))

    @property
    def rows(self) -> int:
        """The number of entries of all of them."""
        return int(self.grid.rows[self.numbers].sum())


@dataclass(frozen=True)
class ArraySpec:
    """One output array.

    Attributes:
        name: its name in the stage's group.
        dims: a name for each dimension. A dimension named as a grid axis is cut where the grid is;
            ``<axis>_block`` has one entry for each band of that axis; any other is whole in every block.
        shape: the length of each dimension.
        dtype: NumPy dtype of the values that the stage returns.
        encoding: how values are kept where that is not as they are ("float16"; see the store).
        about: one sentence for people who open the array with other tools.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    encoding: str = ""
    about: str = ""

    def region(self, grid: Grid, block: Block) -> tuple[slice, ...]:
        """Return the part of this array that one block fills."""
        parts = []
        for dim, length in zip(self.dims, self.shape, strict=True):
            if dim in block.bounds:
                parts.append(block.bounds[dim])
            elif dim.endswith("_block") and grid.axis(dim.removesuffix("_block")):
                position = [axis.name for axis in grid.axes].index(dim.removesuffix("_block"))
                parts.append(slice(block.index[position], block.index[position] + 1))
            else:
                parts.append(slice(0, length))
        return tuple(parts)


@dataclass
class Stage(ABC):
    """A piece of mathematics that the machine can run block by block.

    Attributes:
        name: the stage's name.
        grid: its blocks.
        arrays: what every block fills.
        merged: what :meth:`finish` fills, once all blocks are there.
    """

    name: str = field(init=False)
    grid: Grid = field(init=False)
    arrays: tuple[ArraySpec, ...] = field(init=False, default=())
    merged: tuple[ArraySpec, ...] = field(init=False, default=())

    def prepare(self, report: Report = silent) -> None:  # noqa: B027 - most stages have nothing to prepare
        """Check, in the process that computes, what must hold before the first block.

        Raises:
            StageError: the model or the data cannot be used as asked.
        """

    @abstractmethod
    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Return the values of every array in ``arrays`` over the block's region."""

    def parts(self, block: Block, report: Report = silent) -> Iterator[dict[str, Array]]:
        """Yield the same values part by part, each with the next rows of every array; all at once if not overridden.

        What is yielded must not change any more: it is written while the next part is computed.
        """
        yield self.compute(block, report)

    def alongside(self, block: Block, other: Stage) -> list[Block]:
        """Return the blocks of another stage that cost little when they are computed together with one of this."""
        return []

    def together(self, parts: Sequence[tuple[Stage, Block]], report: Report = silent) -> list[dict[str, Array]]:
        """Compute blocks of several stages at once, in the bits that each stage gives by itself."""
        return [stage.compute(block, report) for stage, block in parts]

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Return the values of every array in ``merged``, given what all blocks filled."""
        return {}
