"""``grad_z``: the gradient of every training sample's loss (N, D).

What a coordinate is, is known here alone: today each of the D coordinates is one selected parameter's entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.batch import size
from stages.device_batch import DeviceBatch
from stages.grad_z.choose import PROBES, check_neighbours, choose, naming
from stages.grad_z.fidelity import OfEncoding, OfProjection, RoundTrip
from stages.grad_z.technique import Technique, Values
from stages.parameters import ModelFunction
from stages.stage import (
    Array,
    ArraySpec,
    Axis,
    Batch,
    Block,
    Grid,
    Progress,
    Report,
    Samples,
    Stage,
    StageError,
    silent,
)
from stages.transfer import on_host

FIDELITY = (
    "Spearman's correlation with exact products, and the share of the top 100 that is the same, in the first block "
    "(NaN elsewhere): of products of gradients"
)


class Rows(NamedTuple):
    """Per-sample gradients of one batch.

    Attributes:
        batch: the samples.
        grads: (B, D).
        values: (B,), what is differentiated.
        norms: (B,), Euclidean, of the gradients.
        beside: what else is kept of each sample, (B,), by the name of its array.
    """

    batch: Batch
    grads: Tensor
    values: Tensor
    norms: Tensor
    beside: Mapping[str, Array] = MappingProxyType({})


@dataclass
class PerSample:
    """Per-sample gradients of a loss or a measurement over a data set.

    Attributes:
        function: the model.
        values: what is differentiated, ``function.losses`` or ``function.measurements``.
        samples: the data set.
        batch: samples on the device at once.
    """

    function: ModelFunction
    values: Values
    samples: Samples
    batch: DeviceBatch
    _technique: Technique | None = None

    def check(self) -> None:
        """Refuse what has no per-sample gradients, and choose how they are computed.

        Raises:
            StageError: samples influence one another, or every gradient is zero.
        """
        ids = self.probes
        probes = DeviceBatch(len(ids))
        _, self._technique = next(probes.pieces(self.samples.batch(ids), self._chosen))
        if probes.size < len(ids):
            self.batch.size = min(self.batch.size, probes.size)
        if not self._any(ids):
            many = range(min(len(self.samples), 64))
            if not self._any(many):
                raise StageError(
                    f"every gradient is zero for all of {', '.join(self.function.params)} "
                    f"(looked at samples {ids} and the first {len(many)}): "
                    "the loss does not depend on these parameters, or the model is dead there"
                )

    @property
    def probes(self) -> list[int]:
        """The samples on which techniques are compared, spread over all."""
        last = len(self.samples) - 1
        return sorted({round(i * last / max(1, PROBES - 1)) for i in range(PROBES)})

    @property
    def technique(self) -> Technique:
        """How gradients are computed."""
        if self._technique is None:
            self.check()
        assert self._technique is not None
        return self._technique

    def _chosen(self, batch: Batch) -> Technique:
        """Choose how gradients are computed, of some samples."""
        check_neighbours(self.function, self.values, batch)
        return choose(self.function, self.values, batch)

    def _any(self, ids: Sequence[int]) -> bool:
        """Say whether some gradient of some samples is not zero."""
        found = self.batch.pieces(self.samples.batch(ids), self._gradients)
        return any(bool(grads.any()) for _, (grads, _) in found)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.technique(self.function, self.values, batch)

    def rows(self, ids: Sequence[int]) -> Iterator[Rows]:
        """Yield the gradients of samples, a batch at a time.

        Raises:
            StageError: a gradient or a value is not finite, or the model raised; the message names the samples.
        """
        if self._technique is None:
            self.check()
        start = 0

        def named(batch: Batch) -> tuple[Tensor, Tensor]:
            with naming(f"at samples {ids[start]} to {ids[start + size(batch) - 1]}"):
                return self._gradients(batch)

        with closing(self.samples.batches(ids, self.batch.size)) as batches:
            for whole in batches:
                for batch, (grads, values) in self.batch.pieces(whole, named):
                    found = refuse_infinite(grads, values, ids[start : start + len(grads)])
                    yield Rows(batch, grads, values, found)
                    start += len(grads)
                    del grads, values, found


def refuse_infinite(grads: Tensor, values: Tensor, ids: Sequence[int]) -> Tensor:
    """Refuse gradients (B, D) or values (B,) that are no numbers; return the norms (B,) of what are.

    Raises:
        StageError: with the samples.
    """
    found = norms(grads)
    good = torch.isfinite(found) & torch.isfinite(values)
    if not good.all():
        bad = [ids[int(i)] for i in torch.nonzero(~good).flatten()]
        raise StageError(
            f"the gradient is NaN or infinite for sample{'s' * (len(bad) > 1)} "
            f"{', '.join(map(str, bad[:10]))}{', …' * (len(bad) > 10)}: look at their inputs and losses "
            "(a log of zero, a division, an overflow), or leave them out of the data set"
        )
    return found


def norms(rows_BD: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, (B,); in double precision where squares are beyond single precision."""
    found: Tensor = torch.linalg.vector_norm(rows_BD, dim=1)
    if rows_BD.dtype != torch.float32 or not ((found > 1e-12) & (found < 1e12)).all():
        found = torch.linalg.vector_norm(rows_BD, dim=1, dtype=torch.float64)
    return found


