"""Work: a stage with what the machine adds to it, so that its blocks can be computed, kept and checked.

Where they are computed, by whom and in which order, is the runner's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from influence_pipeline.cache import Group, Layout
from influence_pipeline.cache.claims import Claim
from influence_pipeline.cache.record import NOTHING, Record, digest
from influence_pipeline.cache.writing import BlockWriting
from influence_pipeline.errors import MissingStage
from influence_pipeline.samples import DIGEST_BYTES, DataSet
from influence_pipeline.signals import shielded
from stages.stage import Array, ArrayLike, ArraySpec, Block, Blocks, Progress, Stage

DIGESTS = "digests"


@dataclass
class Work:
    """A stage with what the machine adds to it: where its samples come from, and what its blocks depend on.

    Attributes:
        stage: the mathematics.
        label: what people read.
        data: the data set along the grid's only axis; each sample's digest is kept beside what is computed of it.
        whole: a data set of which every block reads the first so many samples; their digests are kept, too.
        inputs: digest of whatever else blocks read, the same of all, or of each.
        before: called once before the first block that is computed here.
        holds: a data set to have in memory while blocks are computed, where it fits.
        computing: what surrounds all computing, such as the model's ``eval()`` mode.
        memory: returns what one process holds at once, beside model and data; refuses what is more than there is.
        passes: what it reads how often, for people.
        unit: what an entry of its grid is, for people.
        beside: works, and where they are kept, whose blocks are computed with this one's where that costs little.
    """

    stage: Stage
    label: str
    data: DataSet | None = None
    whole: tuple[DataSet, int] | None = None
    inputs: bytes | Callable[[Block], bytes] = NOTHING
    before: Callable[[], None] = lambda: None
    holds: DataSet | None = None
    computing: Callable[[], AbstractContextManager[None]] = nullcontext
    memory: Callable[[], int] = lambda: 0
    passes: str = ""
    unit: str = "samples"
    beside: list[tuple[Work, Group]] = field(default_factory=list)
    _ready: bool = field(default=False, init=False)

    @property
    def layout(self) -> Layout:
        """The arrays in the cache."""
        arrays, merged = self.stage.arrays, self.stage.merged
        if self.data is not None:
            axis = self.stage.grid.axes[0]
            arrays = (*arrays, _digests(axis.name, axis.length))
        if self.whole is not None:
            merged = (*merged, _digests("sample", self.whole[1]))
        return Layout(self.stage.grid, arrays, merged)

    def samples(self, block: Block) -> bytes:
        """Return a digest of the samples that a block reads."""
        if self.whole is not None:
            return self.whole_samples
        if self.data is not None:
            return digest([self.data.digests(block.ids(self.stage.grid.axes[0].name))])
        return NOTHING

    @property
    def whole_samples(self) -> bytes:
        """A digest of the samples that every block reads."""
        assert self.whole is not None
        data, count = self.whole
        return data.fingerprint(count)

    def reads(self, block: Block) -> bytes:
        """Return a digest of whatever else a block reads."""
        return self.inputs if isinstance(self.inputs, bytes) else self.inputs(block)

    def valid(self, group: Group, block: Block) -> Record | None:
        """Return the record of a block that is there, and of what it would be computed of now; None for another."""
        record = group.whole(block)
        if record is None or record.inputs != self.reads(block):
            return None
        # Samples along the axis were kept with the block; whoever reads one compares it.
        return record if self.whole is None or record.samples == self.samples(block) else None

    def ready(self) -> None:
        """Do once, in the process that computes, what must be done before the first block."""
        if not self._ready:
            self.before()
            if self.holds is not None:
                self.holds.keep()
            self.stage.prepare()
            self._ready = True

    def start(
        self, block: Block, group: Group, report: Callable[[Progress], None], claim: Claim | None = None
    ) -> Callable[[], bool] | None:
        """Compute one block; return what then keeps it, to be called in any thread.

        That returns whether it was kept. None where another process has the block, or is at work on it.

        Args:
            block: which.
            group: where it is kept.
            report: hears how far it is.
            claim: of the block, where it is this process's already.
        """
        with ExitStack() as stack:
            claim = self._claimed(block, group, stack, claim)
            if claim is None:
                return None
            parts = [(self, group, block, claim), *self._alongside(block, stack)]
            self.ready()
            keeping = []
            if len(parts) == 1:
                keeping.append(self._writing(group, block, claim, self.stage.parts(block, report), stack))
            else:
                found = self.stage.together([(work.stage, of) for work, _, of, _ in parts], report)
                for work, where, of, held in parts:
                    keeping.append(work._writing(where, of, held, iter([found.pop(0)]), stack))
            held_until_kept = stack.pop_all()

        def keep() -> bool:
            with held_until_kept:
                first, *_ = [kept() for kept in keeping]
            return first

        return keep

    def _alongside(self, block: Block, stack: ExitStack) -> Iterator[tuple[Work, Group, Block, Claim]]:
        """Claim the missing blocks of works beside this one that are computed with a block."""
        for work, group in self.beside:
            for other in self.stage.alongside(block, work.stage):
                claim = work._claimed(other, group, stack)
                if claim is not None:
                    yield work, group, other, claim

    def _claimed(self, block: Block, group: Group, stack: ExitStack, claim: Claim | None = None) -> Claim | None:
        """Claim a block that is missing, until the stack is left; None where it is not, or another process has it."""
        if (claim := claim or group.claim(block)) is None:
            return None
        with ExitStack() as own:
            own.enter_context(claim)
            if self.valid(group, block):
                return None
            stack.push(own.pop_all())
        return claim

    def _writing(
        self, group: Group, block: Block, claim: Claim, parts: Iterator[dict[str, Array]], stack: ExitStack
    ) -> Callable[[], bool]:
        """Have the values of a block encoded; return what then keeps it."""
        writing = stack.enter_context(BlockWriting(group, block))
        for values in parts:
            writing.add(values)
        if self.data is not None:
            writing.add({DIGESTS: self.data.digests(block.ids(self.stage.grid.axes[0].name))})
        return functools.partial(group.commit, block, writing, self.samples(block), self.reads(block), claim)

    def finish(self, group: Group, report: Callable[[Progress], None]) -> None:
        """Merge all blocks and keep that."""
        with group.alone_merging():
            if group.finished:
                return
            self.before()
            arrays: dict[str, ArrayLike] = {
                spec.name: group.rows(spec.name) if spec.encoding else group.array(spec.name)
                for spec in self.layout.arrays
            }
            values = self.stage.finish(arrays, report)
            if self.whole is not None:
                values[DIGESTS] = self.whole[0].digests(range(self.whole[1]))
            with shielded():
                group.commit_merged(values)


class Absent:
    """An input that is not there yet: it has a shape, for planning."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Say what shape it will have."""
        self.shape = shape

    def __getitem__(self, index: Any) -> Any:
        """Refuse to be read.

        Raises:
            MissingStage: always.
        """
        raise MissingStage("an input of this stage is not there yet")


def _digests(axis: str, length: int) -> ArraySpec:
    about = "digest of each sample as it was read"
    return ArraySpec(DIGESTS, (axis, "digest_byte"), (length, DIGEST_BYTES), "uint8", about=about)


def pending(work: Work, group: Group | None) -> Blocks:
    """Return the blocks that are not there, in order."""
    grid = work.stage.grid
    if group is None or not group.fits(work.layout):
        return Blocks(grid, np.arange(len(grid)))
    records = group.records(whole=True).within(grid)
    there = records.table["rows"] == grid.rows
    if isinstance(work.inputs, bytes):
        there &= records.same("inputs", work.inputs)
    else:
        for number in np.flatnonzero(there).tolist():
            there[number] = records.table["inputs"][number].tobytes() == work.inputs(grid.at(number))
    if work.whole is not None and there.any():
        there &= records.same("samples", work.whole_samples)
    return Blocks(grid, np.flatnonzero(~there))
