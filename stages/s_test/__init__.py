"""``s_test``: inverse-Hessian-vector products S (T, D), row t = (H + λI)⁻¹ ∇M(z_t).

Each solver is one file of this folder with one subclass of :class:`~stages.s_test.solver.Solver`; a new file is
found by itself. None imports PyTorch before it computes, so that settings are read at once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

import numpy as np

from stages.s_test.solver import Prepared, Solve, Solver
from stages.stage import Array, ArraySpec, Axis, Block, Grid, Report, Samples, Stage, silent

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.device_batch import DeviceBatch


def solvers() -> dict[str, type[Solver]]:
    """Return the settings class of every solver, by the solver's name."""
    found: dict[str, type[Solver]] = {}
    for module in pkgutil.iter_modules(__path__):
        for _, kind in inspect.getmembers(importlib.import_module(f"{__name__}.{module.name}"), inspect.isclass):
            if issubclass(kind, Solver) and isinstance(kind.model_fields["solver"].default, str):
                found[kind.model_fields["solver"].default] = kind
    return found


class STest(Stage):
    """Solutions for one test set: ``vectors`` (test, coordinate), with their evidence."""

    name = "s_test"

    def __init__(
        self,
        solver: Solver,
        curvature: Curvature,
        prepared: Prepared,
        samples: Samples,
        block_rows: int,
        batch: DeviceBatch,
        memory_bytes: int,
    ) -> None:
        """Lay out the solutions for ``samples`` in blocks of ``block_rows``.

        Raises:
            StageError: the problem does not fit the solver or the memory.
        """
        from stages.grad_z import PerSample

        function = curvature.function
        solver.check_size(function, memory_bytes)
        solver.check_samples(len(curvature.samples))
        self.solver, self.curvature, self.prepared = solver, curvature, prepared
        self.per_sample = PerSample(function, function.measurements, samples, batch)
        self.memory_bytes = memory_bytes
        self._solve: Solve | None = None
        count = len(samples)
        self.grid = Grid((Axis("test", count, block_rows),))
        per_test = ("test",), (count,)
        self.arrays = (
            ArraySpec("vectors", ("test", "coordinate"), (count, function.size), about="(H + λI)⁻¹ ∇M of each sample"),
            ArraySpec("residual", *per_test, "float64", about="|v − (H + λI) x| / |v|"),
            ArraySpec("iterations", *per_test, "int64", about="products with the curvature, 0 for direct solvers"),
            ArraySpec("measurement", *per_test, about="what influence is asked about, at each test sample"),
            ArraySpec("label", *per_test, "float64", about="label of each test sample, NaN where it has none"),
            ArraySpec("damping", *per_test, "float64", about="λ, absolute"),
            ArraySpec(
                "batch",
                ("test_block", "use"),
                (*self.grid.shape, 2),
                "int64",
                about="samples that were computed together: for gradients of measurements, for products",
            ),
        )

    @functools.cached_property
    def _fixed_bytes(self) -> int:
        """The block's solutions so far; and what products take, or before them the gradients of a batch."""
        solutions = 4 * self.curvature.dim * min(self.grid.axes[0].band, self.grid.axes[0].length)
        few, function = self.curvature.few, self.curvature.function
        gradients = 2 * few.formed * function.dtype.itemsize + few.kept("gradients", function.device)
        products = self.solver.fixed_bytes(self.curvature)
        return solutions + max(products, gradients * self.per_sample.batch.size)

    @functools.cached_property
    def rows_at_once(self) -> int:
        """Test samples that are solved for together."""
        return self.solver.rows_within(self.curvature, self.memory_bytes, self._fixed_bytes)

    def held_bytes(self, rows: int) -> int:
        """Return what solving for some test samples holds at once, at most, or looking at them before."""
        from stages.grad_z.choose import choosing_bytes

        solving = self._fixed_bytes + self.solver.row_bytes(self.curvature) * rows
        return max(solving, choosing_bytes(self.curvature.function))

    def prepare(self, report: Report = silent) -> None:
        """Check model and test data."""
        self.per_sample.check()

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Solve for one band of test samples."""
        import torch

        from stages.grad_z import labels

        if self._solve is None:
            self._solve = self.solver.start(self.curvature, self.prepared)
        ids = block.ids("test")
        found: dict[str, list[Array]] = {spec.name: [] for spec in self.arrays}
        for start in range(0, len(ids), self.rows_at_once):
            rhs, values = [], []
            for rows in self.per_sample.rows(ids[start : start + self.rows_at_once]):
                rhs.append(rows.grads)
                values.append(rows.values)
                found["label"].append(labels(self.curvature.function, rows.batch, len(rows.grads)))
            rhs_TD = torch.cat(rhs)
            rhs.clear()
            solution = self._solve(rhs_TD, report)
            found["vectors"].append(solution.vectors.to("cpu", torch.float32).numpy())
            found["residual"].append(solution.residual.cpu().numpy())
            found["iterations"].append(solution.iterations.cpu().numpy())
            found["measurement"].append(torch.cat(values).to("cpu", torch.float32).numpy())
            found["damping"].append(np.full(len(solution.residual), self.solver.resolved(self.prepared)))
        found["batch"].append(np.array([[self.per_sample.batch.size, self.curvature.batch.size]]))
        return {name: np.concatenate(parts) for name, parts in found.items()}
