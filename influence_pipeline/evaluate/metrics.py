"""Figures for how well predictions agree with what retraining gives, and for how well wrong labels are found.

Shapes: ``R`` retrainings, ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.ranks import ranks
from stages.stage import Array

RESAMPLES = 1000
"""Of a bootstrap interval."""
LEVEL = 0.95
CHECKED = (0.05, 0.1, 0.2)
"""Shares of the training set of which it is said how many wrong labels they have found."""


@dataclass(frozen=True)
class DatamodelingScore:
    """The linear datamodeling score (Park et al., 2023, "TRAK", section 3.1).

    For each test sample, Spearman's correlation over random subsets of the training set, between what is measured
    after retraining on a subset and what is predicted by adding up scores.

    Attributes:
        mean: over the tests.
        low: end of a 95 % bootstrap interval of the mean, over subsets and tests.
        high: its other end.
        by_test: (T,).
    """

    mean: float
    low: float
    high: float
    by_test: Array


def datamodeling_score(actual_RT: Array, predicted_RT: Array, seed: int = 0) -> DatamodelingScore:
    """Return the linear datamodeling score; a test sample whose numbers are all the same counts as 0.

    Args:
        actual_RT: measurements after retraining, means over seeds.
        predicted_RT: what was predicted.
        seed: of the bootstrap.
    """
    found = _columns(actual_RT, predicted_RT)
    draw = np.random.default_rng(seed)
    subsets, tests = actual_RT.shape
    means = []
    for _ in range(RESAMPLES):
        rows = draw.integers(subsets, size=subsets)
        columns = draw.integers(tests, size=tests)
        # Ranks of the whole, which are as good as those of a part and need not be found again.
        means.append(_pearson(found[0][rows], found[1][rows])[columns].mean())
    by_test = _pearson(*found)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return DatamodelingScore(float(by_test.mean()), float(low), float(high), by_test)


def _columns(*matrices: Array) -> tuple[Array, ...]:
    """Return the ranks in each column."""
    return tuple(np.stack([ranks(column) for column in matrix.T], axis=1) for matrix in matrices)


def _pearson(first_RT: Array, second_RT: Array) -> Array:
    """Return Pearson's correlation of each column with the other's, (T,); 0 where either is constant."""
    a, b = (values - values.mean(axis=0) for values in (first_RT, second_RT))
    size = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    found: Array = np.divide((a * b).sum(axis=0), size, out=np.zeros_like(size), where=size > 0)
    return found


@dataclass(frozen=True)
class LeaveOneOut:
    """How well the effect of leaving out single samples was predicted.

    Attributes:
        pearson: correlation of all pairs of a sample and a test.
        slope: of actual against predicted effects, by least squares through the origin; 1 where sizes are right.
        by_test: Pearson's correlation for each test sample, (T,).
        samples: positions of the samples that were left out, (R,).
        actual: (R, T), what is measured without a sample minus what is measured with all.
        predicted: (R, T).
    """

    pearson: float
    slope: float
    by_test: Array
    samples: Array
    actual: Array
    predicted: Array


def leave_one_out(actual_RT: Array, predicted_RT: Array, samples: Sequence[int]) -> LeaveOneOut:
    """Compare effects of leaving out single samples with predicted ones.

    Args:
        actual_RT: measured without a sample minus measured with all, means over seeds.
        predicted_RT: what was predicted.
        samples: positions of those that were left out.
    """
    flat = actual_RT.reshape(-1, 1), predicted_RT.reshape(-1, 1)
    size = float((predicted_RT**2).sum())
    return LeaveOneOut(
        float(_pearson(*flat)[0]),
        float((actual_RT * predicted_RT).sum()) / size if size else 0.0,
        _pearson(actual_RT, predicted_RT),
        np.asarray(samples),
        actual_RT,
        predicted_RT,
    )


@dataclass(frozen=True)
class Detection:
    """How well a ranking of the training samples finds those with wrong labels.

    Attributes:
        auc: the chance that a wrong label stands before a right one.
        found: the part of all wrong labels that is among the first ``CHECKED`` shares of the training set.
    """

    auc: float
    found: tuple[float, ...]


def detection(suspicion_N: Array, wrong_N: Array) -> Detection:
    """Return how well the most suspicious samples are those with wrong labels.

    Args:
        suspicion_N: larger for samples that are looked at first; equal ones in their order.
        wrong_N: whether the label is wrong.
    """
    wrong, count = wrong_N.astype(bool), len(wrong_N)
    positives = int(wrong.sum())
    above = float(ranks(suspicion_N)[wrong].sum()) - positives * (positives + 1) / 2
    order = np.argsort(-suspicion_N, kind="stable")
    hits = np.cumsum(wrong[order]) / positives
    return Detection(
        above / (positives * (count - positives)), tuple(float(hits[max(0, round(s * count) - 1)]) for s in CHECKED)
    )
