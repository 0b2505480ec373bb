"""``curvature``: what a solver prepares once for all test sets."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.s_test.solver import PROBES, Solver
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Progress, Report, Samples, Stage, silent

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.parameters import ModelFunction

SUMMARY = {
    "gradient_norm": "Euclidean norm of the training objective's gradient, zero at an optimum",
    "mean_eigenvalue": "mean eigenvalue of H",
    "largest_eigenvalue": "largest eigenvalue of H over some minibatches",
}
SUMS = {
    "gradient_sum": "sum of the gradients of a part of the training set",
    "probe_sum": "vᵀ Σ H_i v over a part of the training set, for random signs v",
}


class Prepare(Stage):
    """Numbers that come of sums over the training set, and for a dense solver the matrix H (coordinate, column).

    Each block has the sums over its part of the training set and, where the solver is dense, a band of H. They are
    added up in the order of the blocks, so that it is the same who computed which.
    """

    name = "curvature"

    def __init__(self, solver: Solver, curvature: Curvature, band: int, parts: int) -> None:
        """Lay out what ``solver`` prepares.

        Args:
            solver: its settings.
            curvature: over the training set.
            band: rows of H in a block, where the solver is dense.
            parts: of the training set, each a block, where it is not.
        """
        self.solver, self.curvature = solver, curvature
        dim, count = curvature.dim, len(probes(len(curvature.samples)))
        axis = Axis("coordinate", dim, band) if solver.dense else Axis("part", parts, 1)
        self.grid = Grid((axis,))
        self.arrays = tuple(
            ArraySpec(name, (f"{axis.name}_block", f"{name}_entry"), (axis.count, size), "float64", about=SUMS[name])
            for name, size in solver.sum_sizes(dim).items()
        )
        if solver.dense:
            self.arrays += (ArraySpec("matrix", ("coordinate", "column"), (dim, dim), "float64", about="H, dense"),)
        self.merged = (ArraySpec("probe_loss", ("probe",), (count,), about="of some samples"),)
        self.merged += tuple(ArraySpec(name, (), (), "float64", about=SUMMARY[name]) for name in solver.summary_names())

    @property
    def held_bytes(self) -> int:
        """What products with the vectors of a block, and drawing or keeping these, hold at once, at most."""
        row = self.curvature.dim * self.curvature.function.dtype.itemsize
        return 6 * row * (self.grid.axes[0].band if self.solver.dense else PROBES) + self.curvature.product_bytes

    def prepare(self, report: Report = silent) -> None:
        """Check model and training data."""
        from stages.grad_z import PerSample

        curvature = self.curvature
        PerSample(curvature.function, curvature.function.losses, curvature.samples, curvature.batch_size).check()

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute the sums over a part of the training set, and a band of the matrix by products with unit vectors."""
        import torch

        found = self.solver.sums(self.curvature, self.part(block), report)
        found = {name: values[np.newaxis] for name, values in found.items()}
        if not self.solver.dense:
            return found
        rows = block.ids("coordinate")
        units = torch.zeros(len(rows), self.curvature.dim).to(self.curvature.l2)
        units[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
        products = self.curvature.product(units, report=report)
        report(Progress(len(rows), len(rows), "rows of H"))
        return {**found, "matrix": products.double().cpu().numpy()}

    def part(self, block: Block) -> range:
        """Return the training samples that a block has the sums over."""
        (number,), blocks, count = block.index, len(self.grid), len(self.curvature.samples)
        return range(number * count // blocks, (number + 1) * count // blocks)

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Compute the numbers."""
        sums = {
            name: functools.reduce(np.add, (arrays[name][number] for number in range(len(self.grid))))
            for name in self.solver.sum_sizes(self.curvature.dim)
        }
        losses = probe_losses(self.curvature.function, self.curvature.samples, probes(len(self.curvature.samples)))
        return {"probe_loss": losses, **self.solver.summary(self.curvature, {**arrays, **sums}, report)}


def probe_losses(function: ModelFunction, samples: Samples, ids: Sequence[int]) -> Array:
    """Return the losses of some samples, float32.

    Raises:
        StageError: the model or the task raised.
    """
    import torch

    from stages.grad_z.choose import naming

    batch = samples.batch(ids)
    with torch.no_grad(), naming(f"at training samples {', '.join(map(str, ids))}"):
        losses: Array = function.losses(function.params, batch).float().cpu().numpy()
    return losses


def probes(count: int) -> list[int]:
    """Return the samples whose losses are kept, to recognise the code that they were computed with: eight at most."""
    return sorted({i * count // 8 for i in range(8)})
