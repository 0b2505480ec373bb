"""``combined``: the scores of several models, averaged, or summed as in TracIn.

An ensemble's models are trained from other seeds: the mean of their scores is nearer to what retraining does than any
one's, since that, too, begins from some seed. TracIn (Pruthi et al., 2020, "Estimating Training Data Influence by
Tracing Gradient Descent") sums ηₖ ∇M(z_test, θₖ)ᵀ ∇L(z_train, θₖ) over checkpoints of one training with their learning
rates ηₖ: plain products of gradients, weighted. Scores here are divided by N.

Shapes: ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.influence.scores import Scores
from stages.stage import Array, ArrayLike, Block, Ids, Progress, Report, silent

READ_ROWS = 256
"""Test samples whose scores are summed at once."""


class Combined(Scores):
    """Reads the scores of all models cell by cell, sums them in float64, and ranks the sums."""

    name = "combined"

    def __init__(
        self,
        members: Sequence[ArrayLike],
        weights: Sequence[float],
        train_ids: Ids,
        test_ids: Array,
        bands: tuple[int, int],
        curvature_samples: int,
        top_k: int,
    ) -> None:
        """Lay out the weighted sum of some scores, (T, N) each.

        Args:
            members: the scores of each model.
            weights: what each is multiplied by.
            train_ids: (N,) int64, what rankings name samples by.
            test_ids: (T,) int64.
            bands: test and training samples of one block.
            curvature_samples: how many of the training samples the curvature is of.
            top_k: ranks, at most N.
        """
        super().__init__(train_ids, test_ids, bands, curvature_samples, top_k, store_scores=True)
        self.members, self.weights = members, weights

    @property
    def held_bytes(self) -> int:
        """What a cell holds at once: its scores, what ranking them takes, and the rows that are summed."""
        tests, samples = (min(axis.band, axis.length) for axis in self.grid.axes)
        return samples * (3 * 4 * tests + (3 * 8 + 4) * min(tests, READ_ROWS))

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Sum the scores of one cell, and rank them.

        Raises:
            StageError: a sum is not finite.
        """
        tests, samples = block.bounds["test"], block.bounds["sample"]
        scores = np.empty((tests.stop - tests.start, samples.stop - samples.start), np.float32)
        for start in range(tests.start, tests.stop, READ_ROWS):
            rows = slice(start, min(start + READ_ROWS, tests.stop))
            total = np.zeros((rows.stop - rows.start, scores.shape[1]))
            for member, weight in zip(self.members, self.weights, strict=True):
                total += weight * np.asarray(member[rows, samples], np.float64)
            with np.errstate(over="ignore"):  # what is beyond float32 is refused below
                scores[rows.start - tests.start : rows.stop - tests.start] = total
            report(Progress(rows.stop - tests.start, len(scores), "scores"))
        return self.kept(block, scores)
