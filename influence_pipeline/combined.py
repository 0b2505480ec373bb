"""The work of the stage ``combined``: the scores of several models, averaged or summed by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_pipeline import plan
from influence_pipeline.cache import group_name
from influence_pipeline.errors import MissingStage, RequestError
from influence_pipeline.influences import read_by_combined
from influence_pipeline.place import Place
from influence_pipeline.plan import show_bytes
from influence_pipeline.work import Absent, Work, pending
from stages.combined import Combined
from stages.stage import ArrayLike, Block, Grid

if TYPE_CHECKING:
    from influence_pipeline.works import Works


@dataclass(frozen=True)
class Part:
    """The scores of one model for one test set, as they were when they were looked at.

    Attributes:
        name: of their group.
        weight: that they are multiplied by in a sum; None for the mean.
        grid: of their blocks.
        contents: digest of each block that is there and valid, by its position.
        curvature_samples: how many training samples H and 1/N are of.
    """

    name: str
    weight: float | None
    grid: Grid
    contents: Mapping[tuple[int, ...], bytes]
    curvature_samples: int

    def content(self, block: Block) -> bytes | None:
        """Return the digest of a block, None where it is not there."""
        return self.contents.get(block.index)


def named(works: Works, tests: str, weight: float | None) -> Part:
    """Name the scores of one model for a test set, without looking at what is there of them."""
    place = works.influence_place(tests)
    return Part(place.name, weight, works.undamaged(place).stage.grid, {}, works.curvature_samples)


def part(works: Works, tests: str, weight: float | None) -> Part:
    """Look at the scores of one model for a test set."""
    place = works.influence_place(tests)
    work, group = works.work(place), works.find(place)
    missing = {block.index for block in pending(work, group)}
    records = {} if group is None else {b.index: group.record(b) for b in work.stage.grid if b.index not in missing}
    contents = {index: record.content for index, record in records.items() if record is not None}
    return Part(place.name, weight, work.stage.grid, contents, works.curvature_samples)


def combined_place(works: Works, tests: str, parts: Sequence[Part]) -> Place:
    """Return where the scores of several models are combined; their order makes no difference."""
    parts = sorted(parts, key=lambda one: one.name)
    settings = works.settings.influence.model_dump(mode="json", exclude_none=True)
    identity = {
        "combination": "mean" if parts[0].weight is None else "sum",
        "members": {one.name: 1 / len(parts) if one.weight is None else float(one.weight) for one in parts},
        "higher_is_better": works.context.experiment.task.higher_is_better,
        **settings,
    }
    reads = {f"influence {number}": one.name for number, one in enumerate(parts, 1)}
    return Place("combined", group_name(tests, identity), identity, tests, reads, parts=tuple(parts))


def work(works: Works, place: Place) -> Work:
    """Return the work of combining; the scores must be there to compute it, not to plan it."""
    context, tests, parts = works.context, str(place.tests), place.parts
    train_ids, test_ids = context.experiment.train_ids(), context.experiment.test_ids(tests)
    bands = (
        works.band(place, "test", plan.MOST_SCORED_TESTS),
        works.band(place, "sample", parts[0].grid.axes[1].band),
    )
    stage = Combined(
        [_scores(works, one, (len(test_ids), len(train_ids))) for one in parts],
        list(place.identity["members"].values()),
        *(train_ids, test_ids, bands, min(one.curvature_samples for one in parts)),
        min(works.settings.influence.top_k, len(train_ids)),
    )

    def before() -> None:
        for one in parts:
            if len(one.contents) < len(one.grid):
                raise MissingStage(f"influence/{one.name} is not complete: `run` does all")

    def memory() -> int:
        if stage.held_bytes > context.memory:
            raise RequestError(
                f"combined: a block of scores needs {show_bytes(stage.held_bytes, up=True)}; runtime.memory is "
                f"{show_bytes(context.memory)}: raise it"
            )
        return stage.held_bytes

    return Work(
        stage,
        f"combined {tests}",
        unit="scores",
        inputs=lambda block: read_by_combined(block, [(one.grid, one.content) for one in parts]),
        before=before,
        memory=memory,
        passes=f"1 pass over the scores of {len(parts)} checkpoints",
    )


def _scores(works: Works, one: Part, shape: tuple[int, int]) -> ArrayLike:
    group = works.cache.find("influence", one.name)
    return Absent(shape) if group is None else group.array("scores")
