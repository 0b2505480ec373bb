"""Is the cache still what it says: files as they were written, samples and model as they were read?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from influence_pipeline import runner
from influence_pipeline.cache import FOLDERS, Group, records
from influence_pipeline.cache.record import digest
from influence_pipeline.errors import CacheDamaged, CacheMismatch, RequestError
from influence_pipeline.location import Location
from influence_pipeline.samples import DataSet, shown_ids
from influence_pipeline.work import DIGESTS
from influence_pipeline.works import Committed, Works
from stages.stage import Array, Block

FEW = 32
"""Changed samples for which the model is asked whether it sees the change, at most."""


@dataclass
class Verification:
    """What was read again, and what was not as it should be.

    Attributes:
        blocks: how many were read.
        absent: how many are not there yet, or were discarded.
        samples: how many were read.
        rows: training gradients that were computed again.
        damaged: what is wrong with which block; these were discarded, and the next run computes them anew.
        changed: positions of samples that are not what they were, by data set.
        differing: what is wrong with which gradient.
    """

    blocks: int = 0
    absent: int = 0
    samples: int = 0
    rows: int = 0
    damaged: list[str] = field(default_factory=list)
    changed: dict[str, list[int]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 where all is as it was written; 1 where a run mends it; 2 where data or model are others."""
        return 2 if self.changed or self.differing else 1 if self.damaged else 0

    def __str__(self) -> str:
        """Show it, a line for each finding."""
        lines = [f"damaged: {text}" for text in self.damaged]
        lines += [f"data set {name!r}: changed samples {shown_ids(ids)}" for name, ids in self.changed.items()]
        lines += [f"model: {text}" for text in self.differing]
        if self.damaged:
            lines.append("what was damaged is discarded: the next run computes it anew, and nothing else")
        if self.changed:
            lines.append(
                "changed samples: `run --refresh` computes anew what came of them, `run --accept-data` keeps it where "
                "the model gives the same gradients"
            )
        if self.differing:
            lines.append("other gradients: the code of task or model changed; undo that, or raise the task's `version`")
        counts = (
            f"{_counted(self.blocks, 'block')}, {_counted(self.samples, 'sample')} and "
            f"{_counted(self.rows, 'recomputed gradient')}"
        )
        is_not, them = ("is not", "it") if self.absent == 1 else ("are not", "them")
        there = f"; {_counted(self.absent, 'block')} {is_not} there, the next run computes {them}"
        absent = there if self.absent else ""
        return "\n".join([*lines, f"{counts} read: {'see above' if lines else 'as they were written'}{absent}"])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def verify(
    works: Works,
    tests: Sequence[str],
    sample: int,
    mend: Callable[[], None],
    models: Callable[[], Iterable[Works]],
) -> Verification:
    """Read everything again; see :meth:`Pipeline.verify`.

    Args:
        works: of the experiment.
        tests: whose samples are read.
        sample: training gradients to compute again, of each model.
        mend: mends descriptions, after they were looked at.
        models: gives the stages of each checkpoint where there are several, of the experiment where not.
    """
    found = Verification()
    show = works.settings.runtime.progress
    paths = [path for stage in FOLDERS for path in works.cache.paths(stage)]
    found.damaged += [text for path in paths if (text := _damaged_description(path))]
    found.damaged += works.cache.mend()
    mend()
    for path in paths:
        if not _damaged_description(path):
            _verify_files(Group(path), found, show=show)
    for model in models():
        model.expect()
    for data in _data_sets(works, tests):
        ids = data.expected.tolist()
        found.samples += len(ids)
        with runner.watched(f"samples of {data.name}", len(ids), show) as report:
            changed = data.changed(ids, report)
        if changed:
            found.changed[data.name] = sorted(changed)
    for model in models() if sample else ():
        _verify_rows(model, sample, found)
    return found


def _damaged_description(path: Location) -> str | None:
    try:
        Group(path).layout  # noqa: B018 - reads all descriptions
    except CacheDamaged as error:
        return str(error)
    return None


def _verify_files(group: Group, found: Verification, *, show: bool) -> None:
    label, blocks = f"{group.path.parent.name}/{group.path.name}", group.layout.grid
    with runner.watched(label, len(blocks), show) as report:
        for block in blocks:
            there = group.record(block) is not None
            found.blocks, found.absent = found.blocks + there, found.absent + (not there)
            for damaged, what in group.damage([block]):
                found.damaged.append(f"{label} block {block.index}: {what}")
                group.discard(damaged)
            report(1)
    found.damaged += records.discard_wrong(group)
    if merged := group.damage_of_merged():
        found.damaged.append(f"{label}: {merged}")
        group.discard(None)


