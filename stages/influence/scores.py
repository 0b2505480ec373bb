"""What becomes of scores, whatever they were computed from: rankings, averages, sums.

Shapes: ``T`` test samples, ``N`` training samples, ``k`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from stages.influence.ranking import bottom_k, top_k
from stages.stage import (
    Array,
    ArrayLike,
    ArraySpec,
    Axis,
    Block,
    Grid,
    Ids,
    Progress,
    Report,
    Stage,
    StageError,
    silent,
)

MERGED_BYTES = 2**26
"""Of candidates that are merged at once, about."""
Pick = Callable[[Array, Array, int], tuple[Array, Array]]
RANKINGS = ("helpful_ids", "helpful_scores", "harmful_ids", "harmful_scores")


class Scores(Stage):
    """A stage that has scores (T, N).

    A block is a band of test samples times a band of training samples. It keeps its own k best and worst
    candidates for each test sample and its sums over both axes; ``finish`` merges these.
    """

    def __init__(
        self,
        train_ids: Ids,
        test_ids: Array,
        bands: tuple[int, int],
        curvature_samples: int,
        top_k: int,
        *,
        store_scores: bool,
    ) -> None:
        """Lay out the scores of some test samples and training samples.

        Args:
            train_ids: (N,) int64, what rankings name samples by.
            test_ids: (T,) int64.
            bands: test and training samples of one block.
            curvature_samples: how many of the training samples the curvature is of: what scores are divided by.
            top_k: k, at most N.
            store_scores: keep the (T, N) scores, not just the rankings.
        """
        self.train_ids, self.test_ids = train_ids, test_ids
        self.curvature_samples, self.top_k = curvature_samples, top_k
        tests, count = len(test_ids), len(train_ids)
        self.grid = Grid((Axis("test", tests, bands[0]), Axis("sample", count, bands[1])))
        parts = self.grid.shape
        candidates = ("sample_block", "test", "rank"), (parts[1], tests, top_k)
        scores = ArraySpec(
            "scores", ("test", "sample"), (tests, count), about="predicted change of the measurement without the sample"
        )
        self.arrays = (
            *((scores,) if store_scores else ()),
            ArraySpec("part_helpful_ids", *candidates, "int64", about="best of each training band"),
            ArraySpec("part_helpful_scores", *candidates, about="scores of part_helpful_ids"),
            ArraySpec("part_harmful_ids", *candidates, "int64", about="worst of each training band"),
            ArraySpec("part_harmful_scores", *candidates, about="scores of part_harmful_ids"),
            ArraySpec("part_sum", ("test_block", "sample"), (parts[0], count), "float64", about="sums over test bands"),
            ArraySpec("part_total", ("sample_block", "test"), (parts[1], tests), "float64", about="over train bands"),
        )
        ranks = ("test", "rank"), (tests, top_k)
        mean_ranks = ("rank",), (top_k,)
        self.merged = (
            ArraySpec("helpful_ids", *ranks, "int64", about="training ids, most helpful first"),
            ArraySpec("helpful_scores", *ranks, about="scores of helpful_ids"),
            ArraySpec("harmful_ids", *ranks, "int64", about="training ids, most harmful first"),
            ArraySpec("harmful_scores", *ranks, about="scores of harmful_ids"),
            ArraySpec("offset", ("test",), (tests,), "float64", about="to add for retraining on a mean over N - 1"),
            ArraySpec("mean_scores", ("sample",), (count,), about="scores averaged over the tests"),
            ArraySpec("mean_helpful_ids", *mean_ranks, "int64", about="training ids by mean score, largest first"),
            ArraySpec("mean_harmful_ids", *mean_ranks, "int64", about="training ids by mean score, smallest first"),
            ArraySpec("train_ids", ("sample",), (count,), "int64", about="id of each training sample"),
            ArraySpec("test_ids", ("test",), (tests,), "int64", about="id of each test sample"),
            ArraySpec("curvature_samples", (), (), "int64", about="training samples that H and 1/N are of"),
        )

    def kept(self, block: Block, scores: Array) -> dict[str, Array]:
        """Return what a cell keeps, of its scores.

        Args:
            block: the cell.
            scores: of its tests and training samples, float32.

        Raises:
            StageError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            test, sample = np.argwhere(~np.isfinite(scores))[0]
            raise StageError(
                f"the score of test {self.test_ids[block.bounds['test']][test]} and training sample "
                f"{self.train_ids[block.bounds['sample']][sample]} is {scores[test, sample]}: "
                "a cached vector is damaged, or beyond float32"
            )
        ids = self.train_ids[block.bounds["sample"]]
        helpful_ids, helpful = top_k(scores, ids, self.top_k)
        harmful_ids, harmful = bottom_k(scores, ids, self.top_k)
        found = {
            "part_helpful_ids": helpful_ids[None],
            "part_helpful_scores": helpful[None],
            "part_harmful_ids": harmful_ids[None],
            "part_harmful_scores": harmful[None],
            "part_sum": scores.sum(axis=0, dtype=np.float64)[None],
            "part_total": scores.sum(axis=1, dtype=np.float64)[None],
        }
        if any(spec.name == "scores" for spec in self.arrays):
            found["scores"] = scores
        return found

    def _best(self, part_ids: ArrayLike, part_scores: ArrayLike, rows: slice, pick: Pick) -> tuple[Array, Array]:
        """Return ids and scores of the best of the candidates of all training bands, some bands at a time."""
        bands = self.grid.shape[1]
        step = max(1, MERGED_BYTES // ((rows.stop - rows.start) * self.top_k * 12))
        best: list[tuple[Array, Array]] = []
        for start in range(0, bands, step):
            part = slice(start, min(start + step, bands))
            best += zip(np.asarray(part_ids[part, rows]), np.asarray(part_scores[part, rows]), strict=True)
            ids, scores = (np.concatenate(columns, axis=1) for columns in zip(*best, strict=True))
            best = [pick(scores, ids, self.top_k)]
        return best[0]

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Merge candidates and sums over all blocks."""
        tests, count = len(self.test_ids), len(self.train_ids)
        found: dict[str, list[Array]] = {name: [] for name in RANKINGS}
        (of_tests, _), parts = self.grid.axes, self.grid.shape[1]
        step = max(1, MERGED_BYTES // (of_tests.band * self.top_k * 12)) * of_tests.band
        for start in range(0, tests, step):
            rows = slice(start, min(start + step, tests))
            for side, pick in (("helpful", top_k), ("harmful", bottom_k)):
                ids, best = self._best(arrays[f"part_{side}_ids"], arrays[f"part_{side}_scores"], rows, pick)
                found[f"{side}_ids"].append(ids)
                found[f"{side}_scores"].append(best)
            report(Progress(rows.stop, tests, "rankings"))
        total = np.zeros(count)
        for part in range(self.grid.shape[0]):
            total += arrays["part_sum"][part]
        mean, train_ids = (total / tests).astype(np.float32), np.asarray(self.train_ids)
        offset = np.zeros(tests)
        for part in range(parts):
            offset -= arrays["part_total"][part]
        return {
            **{name: np.concatenate(values) for name, values in found.items()},
            "offset": offset / count,
            "mean_scores": mean,
            "mean_helpful_ids": top_k(mean[None], train_ids, self.top_k)[0][0],
            "mean_harmful_ids": bottom_k(mean[None], train_ids, self.top_k)[0][0],
            "train_ids": train_ids,
            "test_ids": self.test_ids,
            "curvature_samples": np.asarray(self.curvature_samples),
        }
