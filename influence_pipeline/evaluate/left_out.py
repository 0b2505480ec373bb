"""Left out: which training samples each retraining does without. Retrainings can be added to, in the same order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from influence_pipeline.cache.record import digest


class LeftOut(Protocol):
    """Positions of the training samples that each of some retrainings does without."""

    @property
    def count(self) -> int:
        """How many retrainings there are."""

    def __getitem__(self, number: int) -> Sequence[int]:
        """Return the positions that one retraining does without, ascending."""

    def identity(self) -> dict[str, Any]:
        """Return what the positions depend on, but for how many retrainings there are."""

    def at_least(self, count: int) -> LeftOut:
        """Return the same with so many retrainings, if it has fewer and there can be more."""


@dataclass(frozen=True)
class RandomSubsets:
    """Random subsets of the training set are kept, each of the same share.

    Attributes:
        count: of retrainings.
        samples: in the training set.
        share: of it that is kept.
        seed: of the draws.
    """

    count: int
    samples: int
    share: float
    seed: int

    def __getitem__(self, number: int) -> Sequence[int]:
        """Return the positions that one retraining does without, ascending."""
        kept = max(1, round(self.share * self.samples))
        order = np.random.default_rng((self.seed, number)).permutation(self.samples)
        found: list[int] = np.sort(order[kept:]).tolist()
        return found

    def identity(self) -> dict[str, Any]:
        """Return what the positions depend on, but for how many retrainings there are."""
        return {"kind": "random subsets", "samples": self.samples, "share": self.share, "seed": self.seed}

    def at_least(self, count: int) -> LeftOut:
        """Return the same with so many retrainings, if it has fewer."""
        return replace(self, count=max(count, self.count))


@dataclass(frozen=True)
class RandomSamples:
    """One training sample is left out, another one each time, in random order.

    Attributes:
        count: of retrainings.
        samples: in the training set.
        seed: of the order.
    """

    count: int
    samples: int
    seed: int

    def __getitem__(self, number: int) -> Sequence[int]:
        """Return the position that one retraining does without."""
        return [self._order[number]]

    @functools.cached_property
    def _order(self) -> list[int]:
        order: list[int] = np.random.default_rng(self.seed).permutation(self.samples).tolist()
        return order

    def identity(self) -> dict[str, Any]:
        """Return what the positions depend on, but for how many retrainings there are."""
        return {"kind": "random samples", "samples": self.samples, "seed": self.seed}

    def at_least(self, count: int) -> LeftOut:
        """Return the same with so many retrainings, if it has fewer."""
        return replace(self, count=max(count, self.count))


@dataclass(frozen=True)
class Listed:
    """What is left out was chosen by somebody: positions for each retraining."""

    positions: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many retrainings there are."""
        return len(self.positions)

    def __getitem__(self, number: int) -> Sequence[int]:
        """Return the positions that one retraining does without."""
        return self.positions[number]

    def identity(self) -> dict[str, Any]:
        """Return a digest of all positions."""
        parts = (np.array([len(one), *one], np.int64) for one in self.positions)
        return {"kind": "listed", "digest": digest(parts).hex()}

    def at_least(self, count: int) -> LeftOut:
        """Return this: it has the retrainings that it has."""
        return self


def listed(left_out: Sequence[Sequence[int]]) -> Listed:
    """Return retrainings that do without these positions each."""
    return Listed(tuple(tuple(sorted({int(i) for i in one})) for one in left_out))


NOTHING = listed([[]])
"""One retraining with all samples."""
