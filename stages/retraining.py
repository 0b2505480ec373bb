"""Retraining: models trained anew without some samples, and what these models measure.

What influence predicts is what would be measured then, so that this is the ground truth of its evaluation.
Shapes: ``R`` retrainings, ``W`` numbers in a model's state, ``T`` test samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stages.device_batch import DeviceBatch
from stages.grad_z.choose import naming
from stages.parameters import TaskLike, evaluating
from stages.stage import (
    Array,
    ArrayLike,
    ArraySpec,
    Axis,
    Batch,
    Block,
    Grid,
    Report,
    Samples,
    Stage,
    StageError,
    silent,
)

MEASURED_TOGETHER = 256
"""Test samples on the device at once."""


class State:
    """The floating-point numbers of a model's state, parameters and buffers, as one vector (W,).

    Attributes:
        size: W.
        dtype: that holds all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take names and shapes of a model."""
        self.entries = _floating(model)
        self.size = sum(value.numel() for value in self.entries.values())
        self.dtype = "float64" if any(value.dtype == torch.float64 for value in self.entries.values()) else "float32"

    def vector(self, model: nn.Module) -> Array:
        """Return the state of a model that is like the one this was made of.

        Raises:
            StageError: it has other entries, or some that are not finite.
        """
        found = _floating(model)
        now, expected = _shapes(found), _shapes(self.entries)
        if now != expected:
            differs = sorted(now.items() ^ expected.items())
            raise StageError(
                "the retrained model is another one than the experiment's: "
                + ", ".join(f"{name} {list(shape)}" for name, shape in differs[:4])
            )
        for name, value in found.items():
            if not bool(value.isfinite().all()):
                raise StageError(f"retraining gave numbers in {name} that are not finite: did it diverge?")
        values = [value.detach().to("cpu", getattr(torch, self.dtype)).flatten() for value in found.values()]
        vector: Array = torch.cat(values).numpy()
        return vector

    def load(self, model: nn.Module, vector: Array) -> None:
        """Give a model that is like the one this was made of the state that a vector holds."""
        parts = torch.split(torch.from_numpy(vector), [value.numel() for value in self.entries.values()])
        found = _floating(model)
        with torch.no_grad():
            for part, value in zip(parts, found.values(), strict=True):
                value.copy_(part.reshape(value.shape))


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _shapes(entries: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in entries.items()}


class Retraining(Stage):
    """``weights`` (retraining, weight): the states of models trained without some samples."""

    name = "retrained"

    def __init__(
        self,
        retrain: Callable[[Sequence[int], int], nn.Module],
        left_out: Callable[[int], Sequence[int]],
        count: int,
        seed: int,
        state: State,
    ) -> None:
        """Lay out one block for each retraining.

        Args:
            retrain: returns the model trained without some samples, with a seed.
            left_out: gives the positions of the samples that a retraining does without.
            count: of retrainings.
            seed: of all of these.
            state: of the model.
        """
        self.retrain, self.left_out, self.seed, self.state = retrain, left_out, seed, state
        self.grid = Grid((Axis("retraining", count, 1),))
        about = "state of each model, its floating-point entries in their order"
        self.arrays = (ArraySpec("weights", ("retraining", "weight"), (count, state.size), state.dtype, about=about),)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Train one model; PyTorch's random numbers are those of the seed, and go on as before afterwards."""
        (number,) = block.ids("retraining")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self.retrain(self.left_out(number), self.seed)
        return {"weights": self.state.vector(model)[np.newaxis]}


class Measuring(Stage):
    """``measurement`` and ``correct`` (retraining, test): what retrained models give for a test set."""

    name = "measured"

    def __init__(
        self,
        weights: ArrayLike,
        model: nn.Module,
        task: TaskLike,
        samples: Samples,
        device: torch.device,
        count: int,
    ) -> None:
        """Lay out one block for each retraining.

        Args:
            weights: (R, W), see :class:`Retraining`.
            model: that these are the states of; it stays as it is.
            task: what is measured.
            samples: the test set.
            device: where models are computed.
            count: of retrainings.
        """
        self.weights, self.task, self.samples, self.device = weights, task, samples, device
        self.model, self.state = model, State(model)
        self._copy: nn.Module | None = None
        self._batch = DeviceBatch(MEASURED_TOGETHER)
        self.grid = Grid((Axis("retraining", count, 1),))
        shape = ("retraining", "test"), (count, len(samples))
        self.arrays = (
            ArraySpec("measurement", *shape, "float64", about="what influence is asked about, after retraining"),
            ArraySpec("correct", *shape, about="1 where the prediction is right, 0 where not, NaN where unknown"),
        )

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Measure one model at all test samples.

        Raises:
            StageError: measurements are not finite, or the model or the task raised.
        """
        if self._copy is None:
            self._copy = copy.deepcopy(self.model).to(self.device)
        (number,) = block.ids("retraining")
        self.state.load(self._copy, np.asarray(self.weights[number : number + 1, :])[0])
        found: list[tuple[Tensor, Tensor]] = []
        ids = range(len(self.samples))
        with torch.no_grad(), evaluating(self._copy), naming(f"at test samples, retraining {number}"):
            for batch in self.samples.batches(ids, MEASURED_TOGETHER):
                found += [values for _, values in self._batch.pieces(batch, self._measure)]
        measured, right = (torch.cat(values).cpu().numpy()[np.newaxis] for values in zip(*found, strict=True))
        if not np.isfinite(measured).all():
            raise StageError(f"measurements after retraining {number} are not finite: did it diverge?")
        return {"measurement": measured, "correct": right}

    def _measure(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._copy is not None
        outputs = self.task.outputs(self._copy, batch)
        values = self.task.measurements(outputs, batch).double()
        right = self.task.correct(outputs, batch)
        return values, torch.full_like(values, torch.nan).float() if right is None else right.float()