def _verify_rows(works: Works, sample: int, found: Verification) -> None:
    place, data = works.gradients_place(), works.context.train
    group = works.find(place)
    changed = set(found.changed.get(data.name, ()))
    rows: Sequence[int] = [] if group is None else Committed(group)
    if changed:
        rows = [row for row in rows if row not in changed]
    if group is None or not rows:
        raise RequestError("--sample: no training gradients of this model and these samples are cached")
    data.forget()  # what changed was found, and is not to be refused once more
    few = np.random.default_rng().choice(len(rows), min(sample, len(rows)), replace=False)
    chosen = sorted(rows[position] for position in few.tolist())
    found.rows += len(chosen)
    found.differing += works.differs(place, chosen)


# ---- changed samples ---------------------------------------------------------------------------------------------


def refresh(works: Works, tests: Sequence[str]) -> dict[str, list[int]]:
    """Discard what is cached of samples that changed; see :meth:`Pipeline.refresh`."""
    found, changes = {}, _changed(works, tests)
    if any(changes.values()):
        works.context.train.forget()
        works.check_code(without=changes[works.context.train])
    for data, changed in changes.items():
        for group in _groups_of(works, data):
            for block, _, _ in _touched(group, changed):
                group.discard(block)
        data.forget()
        if changed:
            found[data.name] = sorted(changed)
    return found


def accept(works: Works, tests: Sequence[str]) -> dict[str, list[int]]:
    """Let what is cached stand for samples that changed; see :meth:`Pipeline.accept_data`.

    Raises:
        CacheMismatch: the model gives other gradients for them.
    """
    found = {}
    for data, changed in _changed(works, tests).items():
        if not changed:
            continue
        data.forget()
        _refuse_seen(works, data, sorted(changed))
        for group in _groups_of(works, data):
            for block, digests, own in _touched(group, changed):
                for position, now in own.items():
                    digests[position] = now
                group.adopt(block, DIGESTS, digests, _samples_digest(group, block, digests))
        found[data.name] = sorted(changed)
    return found


def _refuse_seen(works: Works, data: DataSet, changed: list[int]) -> None:
    """Refuse changed samples for which the model gives something else.

    Raises:
        CacheMismatch: naming the first such samples.
    """
    few = [changed[i * len(changed) // FEW] for i in range(FEW)] if len(changed) > FEW else changed
    if data is works.context.train:
        place = works.gradients_place()
        group = works.find(place)
        there = () if group is None else Committed(group)
        differs = [] if group is None else works.differs(place, [i for i in few if i in there])
        if not any(i in there for i in few):
            differs = ["no gradient of the changed samples is cached to compare with"]
    else:
        differs = works.tests_differ(data.name, few)
    if differs:
        raise CacheMismatch(
            f"data set {data.name!r}: the change of samples {shown_ids(changed)} matters to the model: {differs[0]}. "
            "`run --refresh` computes anew what came of them"
        )


def _changed(works: Works, tests: Sequence[str]) -> dict[DataSet, dict[int, Array]]:
    """Read all samples again; return the digests of changed ones, by data set and position."""
    found, show = {}, works.settings.runtime.progress
    for data in _data_sets(works, tests):
        ids = data.expected.tolist()
        with runner.watched(f"samples of {data.name}", len(ids), show) as report:
            found[data] = data.changed(ids, report)
    return found


def _data_sets(works: Works, tests: Sequence[str]) -> list[DataSet]:
    """Return the training set and test sets, each with what is cached of it as what is expected."""
    works.expect()
    for name in tests:
        works.expect_tests(name)
    return [works.context.train, *(works.context.test(name) for name in tests)]


def _groups_of(works: Works, data: DataSet) -> list[Group]:
    """Return the groups that keep digests of a data set."""
    if data is works.context.train:
        found = [works.find(works.grad_z_place())]
        weights = works.context.weights
        for stage in ("curvature", "newton"):
            found += [g for g in works.cache.groups(stage) if g.attributes["identity"]["weights"] == weights]
        return [group for group in found if group is not None]
    return [group for group in works.cache.groups("s_test") if group.attributes["tests"] == data.name]


def _touched(group: Group, changed: dict[int, Array]) -> Iterator[tuple[Block | None, Array, dict[int, Array]]]:
    """Yield the blocks that read changed samples, all digests of the group, and those of the block that change.

    ``None`` stands for what is merged; what a solver prepares reads all samples in every block.
    """
    digests = group.array(DIGESTS).filled(...)
    own = {i: now for i, now in changed.items() if i < len(digests) and not np.array_equal(digests[i], now)}
    if not own:
        return
    if any(spec.name == DIGESTS for spec in group.layout.merged):
        for block in group.layout.grid:
            if group.record(block) is not None:
                yield block, digests, own
        if group.finished:
            yield None, digests, own
        return
    axis = group.layout.grid.axes[0].name
    for block in group.layout.grid:
        mine = {i: now for i, now in own.items() if i in block.ids(axis)}
        if mine and group.record(block) is not None:
            yield block, digests, mine


def _samples_digest(group: Group, block: Block | None, digests: Array) -> bytes:
    if block is None or any(spec.name == DIGESTS for spec in group.layout.merged):
        return digest([len(digests).to_bytes(8, "little"), digests])
    return digest([digests[block.bounds[group.layout.grid.axes[0].name]]])