class GradZ(Stage):
    """Training gradients: ``gradients`` (sample, coordinate), with each one's norm, loss and label."""

    name = "grad_z"

    def __init__(
        self,
        function: ModelFunction,
        samples: Samples,
        block_rows: int,
        encoding: str,
        batch: DeviceBatch,
        round_trip: RoundTrip | None,
        probes: int = 0,
    ) -> None:
        """Lay out the gradients of ``samples``.

        Args:
            function: the model.
            samples: the training set.
            block_rows: samples of a block.
            encoding: how gradients are kept.
            batch: samples on the device at once.
            round_trip: gives gradients as they come back from where they are kept; None where they are not, and
                nothing is measured of what that loses.
            probes: how many gradients are held, unprojected, to measure what their projection loses.
        """
        self.per_sample = PerSample(function, function.losses, samples, batch)
        self._round_trip, self._probes = round_trip, probes
        count, coordinates = len(samples), function.size
        self.grid = Grid((Axis("sample", count, block_rows),))
        self.arrays = (
            ArraySpec(
                "gradients",
                ("sample", "coordinate"),
                (count, coordinates),
                encoding=encoding,
                about="gradient of each training sample's loss",
            ),
            ArraySpec("norm", ("sample",), (count,), about="Euclidean norm of each gradient"),
            ArraySpec("loss", ("sample",), (count,), about="training loss of each sample"),
            ArraySpec("label", ("sample",), (count,), "float64", about="label of each sample, NaN where it has none"),
            ArraySpec(
                "batch", ("sample_block",), self.grid.shape, "int64", about="samples that were computed together"
            ),
        )
        of_figures = ("sample_block", "figure"), (self.grid.shape[0], 2)
        if round_trip is not None:
            self.arrays += (ArraySpec("fidelity", *of_figures, about=f"{FIDELITY} as they are kept"),)
        if round_trip is not None and function.projected:
            self.arrays += (ArraySpec("projection_fidelity", *of_figures, about=f"{FIDELITY} as they are projected"),)

    def prepare(self, report: Report = silent) -> None:
        """Check model and data, and choose the technique."""
        self.per_sample.check()

    def rows(self, ids: Sequence[int], report: Report = silent) -> Iterator[Rows]:
        """Yield what is kept of samples, a batch at a time."""
        return self.per_sample.rows(ids)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Compute the gradients of one band of samples."""
        parts = list(self.parts(block, report))
        return {
            spec.name: np.concatenate([part[spec.name] for part in parts if spec.name in part]) for spec in self.arrays
        }

    def parts(self, block: Block, report: Report = silent) -> Iterator[dict[str, Array]]:
        """Compute the gradients of one band of samples, a batch at a time."""
        ids, done = block.ids("sample"), 0
        function, figures = self.per_sample.function, {spec.name for spec in self.arrays if "figure" in spec.dims}
        kept = OfEncoding(self._round_trip) if self._round_trip and ids.start == 0 else None
        measuring = "projection_fidelity" in figures and ids.start == 0 and self._probes
        projection = OfProjection(function, self._probes, self.grid.axes[0].length) if measuring else None
        for found, copy in on_host(self.rows(ids, report), lambda rows: rows.grads):
            count, gradients = len(copy), copy.numpy()
            done += count
            if kept is not None:
                kept.take(gradients)
            if projection is not None:
                projection.take(found.batch, found.grads)
            yield {
                "gradients": gradients,
                "norm": found.norms.cpu().numpy().astype(np.float32),
                "loss": found.values.to("cpu", torch.float32).numpy(),
                "label": labels(function, found.batch, count),
                **found.beside,
            }
            report(Progress(done, len(ids), "gradients"))
        measured = {"fidelity": kept, "projection_fidelity": projection}
        unknown = np.full((1, 2), np.nan, np.float32)
        last = {name: unknown if (of := measured[name]) is None else of.figures()[None] for name in figures}
        yield {**last, "batch": np.array([self.per_sample.batch.size])}


def labels(function: ModelFunction, batch: Batch, count: int) -> Array:
    """Return each sample's label as float64, (B,), NaN where the task has no number for it.

    Raises:
        StageError: its labels are no tensor.
    """
    with naming("in Task.labels"):
        found = function.task.labels(batch)
    if found is not None and not isinstance(found, Tensor):
        raise StageError(
            f"Task.labels must return a tensor, one number for each sample, or None, got {type(found).__name__}"
        )
    if found is None or found.shape != (count,) or found.is_complex():
        return np.full(count, np.nan)
    return found.detach().to("cpu", torch.float64).numpy()


class ComputedRows:
    """Gradients as an array that is computed as it is read: the uncached way.

    ``rows(block)`` gives one block's decoded gradients; the last block is remembered, so that a reader that
    goes over its columns in tiles computes it once.
    """

    def __init__(self, stage: GradZ, rows: Callable[[Block], Array]) -> None:
        """Read the rows of ``stage`` through ``rows``."""
        self.shape = stage.arrays[0].shape
        self._axis = stage.grid.axes[0]
        self._grid = stage.grid
        self._rows = rows
        self._last: tuple[int, Array] | None = None

    def __getitem__(self, index: tuple[slice, slice]) -> Array:
        """Return rows and columns; the rows must lie within one block."""
        rows, columns = index
        position = rows.start // self._axis.band
        bounds = self._axis.bounds(position)
        assert rows.stop <= bounds.stop, "rows of several blocks asked for at once"
        if self._last is None or self._last[0] != position:
            self._last = None
            self._last = position, self._rows(self._grid.block((position,)))
        return self._last[1][rows.start - bounds.start : rows.stop - bounds.start, columns]
