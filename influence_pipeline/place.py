"""Places: where in the cache a stage's arrays are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from influence_pipeline.location import Location

if TYPE_CHECKING:
    from influence_pipeline.combined import Part
    from influence_pipeline.evaluate.left_out import LeftOut


@dataclass(frozen=True)
class Place:
    """Where a stage's arrays are.

    Attributes:
        stage: its name.
        name: its group's.
        identity: what its arrays depend on.
        tests: the test set that it is of, where it is of one.
        reads: names of the groups that it is made of, by stage; with a number after the stage where there are several.
        left_out: what retrained models do without.
        models: where those models are that were measured.
        parts: the scores of several models that it combines.
    """

    stage: str
    name: str
    identity: dict[str, Any]
    tests: str | None = None
    reads: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut | None = None
    models: Place | None = None
    parts: tuple[Part, ...] = ()

    @property
    def attributes(self) -> dict[str, Any]:
        """What the group says of itself: ``reads`` names the groups that it was made of."""
        return {"stage": self.stage, "tests": self.tests, "reads": self.reads, "identity": self.identity}


def read_paths(cache: Location, reads: Mapping[str, str]) -> Iterable[Location]:
    """Return the folders of the groups that something is made of, as its attributes name them."""
    return [cache / stage.partition(" ")[0] / name for stage, name in reads.items()]
