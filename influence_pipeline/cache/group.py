"""One stage's arrays in the cache: laid out once, filled block by block, read back.

Of several processes that fill a group, each claims the block that it computes. ``zarr.json`` files are written at
creation, at growth and to mend them, always by one process at a time (see :meth:`Cache.alone`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import zarr
import zarr.storage

from influence_pipeline import plan
from influence_pipeline.cache import claims, records
from influence_pipeline.cache.chunks import Chunks
from influence_pipeline.cache.claims import Claim
from influence_pipeline.cache.layout import (
    DESCRIPTION,
    FINISHED,
    GROUP,
    RECORDS,
    SCALE,
    Kept,
    Layout,
    described_layout,
    description,
    seal,
    sealed,
    write_description,
)
from influence_pipeline.cache.objects import opened
from influence_pipeline.cache.record import NOTHING, FileSum, Record, digest
from influence_pipeline.cache.records import Records
from influence_pipeline.cache.store import Found, files_at
from influence_pipeline.cache.stored import DecodedRows, StoredArray
from influence_pipeline.cache.tiles import CHECKSUM_BYTES, Region
from influence_pipeline.cache.writing import ArrayWriting, BlockWriting
from influence_pipeline.errors import CacheDamaged, WorkError
from influence_pipeline.location import Location, ObjectPath
from stages.stage import Array, ArrayLike, ArraySpec, Block, Blocks
from stages.threads import one_core_threads

log = logging.getLogger(__name__)


class Group:
    """A stage's arrays on disk.

    Attributes:
        path: its folder.
        attributes: what it says of itself.
    """

    def __init__(self, path: Location) -> None:
        """Open the group at this folder.

        Raises:
            CacheDamaged: its description cannot be read, or is not as it was written.
        """
        self.path, self._files = path, files_at(path)
        self.attributes: dict[str, Any] = sealed(path / DESCRIPTION)["attributes"]
        if not _describes(self.attributes):
            raise CacheDamaged(f"{path / DESCRIPTION} does not describe arrays of a cache; remove {path} and run again")
        self._kept: dict[str, Kept] = {}
        self._layout: Layout | None = None

    @classmethod
    def create(cls, path: Location, layout: Layout, attributes: Mapping[str, Any]) -> Group:
        """Lay out a new group, so that it appears at once and whole; one that is there already is opened.

        Raises:
            OSError: the folder cannot be written.
        """
        files = files_at(path)
        if not files.exists(DESCRIPTION):
            with files.laying_out(DESCRIPTION) as new:
                *arrays, own = _descriptions(layout, attributes).items()
                for _ in new.together([partial(write_description, new, *described) for described in arrays]):
                    pass
                write_description(new, *own)
        return cls(path)

    @property
    def layout(self) -> Layout:
        """Its shape as the descriptions of its arrays have it.

        Raises:
            CacheDamaged: one of them cannot be read, or is none of ours.
        """
        if self._layout is None:
            names = self.attributes["arrays"]
            known = self._files.read_all([f"{name}/{DESCRIPTION}" for name in names])
            found = {name: sealed(self.path / name / DESCRIPTION, raw) for name, raw in zip(names, known, strict=True)}
            try:
                self._layout = described_layout(self.attributes["bands"], found)
            except (KeyError, TypeError, ValueError) as error:
                raise CacheDamaged(
                    f"{self.path}: its arrays are not those of a cache ({type(error).__name__}: {error}); "
                    "remove it and run again"
                ) from error
        return self._layout

    # ---- reading -------------------------------------------------------------------------------------------------

    def kept(self, name: str) -> Kept:
        """Return how the array of this name is kept.

        Raises:
            CacheDamaged: its description cannot be read, or is not as it was written, or of no array of a cache.
        """
        if name not in self._kept:
            path = self.path / name / DESCRIPTION
            try:
                self._kept[name] = Kept.described(sealed(path))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise CacheDamaged(
                    f"{path} is of no array of a cache ({error}); remove {self.path} and run again"
                ) from error
        return self._kept[name]

    def zarr_array(self, name: str) -> Any:
        """Return the zarr array of this name, to be given to users.

        Raises:
            CacheDamaged: its description cannot be read, or is not as it was written.
        """
        self.kept(name)
        try:
            if isinstance(self.path, ObjectPath):
                store = zarr.storage.ObjectStore(opened(self.path.root))
                found = zarr.open_array(store, path=f"{self.path.key}/{name}", mode="r+")
            else:
                found = zarr.open_array(self.path / name, mode="r+")
            return found.with_config({"write_empty_chunks": True})
        except Exception as error:
            raise CacheDamaged(f"{self.path}/{name}/{DESCRIPTION} cannot be read ({error}); a run mends it") from error

    def array(self, name: str) -> StoredArray:
        """Return an array to be read."""
        return StoredArray(self.kept(name), self.path / name, lambda index: self._suspect(name, index))

    def __contains__(self, name: str) -> bool:
        """Say whether the group has an array of this name."""
        return self._files.exists(f"{name}/{DESCRIPTION}")

    def rows(self, name: str) -> ArrayLike:
        """Return an array whose slices are decoded to float32."""
        array = self.array(name)
        return DecodedRows(array, self.array(SCALE) if array.dtype in (np.float16, np.int8) else None)

    def progress(self) -> tuple[int, int]:
        """Return how many blocks have a record, and how many there are."""
        return int(self.records().there.sum()), len(self.layout.grid)

    def records(self, *, whole: bool = False) -> Records:
        """Return the records of all blocks; with ``whole``, of those whose files have their lengths."""
        return records.read(self, whole=whole)

    def summarise(self, missing: Blocks) -> None:
        """Have the records of many blocks be read faster from now on, where none of those around is missing."""
        whole = len(self.layout.grid) // plan.SEGMENT
        left = np.bincount(missing.numbers // plan.SEGMENT, minlength=whole)[:whole]
        for segment in np.flatnonzero(left == 0).tolist():
            self._summarise(segment)

    def _summarise(self, segment: int) -> None:
        with contextlib.suppress(OSError):
            records.summarise(self, segment * plan.SEGMENT)

    def record(self, block: Block) -> Record | None:
        """Return the record of a block, None where it has none."""
        return self._record(block)

    def each(self, blocks: Iterable[Block]) -> Iterator[Record | None]:
        """Yield the records of blocks, None for each that has none."""
        if not self._files.far:
            return map(self.record, blocks)
        names = [_record_name(block) for block in blocks]
        return (None if raw is None else Record.from_chunk(raw) for raw in self._files.read_all(names))

    def _record(self, block: Block | None) -> Record | None:
        """Read a record's chunk as it is on disk, many times faster than through zarr."""
        try:
            return Record.from_chunk(self._files.read(_record_name(block)))
        except OSError:
            return None

    def whole(self, block: Block) -> Record | None:
        """Return the record of a block that is there: of this extent, with files of its lengths; None for another."""
        record = self.record(block)
        return record if record is not None and record.rows == block.rows and self.has(block, record) else None

    def readable(self, blocks: Iterable[Block]) -> Iterator[Record | None]:
        """Yield the records of blocks whose files have their lengths, of whatever extent; None for each other."""
        if not self._files.far:
            for block in blocks:
                record = self.record(block)
                yield record if record is not None and self.has(block, record) else None
            return
        blocks = list(blocks)
        names = [self.layout.block_files(block) for block in blocks]
        lengths = iter(self._files.lengths([name for each in names for name in each]))
        for record, each in zip(self.each(blocks), names, strict=True):
            found = list(itertools.islice(lengths, len(each)))
            yield record if record is not None and found == [file.length for file in record.files] else None

    def rows_there(self, block: Block) -> int:
        """Return how many entries of a block can be read: fewer than it covers where the axis got longer since."""
        record = self.record(block)
        return record.rows if record is not None and self.has(block, record) else 0

    def has(self, block: Block, record: Record) -> bool:
        """Say whether the files of a block have the lengths that its record says."""
        lengths = self._files.lengths(self.layout.block_files(block))
        return lengths == [file.length for file in record.files]

    def merged(self) -> Record | None:
        """Return the record of what was merged, None where it is not there or not of the blocks as they are now."""
        if not self.layout.merged:
            return None
        record = self._record(None)
        same = record is not None and record.inputs == self.records().contents() and record.samples == self._lengths()
        return record if same else None

    @property
    def finished(self) -> bool:
        """Whether merging was done, of the blocks as they are now; true where there is nothing to merge."""
        return not self.layout.merged or self.merged() is not None

    def contents(self, blocks: Iterable[Block], record: Callable[[Block], Record | None] | None = None) -> bytes:
        """Return a digest of what some blocks hold, by their records.

        Args:
            blocks: which.
            record: gives the record of a block, None where it does not count as there; by default whatever is kept.
        """
        found = self.each(blocks) if record is None else map(record, blocks)
        return digest(there.content if there else b"missing" for there in found)

    def size(self) -> tuple[int, int, float]:
        """Return the bytes of all files, how many these are, and when something was last written.

        Times are in seconds since the epoch. Of very many blocks, files are not looked at one by one: it is what their
        records say, and when the last of them and their summaries were written.
        """
        if len(self.layout.grid) < plan.SEGMENT:
            found = list(self.files())
            times = [file.written for file in found]
            return sum(file.length for file in found), len(found), max(times, default=0.0)
        merged, known = [spec.name for spec in self.layout.merged], self.records()
        folders = [*merged, FINISHED, records.FOLDER] if merged else [records.FOLDER]
        found = [file for folder in folders for file in self._files.walk(folder)]
        times = [file.written for file in found]
        names = [DESCRIPTION, *(f"{spec.name}/{DESCRIPTION}" for spec in (*self.layout.stored, self.layout.records))]
        there, each = np.flatnonzero(known.there), self.layout.files_each
        if len(there):
            last = _record_name(self.layout.grid.at(int(there[-1])))
            times += [file.written for file in self._files.walk(last.rpartition("/")[0])]
        size = known.file_bytes + len(there) * (Record.size(each) + CHECKSUM_BYTES)
        size += sum(file.length for file in found) + sum(map(self._files.length, names))
        return size, len(there) * (each + 1) + len(found) + len(names), max(times, default=0.0)

    def bytes_on_disk(self) -> int:
        """Return the bytes of all files."""
        return self.size()[0]

    def files(self) -> Iterator[Found]:
        """Yield all of its files."""
        return self._files.walk()

    # ---- damage --------------------------------------------------------------------------------------------------

    def damage(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, str]]:
        """Yield every block whose files are not as they were written, with what is wrong; reads all of their bytes."""
        for block in blocks:
            record = self.record(block)
            if record is None:
                # It may be written just now, so that it is looked at once more where it is there.
                if self._files.exists(_record_name(block)) and self.record(block) is None:
                    yield block, f"{self.path / _record_name(block)} is damaged"
                continue
            names = self.layout.block_files(block)
            for name, file in itertools.zip_longest(names, record.files, fillvalue=None):
                found = self._sum(name) if name else None
                if found != file:
                    yield block, f"{self.path / (name or '')} {_what(found, file)}"
                    break

    def damage_of_merged(self) -> str | None:
        """Say what is wrong with what was merged, None where it is as it was written, not there, or of the past."""
        record = self._record(None) if self.layout.merged else None
        if record is None:
            there = self.layout.merged and self._files.exists(_record_name(None))
            return f"{self.path / _record_name(None)} is damaged" if there else None
        if record.inputs != self.records().contents() or record.content == self._merged_content(record.inputs):
            return None
        return f"{self.path}: one of {', '.join(spec.name for spec in self.layout.merged)} is damaged"

    def discard(self, block: Block | None) -> None:
        """Remove the record of a block, or of what was merged where it is None, so that it is made anew.

        Raises:
            OSError: the disk refused.
        """
        name = _record_name(block)
        if block is None:
            self._files.remove(name)
        elif self._files.exists(name) or records.summarised(self, block):
            with records.rewriting(self, block):
                self._files.remove(name)

    def _suspect(self, name: str, index: Any) -> str | None:
        """Look at the files of a part that could not be read; discard what is damaged, and say what that was."""
        self._layout = None
        blocks = self.layout.blocks_of(name, index if isinstance(index, tuple) else (index,))
        found: list[tuple[Block | None, str]] = [*self.damage(blocks)]
        if not blocks and self.damage_of_merged():
            found.append((None, f"{self.path / name} is damaged"))
        for block, _ in found:
            # A cache that cannot be written to stays as it is.
            with contextlib.suppress(OSError):
                self.discard(block)
        if found:
            block, what = found[0]
            return f"{what}{'' if block is None else f' (block {block.index})'}"
        lost = [block for block in blocks if self.record(block) is None]
        for block in lost:
            with contextlib.suppress(OSError):
                self.discard(block)
        return f"block {lost[0].index} of {self.path} is not there" if lost else None

    # ---- writing -------------------------------------------------------------------------------------------------

    def claim(self, block: Block, token: str | None = None) -> Claim | None:
        """Claim a block; None where another process is at work on it.

        Args:
            block: which.
            token: tells this claim from others; by default nobody else knows it.

        Raises:
            WorkError: the disk refused, or the group is gone.
        """
        try:
            return claims.take(self.path / _claim_name(block), token)
        except OSError as error:
            raise self.refused(f"block {block.index}", error) from error

    def claim_named(self, block: Block, token: str) -> Claim:
        """Return a claim that another process may take."""
        return Claim(self.path / _claim_name(block), token)

    def claimed(self, block: Block) -> str | None:
        """Say who is at work on a block, None where nobody is."""
        return claims.taken(self.path / _claim_name(block))

    def at_work(self) -> str | None:
        """Say who is at work on any block, None where nobody is."""
        names = (name for name in self._files.names(RECORDS) if name.endswith(".claim"))
        found = (claims.taken(self.path / RECORDS / name) for name in names)
        return next((who for who in found if who), None)

    @contextmanager
    def alone_merging(self) -> Iterator[None]:
        """Be the only process that merges.

        Raises:
            WorkError: the disk refused, or the group is gone.
        """
        try:
            with claims.exclusively(self.path / _claim_name(None)):
                yield
        except OSError as error:
            raise self.refused("what is merged of its blocks", error) from error

    def commit(
        self,
        block: Block,
        writing: BlockWriting,
        samples: bytes = NOTHING,
        inputs: bytes = NOTHING,
        claim: Claim | None = None,
    ) -> bool:
        """Put what a block computed into its place, its record last.

        Args:
            block: which.
            writing: that has all of its values.
            samples: digest of its samples.
            inputs: digest of whatever else it read.
            claim: under which it was computed.

        Returns:
            Whether it was kept; it is not where another process took the block over meanwhile.

        Raises:
            WorkError: the disk refused, or the group is gone; the block does not exist then.
        """
        try:
            arrays = writing.finish()
            if self._taken_over(block, claim):
                return False
            self.discard(block)
            names = self.layout.block_files(block)
            known: dict[Location, FileSum] = {}
            self._remove(names)
            for array in arrays:  # in order: the factors of rows are known once these appear
                known |= array.appear()
            files = [known.get(self.path / name) or self._sum(name) for name in names]
            record = Record.new(block.rows, samples, inputs, files)
            while (taken := self._taken_over(block, claim)) or not self._write_record(block, record, once=True):
                if taken or self._taken_over(block, claim):
                    self._withdraw(block)
                    return False
                self.discard(block)
            segment, place = divmod(self.layout.grid.number(block), plan.SEGMENT)
            if segment and place == plan.SEGMENT // 2:  # whoever computes blocks is done with those before by now
                self._summarise(segment - 1)
        except OSError as error:
            with contextlib.suppress(OSError):
                if self._taken_over(block, claim):
                    # Whoever took it over removed what was half written here.
                    return False
            raise self.refused(f"block {block.index}", error) from error
        return True

    def _taken_over(self, block: Block, claim: Claim | None) -> bool:
        """Say whether another process has a block that was claimed here.

        Raises:
            FileNotFoundError: the group is gone, and with it all claims.
        """
        if not self._files.exists(DESCRIPTION):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path / DESCRIPTION))
        if claim is None or claim.held():
            return False
        log.warning("%s: block %s was taken over by another process", self.path, block.index)
        return True

    def _withdraw(self, block: Block) -> None:
        """Have a block be whole or not there that another process has, where files were written to it here meanwhile.

        Raises:
            OSError: the disk refused.
        """
        if not self._files.far:
            return
        if self.record(block) is None:  # what the other has written by now does not count as whole then
            self._files.remove(*self.layout.block_files(block))
        for damaged, _ in self.damage([block]):
            self.discard(damaged)

    def adopt(self, block: Block | None, name: str, values: Array, samples: bytes) -> None:
        """Have what was computed stand for other samples; later stages see no change.

        Args:
            block: which; None for what was merged.
            name: the array that keeps digests of samples.
            values: all of that array.
            samples: digest of the samples of the block.

        Raises:
            WorkError: the disk refused.
        """
        try:
            if block is None:
                self._write(next(spec for spec in self.layout.merged if spec.name == name), values)
                self._record_merged()
                return
            record = self.record(block)
            assert record is not None
            spec = next((spec for spec in self.layout.stored if spec.name == name), None)
            if spec is not None:
                region = spec.region(self.layout.grid, block)
                self._write(spec, values[region], region)
            files = tuple(self._sum(file) for file in self.layout.block_files(block))
            adopted = Record(record.rows, samples, record.inputs, record.content, files)
            with records.rewriting(self, block):
                self._write_record(block, adopted)
        except OSError as error:
            raise self.refused("digests", error) from error

    def commit_merged(self, values: Mapping[str, Array]) -> None:
        """Write what was merged, its record last.

        Raises:
            WorkError: the disk refused.
        """
        try:
            self.tidy(None)
            self.discard(None)
            self._remove(self.layout.merged_files())
            for spec in self.layout.merged:
                self._write(spec, values[spec.name])
            self._record_merged()
        except OSError as error:
            raise self.refused("what is merged of its blocks", error) from error

    def _write(self, spec: ArraySpec, values: Array, region: Region | None = None) -> None:
        """Write all of an array, or a region of whole files.

        Raises:
            OSError: the disk refused.
        """
        region = tuple(slice(0, n) for n in spec.shape) if region is None else region
        writing = ArrayWriting(self, spec, region, one_core_threads())
        try:
            writing.add(values)
            writing.finish()
            writing.appear()
        finally:
            writing.abandon()

    def _record_merged(self) -> None:
        inputs = self.records().contents()
        record = Record(len(self.layout.grid), self._lengths(), inputs, self._merged_content(inputs), ())
        self._write_record(None, record)

    def _write_record(self, block: Block | None, record: Record, *, once: bool = False) -> bool:
        """Write the record of a block, or of what was merged.

        Args:
            block: which; None for what was merged.
            record: of it.
            once: not where another holder of the claim has done so since it was discarded.

        Returns:
            Whether it is there.

        Raises:
            OSError: the disk refused.
        """
        of_block = () if block is None else tuple(slice(i, i + 1) for i in block.index)
        region, values = (*of_block, slice(0, Record.size(len(record.files)))), record.to_bytes()
        name = FINISHED if block is None else RECORDS
        chunks, values = Chunks(self.path / name, self.kept(name)), values.reshape(*(1 for _ in of_block), -1)
        return chunks.write_once(region, values) if once else bool(chunks.write(region, values))

    def _merged_content(self, inputs: bytes) -> bytes:
        """Return a digest of what merged files hold, of one size however many files growth makes of them."""
        sums = self._files.together([partial(self._sum, name) for name in self.layout.merged_files()])
        return digest([inputs, *(f"{s.length} {s.checksum};".encode() for s in sums)])

    def _remove(self, names: Sequence[str]) -> None:
        """Remove files that no record is of any more; objects are put in the place of those that are there."""
        if not self._files.far:
            self._files.remove(*names)

    def tidy(self, block: Block | None) -> None:
        """Remove what a killed process left half written of a block, or of what is merged; only under its claim."""
        names = self.layout.merged_files() if block is None else self.layout.block_files(block)
        for name in (*names, _record_name(block), _claim_name(block)):
            self._files.tidy(name)

    def clear(self) -> None:
        """Remove what killed processes left, where that can be done."""
        endings = {".claim": 1, ".partial": 2}
        left = ((name, end) for name in self._files.names(RECORDS) for end in endings if name.endswith(end))
        for stem in sorted({name.rsplit(".", endings[end])[0] for name, end in left}):
            with contextlib.suppress(OSError, ValueError):
                claim = claims.take(self.path / RECORDS / f"{stem}.claim")
                if claim is not None:
                    with claim:
                        index = None if stem == "finished" else tuple(int(part) for part in stem.split("."))
                        self.tidy(None if index is None else self.layout.grid.block(index))

    def refused(self, what: str, error: OSError) -> WorkError:
        """Make the error for what the disk refused."""
        return WorkError(f"{self.path}: {what} could not be written: {error}. Finished blocks are kept")

    def _lengths(self) -> bytes:
        """Return a digest of the lengths of the files of what is merged."""
        lengths = self._files.lengths(self.layout.merged_files())
        return digest(length.to_bytes(8, "little") for length in lengths)

    def _sum(self, name: str) -> FileSum:
        """Return what a file is now; length 0 where there is none."""
        found = FileSum()
        with contextlib.suppress(FileNotFoundError):
            for part in self._files.stream(name):
                found = found.then(part)
        return found

    # ---- layout --------------------------------------------------------------------------------------------------

    def fits(self, layout: Layout) -> bool:
        """Say whether the group can hold a layout: axes of the grid may be longer, or shorter by what is not there."""
        found = {spec.name: spec.shape for spec in self.layout.all}
        if found.keys() != {spec.name for spec in layout.all}:
            return False
        shorter = {}
        for spec in layout.all:
            for dim, wanted, there in zip(spec.dims, spec.shape, found[spec.name], strict=True):
                axis = layout.grid.axes[0] if dim == "block" else layout.grid.axis(dim.removesuffix("_block"))
                if wanted != there and axis is None:
                    return False
                if wanted < there and axis is not None:
                    shorter[axis.name] = axis.length
        return not shorter or all(length >= self._held(axis) for axis, length in shorter.items())

    def _held(self, axis: str) -> int:
        """Return how many entries along an axis have been computed: a run that failed may have made room for more."""
        grid, found = self.layout.grid, self.records()
        there = np.flatnonzero(found.there)
        if not len(there):
            return 0
        position = [one.name for one in grid.axes].index(axis)
        bands = np.unravel_index(there, grid.shape)[position]
        entries = found.table["rows"][there] * grid.axes[position].bands[bands] // grid.rows[there]
        return int((bands * grid.axes[position].band + entries).max())

    def resize(self, layout: Layout) -> None:
        """Make the arrays as long as a layout that fits wants them; only alone.

        Raises:
            WorkError: another process made them longer than that meanwhile.
            OSError: the disk refused.
        """
        self._layout = None
        self._kept.clear()
        if not self.fits(layout):
            raise WorkError(f"{self.path} was made longer by another process: run again")
        for spec in layout.all:
            if self.kept(spec.name).shape != spec.shape:
                seal(self.path / spec.name / DESCRIPTION, shape=list(spec.shape))
        self._layout = None
        self._kept.clear()

    @classmethod
    def mend(cls, path: Location, layout: Layout, attributes: Mapping[str, Any]) -> None:
        """Write those descriptions anew that are damaged; only alone.

        A description follows from the identity and the layout, so that nothing else is lost with it.

        Raises:
            OSError: the disk refused.
        """
        for name, described in _descriptions(layout, attributes).items():
            if not _is_sealed(path / name):
                log.info("%s is mended", path / name)  # whoever found it damaged said so
                write_description(files_at(path), name, described)


