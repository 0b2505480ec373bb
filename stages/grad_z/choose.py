"""Which way per-sample gradients are computed: the fast one where it is right, the plain one elsewhere."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from stages.batch import only_tensors, part, shapes, size, take
from stages.device_batch import refuse_memory
from stages.grad_z import hooks, loop, vmap
from stages.grad_z.technique import Technique, Values
from stages.parameters import ModelFunction
from stages.stage import Batch, StageError

log = logging.getLogger(__name__)

T = TypeVar("T")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference between two right ways of computing the same gradient; other dtypes 5 %."""

PROBES = 8
"""Samples on which two ways to the same gradients are compared: at most, and fewer where these have more than
``PROBE_ENTRIES``, down to two."""
PROBE_ENTRIES = 2**24
FALLBACK = 2**22
"""Entries up to which ``vmap`` is looked at, too, where layer hooks do everything: a batch that they cannot follow is
seldom, and copies of so many parameters for each sample gain little."""
AT_ONCE = 2**20
"""Entries that are compared at once."""

MOST = 0.5
"""Share of the coordinates that layer hooks must follow to be worth a second pass for the rest."""

SECOND_PASS = 100_000
"""Coordinates from which hooks, with ``vmap`` for some parameters, are used where ``vmap`` can do all.

Measured, they are 0.7 to 0.95 times as fast as ``vmap`` on models of 38,000 to 65,000 coordinates, and 0.8 to 2
times on those of 130,000 to 1,000,000; with the loop for the rest they are faster than the loop on all of them.
"""

NOT_USERS = ("torch", "stages", "influence_pipeline")
"""Packages that a user's error did not come from."""

CAUSES = (
    "Usual causes: BatchNorm without running statistics (track_running_stats=False), a loss that averages over "
    "the batch, attention across samples, an `if` on values of the whole batch, dropout that ignores eval()."
)

_CHECKPOINT = (
    "a layer is checkpointed, which saves memory only: call it without torch.utils.checkpoint "
    "(model.gradient_checkpointing_disable() for a model of transformers)"
)
ADVICE = {
    "saved tensor hooks": _CHECKPOINT,
    "None of the inputs have requires_grad": _CHECKPOINT,
    "torch.utils.checkpoint": _CHECKPOINT,
    "call Tensor.requires_grad_()": (
        "something calls requires_grad_() in the forward pass, as a model of transformers does that is set up to save "
        "memory: model.gradient_checkpointing_disable() and model.disable_input_require_grads()"
    ),
    "setup_context": (
        "an autograd.Function of the model is not made for torch.func: give it a setup_context, and a backward of "
        "differentiable operations"
    ),
    "data-dependent control flow": (
        "the model asks for the value of a tensor (an `if`, or .item()): use torch.where there; "
        'a decoder of transformers does without, made with attn_implementation="eager"'
    ),
    "_scaled_dot_product": (
        "fused attention has no second derivative: leave the choice of its kernel (sdpa_kernel) out of the model"
    ),
    "vmap: called random operation": "the model draws random numbers in eval() mode: give F.dropout its `training`",
}
"""What is wrong with a model and the change that mends it, by a part of what torch says."""


def relative_difference(found: Tensor, expected: Tensor, largest: float = 0.0) -> float:
    """Return the largest absolute difference over the largest magnitude (at least ``largest``) of finite entries.

    Infinite where the two are not finite at the same places: a sample that is NaN is for others to report, a
    sample that is NaN in one of two ways of computing it is a difference.
    """
    if found.shape != expected.shape:
        return float("inf")
    difference = 0.0
    for one, right in zip(_few_columns(found), _few_columns(expected), strict=True):
        finite = torch.isfinite(right)
        if not torch.equal(torch.isfinite(one), finite):
            return float("inf")
        if not finite.all():
            one, right = one[finite], right[finite]
        if one.numel():
            largest = max(largest, float(right.abs().max()), float(one.abs().max()))
            difference = max(difference, float((one - right).abs().max()))
    return difference / largest if largest else 0.0


