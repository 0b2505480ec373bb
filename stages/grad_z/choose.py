"""Which way per-sample gradients are computed: the fast one where it is right, the plain one elsewhere."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stages.batch import only_tensors, shapes, size, take
from stages.grad_z import loop, vmap
from stages.grad_z.technique import Technique, Values
from stages.parameters import ModelFunction
from stages.stage import Batch, StageError

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference between two right ways of computing the same gradient; other dtypes 5 %."""

NOT_USERS = ("torch", "stages", "influence_pipeline")
"""Packages that a user's error did not come from."""

CAUSES = (
    "Usual causes: BatchNorm without running statistics (track_running_stats=False), a loss that averages over "
    "the batch, attention across samples, dropout that ignores eval()."
)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest magnitude, among the finite entries.

    Infinite where the two are not finite at the same places: a sample that is NaN is for others to report, a
    sample that is NaN in one of two ways of computing it is a difference.
    """
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return float("inf")
    found, expected = found[finite], expected[finite]
    if not len(found):
        return 0.0
    largest = max(float(expected.abs().max()), float(found.abs().max()))
    return float((found - expected).abs().max()) / largest if largest else 0.0


def describe(error: Exception) -> str:
    """Return an error's type and text, with the line of the user's code that it came from."""
    steps = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in steps]
    frames = zip(names, traceback.extract_tb(error.__traceback__), strict=True)
    own = [frame for name, frame in frames if name not in NOT_USERS]
    places = "".join(f"\n  {frame.filename}, line {frame.lineno}: {frame.line}" for frame in own[-3:])
    return f"{type(error).__name__}: {error}{places}"


def refuse_memory(error: Exception) -> None:
    """Do nothing, unless an error says that there is not enough memory; torch has no type for that on the CPU.

    Raises:
        MemoryError: it does.
        OutOfMemoryError: it does, of the device.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        raise MemoryError(str(error)) from error


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say where the model or the task raised.

    Raises:
        StageError: in the place of whatever it raised.
        MemoryError: there is not enough.
        OutOfMemoryError: not on the device.
    """
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        refuse_memory(error)
        raise StageError(f"{where} the model or the task raised {describe(error)}") from error


def check_neighbours(function: ModelFunction, values: Values, batch: Batch) -> None:
    """Refuse a model whose samples influence one another: compare a batch with its samples one at a time.

    Raises:
        StageError: some sample's value depends on what else is in its batch, or cannot be computed.
        MemoryError: there is not enough.
        OutOfMemoryError: not on the device.
    """
    with torch.no_grad():
        with naming(f"on a batch of {shapes(batch)}"):
            together = values(function.params, batch)
        try:
            alone = torch.cat([values(function.params, take(batch, index)) for index in range(size(batch))])
        except StageError:
            raise
        except Exception as error:
            refuse_memory(error)
            raise StageError(
                f"in eval() mode the loss of {size(batch)} samples together can be computed, that of one alone "
                f"cannot ({type(error).__name__}: {error}). {CAUSES}"
            ) from error
    if together.shape != alone.shape:
        raise StageError(
            f"a batch of {size(batch)} samples has {len(together)} losses, its samples one at a time {len(alone)}"
        )
    difference = relative_difference(together, alone)
    if difference > TOLERANCE.get(function.coarsest, 0.05):
        raise StageError(
            f"in eval() mode a sample's loss differs by {difference:.2g} (relative) with the samples around it, "
            f"so it has no gradient of its own. {CAUSES}"
        )


def choose(function: ModelFunction, values: Values, batch: Batch) -> Technique:
    """Return ``vmap`` where it gives what the one-sample loop gives on this batch, otherwise the loop.

    Args:
        function: the model.
        values: what is differentiated.
        batch: a few samples; both ways are computed on all of them.

    Returns:
        The technique to use for every batch.

    Raises:
        StageError: the loss is not of a kind that has gradients for each sample.
    """
    with naming(f"in the gradients of a batch of {shapes(batch)}"):
        expected, _ = loop.gradients(function, values, batch)
    if not only_tensors(batch):
        log.info("gradients one sample at a time: the batch holds more than tensors")
        return loop.gradients
    try:
        found, _ = vmap.gradients(function, values, batch)
    except StageError:
        raise
    except Exception as error:  # noqa: BLE001 - vmap's refusals have many types; the loop is always right
        refuse_memory(error)
        log.info("gradients one sample at a time: vmap cannot follow this model (%s)", str(error).split("\n")[0])
        return loop.gradients
    difference = relative_difference(found, expected)
    if difference > TOLERANCE.get(function.coarsest, 0.05):
        log.warning("gradients one sample at a time: vmap differs from the loop by %.2g", difference)
        return loop.gradients
    return vmap.gradients
