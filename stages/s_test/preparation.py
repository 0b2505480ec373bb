"""What a solver prepares once for all test sets: a stage of its own, which it makes of what the machine offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stages.stage import ArrayLike, Stage

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.gradients import Gradients


class Preparation(Stage):
    """A stage whose arrays solving reads.

    Attributes:
        unit: what an entry of its grid is, for people.
    """

    name = "curvature"
    unit: ClassVar[str] = "parts"

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of those arrays that solving needs."""
        return ()

    @property
    def read(self) -> Mapping[str, ArrayLike]:
        """What else solving needs of what this is made of, by name."""
        return {}

    @property
    def passes(self) -> str:
        """What it reads how often, for people."""
        return ""

    @property
    def held_bytes(self) -> int:
        """What it holds at once, at most, beside model and data."""
        return 0


@dataclass(frozen=True)
class Sources:
    """What a preparation may be made of, and how the machine cuts it.

    Attributes:
        curvature: over the training set.
        prepared: what the solver's :meth:`~stages.s_test.solver.Solver.first` prepared.
        gradients: gives the cached gradients, to be read by tiles, or by whole rows if that is asked for; of solvers
            that are made of them alone.
        parts: into how many parts so many entries are cut, over each of which so many numbers are summed.
        band: entries of a block along the axis of this name, so many at most.
    """

    curvature: Curvature
    prepared: Mapping[str, ArrayLike]
    gradients: Callable[[bool], Gradients]
    parts: Callable[[int, int], int]
    band: Callable[[str, int], int]
