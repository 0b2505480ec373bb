"""Truth: what models give that were trained again without samples, and how near to that a matrix of scores comes.

Shapes: ``R`` retrainings, ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import influence_pipeline as ip
from influence_pipeline.evaluate import datamodeling_score, leave_one_out
from influence_pipeline.evaluate.left_out import LeftOut, RandomSamples, RandomSubsets

Array = NDArray[Any]


@dataclass(frozen=True)
class Size:
    """How much is computed for a case.

    Attributes:
        subsets: random halves of the training set that models are trained on.
        singles: single samples without which they are.
        seeds: of each of these.
        depth: of LiSSA's recursion, which would go on for tens of thousands of steps where λ is small.
    """

    subsets: int
    singles: int
    seeds: int
    depth: int = 1000


class Scored(NamedTuple):
    """What came of one setting of a method.

    Attributes:
        setting: for people.
        scores: (T, N), predicted changes of each test's measurement without each training sample.
        own: (N,), those of each training sample's own loss, its self-influence; None where that was not computed.
        seconds: of processors, from the model to the scores of all tests.
    """

    setting: str
    scores: Array
    own: Array | None
    seconds: float


@dataclass(frozen=True)
class Figures:
    """How near scores come.

    Attributes:
        lds: the linear datamodeling score.
        low: end of its 95 % interval.
        high: the other.
        pearson: of the effects of leaving out single samples.
        slope: of actual against predicted effects.
    """

    lds: float
    low: float
    high: float
    pearson: float
    slope: float


@dataclass(frozen=True)
class Truth:
    """What was measured after training again, means over seeds.

    Attributes:
        subsets: what each model of a random half did without, (R, N), 1 where left out.
        of_subsets: what they gave, (R, T).
        singles: the positions of the samples that were left out alone, (R,).
        of_singles: what is measured without each of these minus what is measured with all, (R, T).
        size: how many models there are.
        seeds_lds: LDS of what half of the seeds gave, as a prediction of what the others gave; NaN for one seed.
    """

    subsets: Array
    of_subsets: Array
    singles: Array
    of_singles: Array
    size: Size
    seeds_lds: float

    @classmethod
    def of(cls, pipeline: ip.Pipeline, tests: str, size: Size) -> Truth:
        """Train what is missing in the pipeline's cache, and measure."""
        count = len(pipeline.experiment.train_ids())
        subsets = _positions(RandomSubsets(size.subsets, count, 0.5, 0))
        singles = _positions(RandomSamples(size.singles, count, 0))
        halves = pipeline.retrained(tests, subsets, size.seeds).values
        without = pipeline.retrained(tests, singles, size.seeds).values
        whole = pipeline.retrained(tests, [[]], size.seeds).values
        left_out = np.zeros((size.subsets, count))
        for row, positions in zip(left_out, subsets, strict=True):
            row[list(positions)] = 1
        seeds_lds = math.nan
        if size.seeds > 1:
            seeds_lds = datamodeling_score(halves[1::2].mean(0), halves[::2].mean(0)).mean
        effects = (without - whole).mean(0)
        return cls(left_out, halves.mean(0), np.concatenate(singles), effects, size, seeds_lds)

    def __str__(self) -> str:
        """Say how much there is of it."""
        size, tests = self.size, self.of_subsets.shape[1]
        seeds = f", {size.seeds} seeds each, one part of which predicts the others with an LDS of {self.seeds_lds:.2f}"
        return (
            f"{self.subsets.shape[1]} training samples, {tests} tests; {size.subsets} random halves, "
            f"{size.singles} samples left out{seeds if size.seeds > 1 else ''}"
        )

    def figures(self, scores_TN: Array) -> Figures:
        """Compare scores, predicted changes by leaving out each sample, with what came of it."""
        scores_TN = np.asarray(scores_TN, np.float64)
        lds = datamodeling_score(self.of_subsets, self.subsets @ scores_TN.T)
        one = leave_one_out(self.of_singles, scores_TN.T[self.singles], self.singles)
        return Figures(lds.mean, lds.low, lds.high, one.pearson, one.slope)


def _positions(left_out: LeftOut) -> list[Sequence[int]]:
    return [left_out[number] for number in range(left_out.count)]
