"""``influence``: scores (T, N) = S Gᵀ / N, and the rankings that come of them.

Shapes: ``T`` test samples, ``N`` training samples, ``D`` coordinates, ``k`` ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.influence.scores import Scores
from stages.stage import Array, ArrayLike, Block, FactoredRows, Ids, Progress, Report, Stage, ahead, silent

if TYPE_CHECKING:
    import torch

AT_ONCE = 2**21
"""Entries of vectors that are read at once: as many as a tile of them has, so that few tiles are decoded twice."""
LEAST_COLUMNS = 2**13


class Influence(Scores):
    """Streams both matrices tile by tile; neither S, nor G, nor the scores are ever held whole."""

    name = "influence"

    def __init__(
        self,
        vectors: ArrayLike,
        gradients: ArrayLike,
        train_ids: Ids,
        test_ids: Array,
        *,
        bands: tuple[int, int],
        read_rows: int,
        read_columns: int,
        tile_columns: int,
        rows_first: bool,
        curvature_samples: int,
        top_k: int,
        store_scores: bool,
        ahead_bytes: int = 0,
    ) -> None:
        """Lay out the scores of ``vectors`` (T, D) and ``gradients`` (N, D).

        Args:
            vectors: S.
            gradients: G.
            train_ids: (N,) int64, what rankings name samples by.
            test_ids: (T,) int64.
            bands: test and training samples of one block.
            read_rows: rows of G read at once.
            read_columns: columns of S read at once.
            tile_columns: columns of G read at once.
            rows_first: go over all columns of some rows before the next rows (for a G computed as it is read),
                not over all rows of some columns, by several threads (so that S is read once).
            curvature_samples: how many of the training samples the curvature is of: what scores are divided by.
            top_k: k, at most N.
            store_scores: keep the (T, N) scores, not just the rankings.
            ahead_bytes: that are fetched before they are used, of S and G, where reading takes long.
        """
        super().__init__(train_ids, test_ids, bands, curvature_samples, top_k, store_scores=store_scores)
        self.vectors, self.gradients = vectors, gradients
        self.read_rows, self.read_columns, self.rows_first = read_rows, read_columns, rows_first
        self.tile_columns, self.ahead_bytes = tile_columns, ahead_bytes

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute one cell's scores, candidates and sums.

        Raises:
            StageError: a score is not finite.
        """
        return self.together([(self, block)], report)[0]

    def alongside(self, block: Block, other: Stage) -> list[Block]:
        """Return the blocks of another test set over the same training samples: they read the same gradients."""
        if not isinstance(other, Influence) or other.grid.axes[1] != self.grid.axes[1]:
            return []
        return [other.grid.block((position, block.index[1])) for position in range(other.grid.shape[0])]

    def together(self, parts: Sequence[tuple[Stage, Block]], report: Report = silent) -> list[dict[str, Array]]:
        """Compute cells of several test sets over the same training samples, in one pass over their gradients.

        Raises:
            StageError: a score is not finite.
        """
        cells = [(stage, block) for stage, block in parts if isinstance(stage, Influence)]
        assert len(cells) == len(parts)
        totals = self._products([(stage.vectors, block.bounds["test"]) for stage, block in cells], parts[0][1], report)
        # One after the other, so that scores are copied for one at a time.
        return [stage._found(block, totals.pop(0)) for stage, block in cells]

    def _found(self, block: Block, total_nT: torch.Tensor) -> dict[str, Array]:
        """Return what a cell keeps, of G Sᵀ over it."""
        return self.kept(block, (total_nT.T / self.curvature_samples).contiguous().numpy())

    def _products(
        self, solutions: Sequence[tuple[ArrayLike, slice]], block: Block, report: Report
    ) -> list[torch.Tensor]:
        """Return G Sᵀ over the training samples of a block, (samples, tests) float32, for each of some S.

        Args:
            solutions: S, and which of its rows.
            block: the training samples.
            report: carries progress out.
        """
        import torch

        from stages.threads import in_threads, own_memory

        samples = block.bounds["sample"]
        # G Sᵀ, not S Gᵀ: the long side first is the faster product. One for each S, so that none depends on others.
        totals_nT = [torch.zeros(samples.stop - samples.start, tests.stop - tests.start) for _, tests in solutions]
        reads = list(self._reads(samples))
        done = itertools.count(1)
        vectors_DT: list[torch.Tensor] = []
        known = slice(0, 0)

        def add(read: tuple[slice, slice]) -> None:
            rows, columns = read
            for tile in self._tiles(columns):
                if factored is None:
                    gradients_nD = np.asarray(gradients[rows, tile])
                else:
                    shape = rows.stop - rows.start, tile.stop - tile.start
                    gradients_nD = own_memory("gradients", shape, np.dtype(np.float32))
                    factored.read_into((rows, tile), gradients_nD)
                tile_nD = torch.from_numpy(gradients_nD)
                for total, vectors in zip(totals_nT, vectors_DT, strict=True):
                    part = vectors[tile.start - columns.start : tile.stop - columns.start]
                    total[rows.start - samples.start : rows.stop - samples.start].addmm_(tile_nD, part)
            report(Progress(next(done), len(reads), "scores"))

        items = [[(rows, tile) for tile in self._tiles(columns)] for rows, columns in reads]
        with ahead(self.gradients, items, torch.get_num_threads(), self.ahead_bytes // 2) as gradients:
            factored = gradients if isinstance(gradients, FactoredRows) else None
            for columns, group in itertools.groupby(reads, key=lambda read: (read[1].start, read[1].stop)):
                if slice(*columns) != known:
                    known = slice(*columns)
                    vectors_DT = [
                        _transposed(vectors, tests, known, self.ahead_bytes // 2) for vectors, tests in solutions
                    ]
                if self.rows_first:
                    for read in group:
                        add(read)
                else:
                    in_threads(add, list(group))
            if factored is not None and factored.factors is not None:
                factors_n1 = torch.from_numpy(factored.factors[samples])
                for total in totals_nT:
                    total *= factors_n1
        return totals_nT

    def _tiles(self, columns: slice) -> list[slice]:
        """Return the columns of G that are read at once, of some columns."""
        starts = range(columns.start, columns.stop, self.tile_columns)
        return [slice(start, min(start + self.tile_columns, columns.stop)) for start in starts]

    def _reads(self, samples: slice) -> Iterator[tuple[slice, slice]]:
        """Yield every tile of G over a band of samples once."""
        rows = [
            slice(start, min(start + self.read_rows, samples.stop))
            for start in range(samples.start, samples.stop, self.read_rows)
        ]
        dim = self.gradients.shape[1]
        columns = [slice(start, min(start + self.read_columns, dim)) for start in range(0, dim, self.read_columns)]
        if self.rows_first:
            return ((r, c) for r in rows for c in columns)
        return ((r, c) for c in columns for r in rows)


def columns_at_once(tests: int) -> int:
    """Return how many columns of so many vectors are read at once."""
    return max(LEAST_COLUMNS, AT_ONCE // max(1, tests))


def _transposed(vectors: ArrayLike, rows: slice, columns: slice, ahead_bytes: int = 0) -> torch.Tensor:
    """Return a part of some vectors, (columns, rows), read a few columns at a time."""
    import torch

    found = torch.empty(columns.stop - columns.start, rows.stop - rows.start)
    step = columns_at_once(rows.stop - rows.start)
    starts = range(columns.start, columns.stop, step)
    parts = [slice(start, min(start + step, columns.stop)) for start in starts]
    with ahead(vectors, [[(rows, part) for part in parts]], 1, ahead_bytes) as read:
        for part in parts:
            found[part.start - columns.start : part.stop - columns.start] = torch.from_numpy(
                np.asarray(read[rows, part])
            ).T
    return found
