"""``curvature``: what a solver prepares once for all test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.s_test.solver import Solver
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Progress, Report, Samples, Stage, silent

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.parameters import ModelFunction

SUMMARY = {
    "gradient_norm": "Euclidean norm of the training objective's gradient, zero at an optimum",
    "mean_eigenvalue": "mean eigenvalue of H",
    "largest_eigenvalue": "largest eigenvalue of H over some minibatches",
}


class Prepare(Stage):
    """Numbers, and for a dense solver the matrix H (coordinate, column) band by band."""

    name = "curvature"

    def __init__(self, solver: Solver, curvature: Curvature, band: int) -> None:
        """Lay out what ``solver`` prepares; a dense matrix in bands of ``band`` rows."""
        self.solver, self.curvature = solver, curvature
        count = len(probes(len(curvature.samples)))
        numbers: tuple[ArraySpec, ...] = (ArraySpec("probe_loss", ("probe",), (count,), about="of some samples"),)
        numbers += tuple(ArraySpec(name, (), (), "float64", about=SUMMARY[name]) for name in solver.summary_names())
        if solver.dense:
            dim = curvature.dim
            self.grid = Grid((Axis("coordinate", dim, band),))
            self.arrays = (ArraySpec("matrix", ("coordinate", "column"), (dim, dim), "float64", about="H, dense"),)
            self.merged = numbers
        else:
            self.grid = Grid((Axis("part", 1, 1),))
            self.arrays = numbers

    def held_bytes(self, vectors: int) -> int:
        """Return what products with so many vectors, and drawing or keeping these, hold at once, at most."""
        row = self.curvature.dim * self.curvature.function.dtype.itemsize
        return 6 * row * vectors + self.curvature.product_bytes

    def prepare(self, report: Report = silent) -> None:
        """Check model and training data."""
        from stages.grad_z import PerSample

        curvature = self.curvature
        PerSample(curvature.function, curvature.function.losses, curvature.samples, curvature.batch).check()

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute a band of the matrix by products with unit vectors, or the numbers."""
        import torch

        if not self.solver.dense:
            return self._numbers({}, report)
        rows = block.ids("coordinate")
        units = torch.zeros(len(rows), self.curvature.dim).to(self.curvature.l2)
        units[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
        products = self.curvature.product(units, report=report)
        report(Progress(len(rows), len(rows), "rows of H"))
        return {"matrix": products.double().cpu().numpy()}

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Compute the numbers of a dense solver."""
        return self._numbers(arrays, report) if self.solver.dense else {}

    def _numbers(self, arrays: Mapping[str, ArrayLike], report: Report) -> dict[str, Array]:
        losses = probe_losses(self.curvature.function, self.curvature.samples, probes(len(self.curvature.samples)))
        return {"probe_loss": losses, **self.solver.summary(self.curvature, arrays, report)}


def probe_losses(function: ModelFunction, samples: Samples, ids: Sequence[int]) -> Array:
    """Return the losses of some samples, float32.

    Raises:
        StageError: the model or the task raised.
    """
    import torch

    from stages.device_batch import DeviceBatch
    from stages.grad_z.choose import naming

    batch = samples.batch(ids)
    with torch.no_grad(), naming(f"at training samples {', '.join(map(str, ids))}"):
        pieces = DeviceBatch(len(ids)).pieces(batch, lambda piece: function.losses(function.params, piece))
        losses: Array = torch.cat([found for _, found in pieces]).float().cpu().numpy()
    return losses


def probes(count: int) -> list[int]:
    """Return the samples whose losses are kept, to recognise the code that they were computed with: eight at most."""
    return sorted({i * count // 8 for i in range(8)})
