"""``self_influence``: gᵢᵀ (H + λI)⁻¹ gᵢ / N of every training sample, its score on its own loss.

Every solver can: rows of G are its right-hand sides, as gradients of measurements are those of ``s_test``. These are N
solutions. For ``exact`` they are less work than its matrix was (4 N D² operations; the matrix of a model with K outputs
takes 2 K N D²). For an iterative solver each is as much work as that of a test sample.

Shapes: ``n`` training samples at once, ``D`` coordinates.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from stages.s_test.solver import Prepared, Solve, Solver, dots, norms
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Ids, Report, Stage, StageError, silent

if TYPE_CHECKING:
    from stages.curvature import Curvature


class SelfInfluence(Stage):
    """What each training sample does to its own loss, and to the parameters, with the solver's evidence."""

    name = "self_influence"

    def __init__(
        self,
        solver: Solver,
        curvature: Curvature,
        prepared: Prepared,
        gradients: ArrayLike,
        train_ids: Ids,
        block_rows: int,
        memory_bytes: int,
        *,
        kept_bytes: int,
        reading_bytes: int,
    ) -> None:
        """Lay out the samples of ``gradients`` (N, D) in blocks of ``block_rows``.

        Args:
            solver: of the systems.
            curvature: H, over the samples that 1/N is of.
            prepared: what the solver prepared.
            gradients: G; a part that is read is all columns of rows of one block.
            train_ids: (N,) int64, what samples are named by.
            block_rows: training samples of a block.
            memory_bytes: what all of it may hold.
            kept_bytes: what gradients hold between reads.
            reading_bytes: what they hold while they are read.

        Raises:
            StageError: the problem does not fit the solver or the memory.
        """
        solver.check_size(curvature.function, memory_bytes)
        solver.check_samples(len(curvature.samples))
        self.solver, self.curvature, self.prepared = solver, curvature, prepared
        self.gradients, self.train_ids = gradients, train_ids
        self.memory_bytes, self._kept_bytes, self._reading_bytes = memory_bytes, kept_bytes, reading_bytes
        self._solve: Solve | None = None
        count = len(train_ids)
        self.grid = Grid((Axis("sample", count, block_rows),))
        per_sample = ("sample",), (count,)
        self.arrays = (
            ArraySpec("self_influence", *per_sample, about="predicted change of each sample's loss without the sample"),
            ArraySpec("change", *per_sample, about="|(H + λI)⁻¹ g| of each sample's gradient g"),
            ArraySpec("residual", *per_sample, "float64", about="|g − (H + λI) x| / |g|"),
            ArraySpec("iterations", *per_sample, "int64", about="products with the curvature, 0 for direct solvers"),
            ArraySpec("damping", *per_sample, "float64", about="λ, absolute"),
            ArraySpec("train_ids", *per_sample, "int64", about="id of each training sample"),
            ArraySpec(
                "batch",
                ("sample_block",),
                self.grid.shape,
                "int64",
                about="samples that were computed together, for products",
            ),
        )

    @functools.cached_property
    def _fixed_bytes(self) -> int:
        """What is held while solving beside the solver's vectors."""
        return self._kept_bytes + self.solver.fixed_bytes(self.curvature)

    @functools.cached_property
    def rows_at_once(self) -> int:
        """Training samples that are solved for together."""
        return self.solver.rows_within(self.curvature, self.memory_bytes, self._fixed_bytes)

    def held_bytes(self, rows: int) -> int:
        """Return what solving for some training samples holds at once, at most, or reading their gradients before."""
        return max(self._reading_bytes, self._fixed_bytes + self.solver.row_bytes(self.curvature) * rows)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Solve for one band of training samples.

        Raises:
            StageError: a self-influence is not finite.
        """
        import torch

        if self._solve is None:
            self._solve = self.solver.start(self.curvature, self.prepared)
        samples, columns = block.bounds["sample"], slice(0, self.curvature.dim)
        found: dict[str, list[Array]] = {spec.name: [] for spec in self.arrays}
        for start in range(samples.start, samples.stop, self.rows_at_once):
            rows = slice(start, min(start + self.rows_at_once, samples.stop))
            gradients_nD = torch.from_numpy(np.asarray(self.gradients[rows, columns])).to(self.curvature.l2)
            solution = self._solve(gradients_nD, report)
            own = dots(gradients_nD, solution.vectors) / len(self.curvature.samples)
            found["self_influence"].append(own.to("cpu", torch.float32).numpy())
            found["change"].append(norms(solution.vectors).to("cpu", torch.float32).numpy())
            found["residual"].append(solution.residual.cpu().numpy())
            found["iterations"].append(solution.iterations.cpu().numpy())
            found["damping"].append(np.full(len(gradients_nD), self.solver.resolved(self.prepared)))
            found["train_ids"].append(self.train_ids[rows])
        found["batch"].append(np.array([self.curvature.batch.size]))
        values = {name: np.concatenate(parts) for name, parts in found.items()}
        lost = np.flatnonzero(~(np.isfinite(values["self_influence"]) & np.isfinite(values["change"])))
        if len(lost):
            first = int(lost[0])
            raise StageError(
                f"the self-influence of training sample {values['train_ids'][first]} is "
                f"{values['self_influence'][first]}, of a change of parameters by {values['change'][first]}: its "
                "gradient in the cache is damaged, or this is beyond float32. `verify` tells which; more damping makes "
                "it smaller"
            )
        return values
