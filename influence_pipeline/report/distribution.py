"""How scores are distributed: histograms as they are drawn, and how much of a test's influence few samples have.

Shapes: ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from influence_pipeline.influences import Influences
from stages.stage import Array

FEW = 10
"""Samples whose share of a test's influence says how concentrated that is."""
BINS = 60
"""Of a histogram, about."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 52, 30, 8
"""Of a drawn histogram, and the room beside, below and above it."""


@dataclass(frozen=True)
class Histogram:
    """Numbers of scores between edges, one of which is 0.

    Attributes:
        edges: (B + 1,).
        counts: (B,).
    """

    edges: Array
    counts: Array

    @classmethod
    def between(cls, low: float, high: float) -> Histogram:
        """Return an empty histogram of scores from low to high, and 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        width = (high - low) / BINS or 1.0
        first, last = math.floor(low / width), math.ceil(high / width)
        return cls(np.arange(first, max(last, first + 1) + 1) * width, np.zeros(max(last - first, 1), np.int64))

    def add(self, scores: Array) -> None:
        """Count some scores; rounding counts those at the ends as within."""
        width, bins = self.edges[1] - self.edges[0], len(self.counts)
        numbers = np.floor((scores.ravel() - self.edges[0]) / width).astype(np.int64).clip(0, bins - 1)
        self.counts[:] += np.bincount(numbers, minlength=bins)


@dataclass(frozen=True)
class Spread:
    """How the scores of some results are distributed.

    Attributes:
        scores: all of them; None where they were not stored.
        means: the training samples' averages over the tests.
        shares: (T,) of the sum of a test's absolute scores, what the ``FEW`` largest have; NaN where all are 0. None
            where so few ranks were kept that it says nothing.
        ranks: how many scores of each test the sum is over.
    """

    scores: Histogram | None
    means: Histogram
    shares: Array | None
    ranks: int


def spread(influences: Influences) -> Spread:
    """Return how scores are distributed, read once and a part at a time."""
    mean, count = influences.mean_scores(), len(influences.train_ids)
    means = Histogram.between(float(mean.min()), float(mean.max()))
    means.add(mean)
    shares = np.full(len(influences), np.nan)
    if influences.stored:
        (_, best), (_, worst) = influences.helpful(1), influences.harmful(1)
        ends = np.concatenate([best, worst])
        scores = Histogram.between(float(ends.min()), float(ends.max()))
        for rows, part in influences.score_rows():
            scores.add(part)
            shares[rows] = _share(part)
        return Spread(scores, means, shares if count > FEW else None, count)
    kept = influences.ranks
    if min(2 * kept, count) <= 2 * FEW:
        return Spread(None, means, None, kept)
    (_, helpful), (_, harmful) = influences.helpful(kept), influences.harmful(min(kept, count - kept) or 1)
    both = helpful if kept == count else np.hstack([helpful, harmful])
    return Spread(None, means, _share(both), both.shape[1])


def _share(scores: Array) -> Array:
    """Return what the largest scores of each row have of the sum of all, in absolute value; NaN where that is 0."""
    sizes = np.abs(scores).astype(np.float64)
    few = min(FEW, sizes.shape[1])
    largest = np.partition(sizes, sizes.shape[1] - few, axis=1)[:, -few:].sum(axis=1)
    total = sizes.sum(axis=1)
    shares: Array = np.divide(largest, total, out=np.full(len(total), np.nan), where=total > 0)
    return shares


@dataclass(frozen=True)
class Bar:
    """A bar of a drawn histogram: its place and size, on which side of 0 it is, and what it says."""

    x: float
    y: float
    width: float
    height: float
    helpful: bool
    says: str


@dataclass(frozen=True)
class Drawn:
    """A histogram as a template draws it, with a logarithmic axis of counts.

    Attributes:
        bars: those of at least one score.
        across: places and texts of the ticks of the axis of scores.
        up: and of that of counts.
        says: what is in it, in a sentence.
    """

    bars: tuple[Bar, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    says: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM


def drawn(histogram: Histogram, higher_is_better: bool) -> Drawn:
    """Lay out a histogram."""
    edges, counts = histogram.edges, histogram.counts
    low, high = float(edges[0]), float(edges[-1])
    decades = math.log10(max(int(counts.max()), 1)) + 0.3

    def across(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 8), 2)

    def up(count: float) -> float:  # a single score has a height, too
        share = (math.log10(count) + 0.3) / (decades + 0.3)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 2)

    bars = []
    for left, right, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        if count:
            positive = left + right > 0
            says = f"{count:,} from {left:.3g} to {right:.3g}"
            height = round(HEIGHT - BOTTOM - up(count), 2)
            bars.append(
                Bar(across(left), up(count), across(right) - across(left), height, positive != higher_is_better, says)
            )
    return Drawn(
        tuple(bars),
        tuple((across(tick), f"{tick:.6g}".replace("-", "−")) for tick in _ticks(low, high)),
        tuple((up(10**power), _count(power)) for power in range(int(decades) + 1)),
        f"{int(counts.sum()):,} scores from {low:.3g} to {high:.3g}, on a logarithmic axis of counts",
    )


def _count(power: int) -> str:
    """Write a power of ten shortly."""
    return f"{10 ** (power % 3)}{('', 'k', 'M', 'G', 'T')[power // 3]}"


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield round numbers between two, some five to ten of them."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield number * step
