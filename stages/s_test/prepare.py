"""What most solvers prepare: sums over parts of the training set, and what comes of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.s_test.preparation import Preparation
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Report, Samples, silent

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.parameters import ModelFunction
    from stages.s_test.solver import Prepared, Solver


class Prepare(Preparation):
    """Numbers that come of sums over the training set, or the matrix H (coordinate, column).

    Each block has the sums over its part of the training set. They are added up in the order of the blocks, so that
    it is the same who computed which.
    """

    def __init__(self, solver: Solver, curvature: Curvature, parts: int, prepared: Prepared) -> None:
        """Lay out what ``solver`` prepares.

        Args:
            solver: whose preparation it is.
            curvature: over the training set.
            parts: into which the training set is cut.
            prepared: what the solver's :meth:`~stages.s_test.solver.Solver.first` prepared.
        """
        self.solver, self.curvature, self.prepared = solver, curvature, prepared
        count, dims = len(probes(len(curvature.samples))), solver.summary_dims(curvature.function)
        self.grid = Grid((Axis("part", parts, 1),))
        self.arrays = tuple(
            ArraySpec(
                name,
                ("part", *(f"{name}_{'row' if i < len(shape) - 1 else 'entry'}" for i in range(len(shape)))),
                (parts, *shape),
                "float64",
                about=solver.about[name],
            )
            for name, shape in solver.sum_shapes(curvature.function).items()
        )
        self.merged = (ArraySpec("probe_loss", ("probe",), (count,), about="of some samples"),)
        for name in solver.summary_names():
            of = dims.get(name, {})
            self.merged += (ArraySpec(name, tuple(of), tuple(of.values()), "float64", about=solver.about[name]),)

    @property
    def needed(self) -> tuple[str, ...]:
        """What comes of the sums."""
        return self.solver.summary_names()

    @property
    def passes(self) -> str:
        """What is summed."""
        return self.solver.summed(self.curvature.function)

    @property
    def held_bytes(self) -> int:
        """What the sums over a part take at once, at most, or adding them up; or looking at samples before."""
        from stages.grad_z.choose import choosing_bytes

        row = self.curvature.dim * self.curvature.function.dtype.itemsize
        summing = row * self.solver.preparing_vectors(self.curvature) + self.solver.summing_bytes(self.curvature)
        return max(summing, choosing_bytes(self.curvature.function))

    def prepare(self, report: Report = silent) -> None:
        """Check model and training data."""
        self.curvature.per_sample.check()

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute the sums over a part of the training set."""
        found = self.solver.sums(self.curvature, self.part(block), self.prepared, report)
        return {name: values[np.newaxis] for name, values in found.items()}

    def part(self, block: Block) -> range:
        """Return the training samples that a block has the sums over."""
        (number,), blocks, count = block.index, len(self.grid), len(self.curvature.samples)
        return range(number * count // blocks, (number + 1) * count // blocks)

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Compute the numbers."""
        sums = {name: self._added_up(arrays[name]) for name in self.solver.sum_shapes(self.curvature.function)}
        losses = probe_losses(self.curvature.function, self.curvature.samples, probes(len(self.curvature.samples)))
        return {"probe_loss": losses, **self.solver.summary(self.curvature, {**self.prepared, **sums}, report)}

    def _added_up(self, parts: ArrayLike) -> Array:
        """Add up the sums over all parts, in their order, one after the other: each may take much memory."""
        total: Array = np.array(parts[:1][0])
        for number in range(1, len(self.grid)):
            total += parts[number : number + 1][0]
        return total


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