def _describes(attributes: Mapping[str, Any]) -> bool:
    """Say whether a group's attributes have what all of ours have; whoever forged a checksum may have left it out."""
    bands, arrays, reads = (attributes.get(name) for name in ("bands", "arrays", "reads"))
    return (
        isinstance(attributes.get("identity"), dict)
        and isinstance(attributes.get("tests"), (str, type(None)))
        and isinstance(bands, dict)
        and all(isinstance(band, int) and band > 0 for band in bands.values())
        and isinstance(arrays, list)
        and all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in arrays)
        and isinstance(reads, dict)
        and all(isinstance(name, str) for name in reads.values())
    )


def _descriptions(layout: Layout, attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all descriptions of a group by their names, its own last."""
    found = {f"{spec.name}/{DESCRIPTION}": description(layout, spec) for spec in layout.all}
    return {**found, DESCRIPTION: {**GROUP, "attributes": {**attributes, **layout.attributes}}}


def _is_sealed(path: Location) -> bool:
    try:
        sealed(path)
    except CacheDamaged:
        return False
    return True


def _record_name(block: Block | None) -> str:
    """Return the name of the file of a block's record, or of that of what was merged, relative to the group."""
    return f"{FINISHED}/c/0" if block is None else f"{RECORDS}/c/{'/'.join(map(str, block.index))}/0"


def _claim_name(block: Block | None) -> str:
    """Return the name of the file by which a block is claimed, or merging, relative to the group."""
    return f"{RECORDS}/{'finished' if block is None else '.'.join(map(str, block.index))}.claim"


def _what(found: FileSum | None, file: FileSum | None) -> str:
    if found is None or file is None:
        return "has a record of other files"
    if not found.length:
        return "is missing or empty"
    if found.length != file.length:
        return f"has {found.length} bytes, and was written with {file.length}"
    return "has other bytes than were written"
