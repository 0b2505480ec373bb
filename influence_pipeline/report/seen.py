"""Samples as a page shows them: read once, in order, each with its look, its label and what the model says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_pipeline.context import Context, sentinels
from influence_pipeline.errors import RequestError
from influence_pipeline.report.appearance import Appearance, Look, Problem
from influence_pipeline.samples import DataSet, shown_ids
from stages.batch import size
from stages.device_batch import DeviceBatch
from stages.grad_z import labels
from stages.grad_z.choose import naming
from stages.stage import Array, Batch, StageError

log = logging.getLogger(__name__)

TOGETHER = 256
"""Samples that are read and computed at once, where they fit."""


@dataclass(frozen=True)
class Seen:
    """Some samples of a data set; numbers are float64, NaN where there is none.

    Attributes:
        looks: what each looks like.
        labels: (n,).
        predictions: (n,) what the model says, by the task.
        right: (n,) whether that is right, 1 or 0.
        losses: (n,).
    """

    looks: list[Look]
    labels: Array
    predictions: Array
    right: Array
    losses: Array


def appearance(context: Context) -> Appearance:
    """Return how the samples of an experiment look, by a few of its training set."""
    train = context.train
    return Appearance(context.experiment.show, [train.sample(position) for position in sentinels(len(train))])


def see(
    context: Context, data: DataSet, positions: Sequence[int], ids: Array, look: Appearance, *, losses: bool
) -> Seen:
    """Read some samples and compute the model's outputs for them.

    Args:
        context: of the model.
        data: the data set.
        positions: of the samples in it.
        ids: of these samples, for what is said about them.
        look: what samples look like.
        losses: whether losses are computed, too.

    Raises:
        RequestError: the model or the task raised.
    """
    looks: list[Look] = []
    columns: dict[str, list[Array]] = {"labels": [], "predictions": [], "right": [], "losses": []}
    batches = DeviceBatch(TOGETHER)

    def compute(batch: Batch) -> dict[str, Array]:
        return _computed(context, batch, losses=losses)

    try:
        with torch.no_grad(), context.evaluating(), naming(f"for the page, at samples of {data.name!r},"):
            for samples, batch in data.read(positions, TOGETHER):
                looks += map(look, samples)
                for _, found in batches.pieces(batch, compute):
                    for name, values in found.items():
                        columns[name].append(values)
    except StageError as error:
        raise RequestError(str(error)) from error
    _tell(data.name, looks, ids)
    return Seen(looks, **{name: np.concatenate(parts) for name, parts in columns.items()})


def _computed(context: Context, batch: Batch, *, losses: bool) -> dict[str, Array]:
    """Return what the model says of a batch."""
    function, count = context.function, size(batch)
    outputs = function.outputs(function.params, batch)
    return {
        "labels": labels(function, batch, count),
        "predictions": _column(lambda: context.experiment.task.predictions(outputs, batch), count),
        "right": _column(lambda: context.experiment.task.correct(outputs, batch), count),
        "losses": _column(lambda: function.losses_of(outputs, batch) if losses else None, count),
    }


def _column(ask: Callable[[], Tensor | None], count: int) -> Array:
    """Return what there is of each sample, NaN where there is nothing; more than a number cannot be shown."""
    found = ask()
    if found is None or found.numel() != count or found.is_complex():
        return np.full(count, np.nan)
    return found.detach().reshape(-1).to("cpu", torch.float64).numpy()


def _tell(name: str, looks: Sequence[Look], ids: Array) -> None:
    """Say which samples cannot be shown, and what the first of them says."""
    wrong = [int(i) for i, found in zip(ids, looks, strict=True) if isinstance(found, Problem)]
    if wrong:
        first = next(found.text for found in looks if isinstance(found, Problem))
        log.warning("samples of %r cannot be shown: %s; %s", name, shown_ids(wrong), first)