def _few_columns(values: Tensor) -> tuple[Tensor, ...]:
    """Cut an array into parts of its last dimension, so that little is held of what is computed of each."""
    width = values.shape[-1]
    return torch.split(values, max(1, AT_ONCE * width // max(1, values.numel())), dim=-1)


def _largest(values: Tensor) -> float:
    """Return the largest magnitude of finite entries."""
    return max(float(torch.where(torch.isfinite(few), few, 0).abs().max()) for few in _few_columns(values))


def advice(error: Exception) -> str:
    """Return what is to be changed in a model that raised this; nothing where that is not known."""
    return next((change for part, change in ADVICE.items() if part in str(error)), "")


def describe(error: Exception) -> str:
    """Return an error's type and text, with the lines of the user's code that it came from and what would mend it."""
    places = [f"  {frame.filename}, line {frame.lineno}: {frame.line}" for frame in _own(error)[-3:]]
    return "\n".join(filter(None, [f"{type(error).__name__}: {error}", *places, advice(error)]))


def reason(error: Exception) -> str:
    """Return why a model cannot be followed, in a line: what would mend it, or what torch says; and where."""
    places = "".join(f", at {frame.filename}, line {frame.lineno}: {frame.line}" for frame in _own(error)[-1:])
    return (advice(error) or str(error).partition("\n")[0] or type(error).__name__) + places


def _own(error: Exception) -> list[traceback.FrameSummary]:
    steps = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in steps]
    frames = zip(names, traceback.extract_tb(error.__traceback__), strict=True)
    return [frame for name, frame in frames if name not in NOT_USERS]


def tolerance(function: ModelFunction, values: Values, batch: Batch) -> float:
    """Return the largest relative difference between right ways: by the coarsest dtype of model or computation.

    Autocast computes in another dtype than that of the parameters, which is seen by what is kept for the backward pass.
    """
    found = {function.coarsest}

    def saved(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.add(tensor.dtype)
        return tensor

    params = {name: parameter.detach().requires_grad_() for name, parameter in function.params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        values(params, batch)
    return max(TOLERANCE.get(dtype, 0.05) for dtype in found)


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
        causes = _causes(function)
        try:
            alone = torch.cat([values(function.params, take(batch, index)) for index in range(size(batch))])
        except StageError:
            raise
        except Exception as error:
            refuse_memory(error)
            raise StageError(
                f"in eval() mode the loss of {size(batch)} samples together can be computed, that of one alone "
                f"cannot ({type(error).__name__}: {error}). {causes}"
            ) from error
    if together.shape != alone.shape:
        raise StageError(
            f"a batch of {size(batch)} samples has {len(together)} losses, its samples one at a time {len(alone)}"
        )
    difference = relative_difference(together, alone)
    if difference > tolerance(function, values, batch):
        raise StageError(
            f"in eval() mode a sample's loss differs by {difference:.2g} (relative) with the samples around it, "
            f"so it has no gradient of its own. {causes}"
        )


def _causes(function: ModelFunction) -> str:
    """Say why samples of this model may influence one another, and what to do about it."""
    found = [
        name
        for name, module in function.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if not found:
        return CAUSES
    return (
        f"{', '.join(found[:3])}{', …' * (len(found) > 3)} normalises over the batch, having no running statistics: "
        "train with track_running_stats=True, or with GroupNorm in its place."
    )


def compared(function: ModelFunction) -> int:
    """Return on how many samples techniques are compared."""
    return max(2, min(PROBES, PROBE_ENTRIES // function.entries))


def choosing_bytes(function: ModelFunction) -> int:
    """Return what choosing holds at once, at most: coordinates by two ways, and what is formed on the way to them.

    That is one gradient by the loop; for all samples what is projected by hooks; or two copies of all by ``vmap``.
    """
    count, entries = compared(function), function.entries
    known = {name for owner in hooks.owners(function) for name in owner.names.values()}
    by_vmap = 2 * count * entries if entries <= FALLBACK or not known >= set(function.params) else 0
    by_hooks = count * hooks.formed(function) if function.projected else 0
    return (2 * count * function.size + max(entries, by_hooks, by_vmap)) * function.dtype.itemsize


def choose(function: ModelFunction, values: Values, batch: Batch) -> Technique:
    """Return the fastest technique that gives what the one-sample loop gives on this batch.

    That is layer hooks where they follow all parameters, or most of them and a second pass for the others pays;
    otherwise ``vmap``, otherwise the loop.

    Args:
        function: the model.
        values: what is differentiated.
        batch: a few samples; all ways are computed on all of them, or the first :func:`compared`.

    Returns:
        The technique to use for every batch.

    Raises:
        StageError: the loss is not of a kind that has gradients for each sample.
    """
    found = hooked(function, values, batch)
    rest = ", ".join(name for name in function.params if name not in found.names)
    how = "by vmap" if found.other is vmap.gradients else "one sample at a time"
    few = sum(function.params[name].numel() for name in found.names) < MOST * function.entries
    if few or (rest and found.other is vmap.gradients and function.entries < SECOND_PASS):
        log.info("gradients %s: layer hooks do not follow %s", how, rest)
        return found.other
    log.info("gradients by layer hooks%s", rest and f"; {how} for {rest}")
    return found


def hooked(function: ModelFunction, values: Values, batch: Batch) -> hooks.Hooks:
    """Return layer hooks for all parameters that they follow rightly on this batch, with what does the others.

    Args:
        function: the model.
        values: what is differentiated.
        batch: a few samples.

    Raises:
        StageError: the loss is not of a kind that has gradients for each sample.
    """
    batch = part(batch, slice(0, compared(function)))
    with naming(f"in the gradients of a batch of {shapes(batch)}"):
        expected_BD, _ = loop.gradients(function, values, batch)
        most = tolerance(function, values, batch)
    names, shared = _followed(function, values, batch, expected_BD, most)
    rest = len(names) < len(function.params)
    other: Technique = loop.gradients
    if rest or function.entries <= FALLBACK:
        other = _whole(function, values, batch, expected_BD, most, logging.INFO if rest else logging.DEBUG)
    return hooks.Hooks(names, other, shared)


def _whole(
    function: ModelFunction, values: Values, batch: Batch, expected_BD: Tensor, most: float, level: int
) -> Technique:
    """Return ``vmap`` where it gives what is expected, otherwise the loop; a refusal is logged on ``level``."""
    if not only_tensors(batch):
        log.log(level, "vmap is not used: the batch holds more than tensors")
        return loop.gradients
    found_BD = _attempt("vmap", lambda: vmap.gradients(function, values, batch)[0], level)
    if found_BD is None:
        return loop.gradients
    difference = relative_difference(found_BD, expected_BD)
    if difference > most:
        log.warning("vmap is not used: vmap differs from the loop by %.2g", difference)
        return loop.gradients
    return vmap.gradients


def _followed(
    function: ModelFunction, values: Values, batch: Batch, expected_BD: Tensor, most: float
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the parameters whose gradients by layer hooks are what is expected; and those that all samples share."""
    owned = hooks.owners(function)
    known = frozenset(name for owner in owned for name in owner.names.values())
    names = _right(function, values, batch, expected_BD, known, frozenset(), most)
    tables = frozenset(name for owner in owned if owner.layer.shareable for name in owner.names.values()) - names
    shared = _right(function, values, batch, expected_BD, tables, tables, most) if tables else tables
    return names | shared, shared


def _right(
    function: ModelFunction,
    values: Values,
    batch: Batch,
    expected_BD: Tensor,
    names: frozenset[str],
    shared: frozenset[str],
    most: float,
) -> frozenset[str]:
    """Return those of ``names`` whose gradients by layer hooks are what is expected."""
    attempt = _attempt("layer hooks", lambda: hooks.gradients(function, values, batch, names, shared))
    if attempt is None:
        return frozenset()
    found_BD, _, unfit = attempt
    # Relative to the largest entry of all, since a parameter's own gradient may be nothing but rounding.
    largest = _largest(expected_BD)
    columns = function.coordinates.columns

    def agrees(name: str) -> bool:
        own = columns[name]
        return relative_difference(found_BD[:, own], expected_BD[:, own], largest) <= most

    return frozenset(name for name in names - unfit if agrees(name))


def _attempt(what: str, compute: Callable[[], T], level: int = logging.INFO) -> T | None:
    """Return a result, or nothing, with the reason in the log on ``level``, where the model cannot be followed.

    Raises:
        StageError: the task returned what has no gradients.
    """
    try:
        return compute()
    except StageError:
        raise
    except Exception as error:  # noqa: BLE001 - refusals have many types; the loop is always right
        refuse_memory(error)
        log.log(level, "%s cannot follow this model: %s", what, reason(error))
        return None
