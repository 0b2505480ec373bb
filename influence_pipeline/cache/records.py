"""Records of all blocks of a group at once, as arrays, and summaries of them.

A summary holds the records of ``plan.SEGMENT`` blocks that follow one another, all of which were there with their
files, so that a million small files need not be read. Records stay what makes blocks exist: a summary is derived from
them by one process at a time, and whoever removes or replaces one of its records removes the summary before, under
the same claim (:func:`rewriting`). One that is damaged, or of another grid, does not count.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from influence_pipeline import plan
from influence_pipeline.cache import claims
from influence_pipeline.cache.layout import RECORDS
from influence_pipeline.cache.record import DIGEST_BYTES, Record, digest
from influence_pipeline.cache.store import files_at
from stages.stage import Array, Block, Blocks, Grid

if TYPE_CHECKING:
    from influence_pipeline.cache.group import Group

FOLDER, CLAIM = f"{RECORDS}/summary", f"{RECORDS}/summary.claim"
MAGIC = b"ips1"
_DIGEST = np.dtype("<u8"), (DIGEST_BYTES // 8,)
_ENTRY = np.dtype([
    ("rows", "<i8"),
    ("bytes", "<i8"),
    ("samples", *_DIGEST),
    ("inputs", *_DIGEST),
    ("content", *_DIGEST),
])
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Records:
    """The records of the blocks of a grid.

    Attributes:
        grid: the blocks.
        table: an entry for each block, in their order; ``rows`` is 0 where there is no record.
    """

    grid: Grid
    table: Array

    @property
    def there(self) -> Array:
        """Whether each block has a record, (n,)."""
        found: Array = self.table["rows"] > 0
        return found

    @property
    def file_bytes(self) -> int:
        """Of all files of these blocks."""
        return int(self.table["bytes"].sum())

    def within(self, grid: Grid) -> Records:
        """Return the records of a grid that is longer, or shorter, along some axes."""
        if grid.shape == self.grid.shape:
            return Records(grid, self.table)
        table = np.zeros(grid.shape, _ENTRY)
        both = tuple(slice(0, min(sizes)) for sizes in zip(grid.shape, self.grid.shape, strict=True))
        table[both] = self.table.reshape(self.grid.shape)[both]
        return Records(grid, table.reshape(-1))

    def same(self, name: str, value: bytes) -> Array:
        """Say of which blocks a digest is this one, (n,)."""
        found: Array = (self.table[name] == np.frombuffer(value, "<u8")).all(axis=1)
        return found

    def contents(self, first: int = 0, last: int | None = None) -> bytes:
        """Return a digest of what blocks hold, from the first up to the last; see :meth:`Group.contents`."""
        last = len(self.grid) if last is None else last
        part = self.table[first:last]
        beyond = last - first - len(part)
        if not beyond and (part["rows"] > 0).all():
            return digest([np.ascontiguousarray(part["content"])])
        found = (one["content"].tobytes() if one["rows"] > 0 else b"missing" for one in part)
        return digest([*found, *(b"missing" for _ in range(beyond))])


def read(group: Group, *, whole: bool) -> Records:
    """Return the records of all blocks of a group.

    Args:
        group: whose.
        whole: leave out blocks whose files have not the lengths of their records. Of those with a summary one is
            looked at, since all had them when it was written.
    """
    grid = group.layout.grid
    table = np.zeros(len(grid), _ENTRY)
    for start in range(0, len(grid), plan.SEGMENT):
        part = slice(start, min(start + plan.SEGMENT, len(grid)))
        found = _summary(group, start)
        if found is not None and whole:
            block = grid.at(start + random.randrange(plan.SEGMENT))
            if not group.rows_there(block):
                found = None
                with contextlib.suppress(OSError), rewriting(group, block):
                    pass
        table[part] = _one_by_one(group, grid, part, whole=whole) if found is None else found
    return Records(grid, table)


def _one_by_one(group: Group, grid: Grid, part: slice, *, whole: bool) -> Array:
    table = np.zeros(part.stop - part.start, _ENTRY)
    blocks = Blocks(grid, np.arange(part.start, part.stop))
    for number, record in enumerate(group.readable(blocks) if whole else group.each(blocks)):
        if record is not None:
            table[number] = _entry(record)
    return table


def _entry(record: Record) -> tuple[int, int, Array, Array, Array]:
    digests = (np.frombuffer(part, "<u8") for part in (record.samples, record.inputs, record.content))
    return (record.rows, sum(file.length for file in record.files), *digests)  # type: ignore[return-value]


# ---- summaries ---------------------------------------------------------------------------------------------------


def summarise(group: Group, start: int) -> None:
    """Write a summary of the blocks from a number on, where all of them are there and no other process writes one.

    Raises:
        OSError: the disk refused.
    """
    grid, files = group.layout.grid, files_at(group.path)
    name = _name(grid, start)
    if _summary(group, start) is not None or (claim := claims.take(group.path / CLAIM)) is None:
        return
    with claim:
        files.tidy(name)
        table = _one_by_one(group, grid, slice(start, start + plan.SEGMENT), whole=True)
        if (table["rows"] > 0).all() and claim.held():
            raw = MAGIC + table.tobytes()
            files.put(name, raw + _CHECKSUM.pack(google_crc32c.value(raw)))


@contextmanager
def rewriting(group: Group, block: Block) -> Iterator[None]:
    """Surround whatever removes or replaces the record of a block: no summary may say otherwise.

    Raises:
        OSError: the disk refused.
    """
    if len(group.layout.grid) < plan.SEGMENT:
        yield
        return
    with claims.exclusively(group.path / CLAIM):
        for name in files_at(group.path).names(FOLDER):
            # Whatever grid it is of: the group may have become longer since.
            if _has(name, block):
                files_at(group.path).remove(f"{FOLDER}/{name}")
        yield


def summarised(group: Group, block: Block) -> bool:
    """Say whether there is a summary of a block."""
    large = len(group.layout.grid) >= plan.SEGMENT
    return large and any(_has(name, block) for name in files_at(group.path).names(FOLDER))


def _name(grid: Grid, start: int) -> str:
    """Return the name of the summary of the blocks from ``start``: with the sizes that positions depend on."""
    return f"{FOLDER}/{'.'.join(map(str, (start, *grid.shape[1:])))}"


def _has(name: str, block: Block) -> bool:
    """Say whether a summary of this name has a block."""
    try:
        start, *sizes = map(int, name.split("."))
    except ValueError:
        return False
    number = 0
    for index, size in zip(block.index, (1, *sizes), strict=False):
        number = number * size + index
    return start <= number < start + plan.SEGMENT


def _summary(group: Group, start: int) -> Array | None:
    """Return the records of a segment by its summary, None where there is none, or it is damaged."""
    if start + plan.SEGMENT > len(group.layout.grid):
        return None
    try:
        raw = files_at(group.path).read(_name(group.layout.grid, start))
    except OSError:
        return None
    body, checksum = raw[: -_CHECKSUM.size], raw[-_CHECKSUM.size :]
    if len(body) != len(MAGIC) + plan.SEGMENT * _ENTRY.itemsize or not body.startswith(MAGIC):
        return None
    if checksum != _CHECKSUM.pack(google_crc32c.value(body)):
        return None
    found: Array = np.frombuffer(body, _ENTRY, offset=len(MAGIC))
    return found


def discard_wrong(group: Group) -> list[str]:
    """Remove summaries that are damaged, or say something else than records do; say which.

    Raises:
        OSError: the disk refused.
    """
    found, grid = [], group.layout.grid
    for start in range(0, len(grid) - plan.SEGMENT + 1, plan.SEGMENT):
        if not files_at(group.path).exists(_name(grid, start)):
            continue
        with claims.exclusively(group.path / CLAIM):
            table = _one_by_one(group, grid, slice(start, start + plan.SEGMENT), whole=False)
            said = _summary(group, start)
            if said is None or not np.array_equal(said, table):
                files_at(group.path).remove(_name(grid, start))
                found.append(f"{group.path / _name(grid, start)} is damaged")
    return found
