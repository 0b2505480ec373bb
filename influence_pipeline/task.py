"""Tasks: what a model is trained on, in two steps, so that curvature can see the outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from influence_pipeline.errors import RequestError
from stages.draws import Draws

LABEL_KEYS = ("labels", "label", "targets", "target")
"""Where a batch that is a mapping has its targets."""
_IGNORED = -100  # as in torch's cross_entropy


def targets_of(batch: Any) -> Any:
    """Return the targets of a batch: its second entry, or the first of ``LABEL_KEYS`` that a mapping has.

    Raises:
        RequestError: there are none.
    """
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return batch[key]
        raise RequestError(f"a batch has none of the keys {LABEL_KEYS}; it has {tuple(batch)}. Write a Task of its own")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise RequestError(
            "a batch is expected to be (inputs, targets) or a mapping with labels: write a Task of its own"
        )
    return batch[1]


def with_targets(batch: Any, targets: Tensor) -> Any:
    """Return a batch with other targets in the place of its own, or beside its inputs where it has none."""
    if isinstance(batch, Mapping):
        return {**batch, next((key for key in LABEL_KEYS if key in batch), LABEL_KEYS[0]): targets}
    if isinstance(batch, Tensor) or len(batch) < 2:
        return (batch if isinstance(batch, Tensor) else batch[0]), targets
    rest = (batch[0], targets, *batch[2:])
    return type(batch)(*rest) if hasattr(batch, "_fields") else type(batch)(rest)


class Task:
    """What is learnt and what influence is asked about. Override ``losses`` at least.

    A task is identified by the classes that define its methods, its public attributes and ``version``; raise
    ``version`` when you change what a method computes. Attributes whose name starts with ``measurement`` belong
    to the measurement alone, so that changing them keeps the training gradients.

    Attributes:
        l2: weight w of a penalty (w/2)·|θ|² beside the mean training loss, or one for each parameter glob. It
            enters the Hessian, not the gradients of single samples.
        higher_is_better: the measurement is a margin, not a loss: helpful samples are those without which it falls.
        version: of the code of this task.
        keep: entries of a mapping batch that are no tensors and that the task wants (the others are dropped).
    """

    l2: float | dict[str, float] = 0.0
    higher_is_better: bool = False
    version: int = 1
    keep: tuple[str, ...] = ()

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the loss is a function of, (B, …).

        By default ``model(batch[0])``; for a mapping, ``model(**rest)`` with the entries that are no labels. Of a
        result that has ``logits``, these.
        """
        if isinstance(batch, Mapping):
            result = model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
        else:
            result = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        logits: Tensor = getattr(result, "logits", result)
        return logits

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the training loss of each sample, (B,)."""
        raise NotImplementedError(f"{type(self).__name__}.losses(outputs, batch) -> (B,)")

    def measurements(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return what influence is asked about, for each sample, (B,); by default the loss."""
        return self.losses(outputs, batch)

    def sample(self, outputs: Tensor, batch: Any, generator: Draws) -> Any:
        """Return the batch with targets drawn from the model's own distribution, for solvers that ask for it.

        Where the loss is −log p(target | outputs), that is p; see also :meth:`sampled_losses`.

        Args:
            outputs: (B, …), without gradients.
            batch: the samples.
            generator: has random numbers of each sample's own: ``uniform(*shape)`` and ``normal(*shape)`` return
                (B, *shape).

        Raises:
            RequestError: this task does not say how.
        """
        raise RequestError(
            f'fisher = "sampled" draws targets by {type(self).__name__}.sample(outputs, batch, generator), which is '
            'not there: write it, or use fisher = "empirical"'
        )

    def sampled_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return losses of targets that were drawn, (B,): their gradients' second moments in the outputs are H's.

        That is, E[r rᵀ] of their gradients r in the outputs is the Hessian of ``losses`` there. So it is by default
        where the loss is −log p; a mean of such terms needs another weight, since the mean of n independent terms has
        second moments 1/n times its Hessian.
        """
        return self.losses(outputs, batch)

    def labels(self, batch: Any) -> Tensor | None:
        """Return each sample's label as a number, (B,), to be shown with results; None where there is none."""
        try:
            targets = targets_of(batch)
        except RequestError:
            return None
        if not isinstance(targets, Tensor):
            return None
        return targets.reshape(-1) if targets.numel() == len(targets) else None

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor | None:
        """Return what the model says of each sample, a number beside its label, (B,); None where there is none."""
        return None

    def correct(self, outputs: Tensor, batch: Any) -> Tensor | None:
        """Return whether the prediction for each sample is right, (B,); None where there is no such thing.

        By default whether it is the label, where both are whole numbers.
        """
        found, labels = self.predictions(outputs, batch), self.labels(batch)
        if found is None or labels is None or found.is_floating_point() or labels.is_floating_point():
            return None
        return found == labels

    @staticmethod
    def from_loss(loss: Callable[[Tensor, Tensor], Tensor], *, name: str, l2: float | dict[str, float] = 0.0) -> Task:
        """Make a task of a plain ``loss(outputs, targets) -> (B,)``.

        Args:
            loss: the training loss of each sample.
            name: what the task is identified by; choose another one when the loss changes.
            l2: see :class:`Task`.
        """
        return _FromLoss(loss, name, l2)

    def identity(self) -> dict[str, Any]:
        """Return what the training losses depend on: not ``l2``, not the measurement."""
        return {
            "outputs": _defined_by(self, "outputs"),
            "losses": _defined_by(self, "losses"),
            "version": plain(self.version),
            **_attributes(self, lambda name: not name.startswith("measurement")),
        }

    def sampling_identity(self) -> dict[str, Any]:
        """Return what draws depend on beyond :meth:`identity`.

        Raises:
            RequestError: this task does not say how to draw.
        """
        if type(self).sample is Task.sample:
            Task.sample(self, torch.empty(0), None, Draws(0, [], torch.device("cpu")))
        return {"sample": _defined_by(self, "sample"), "losses": _defined_by(self, "sampled_losses")}

    def measurement_identity(self) -> dict[str, Any]:
        """Return what the measurement depends on beyond :meth:`identity`."""
        measured = _defined_by(self, "measurements")
        return {
            "measurements": "losses" if measured == _defined_by(Task(), "measurements") else measured,
            **_attributes(self, lambda name: name.startswith("measurement")),
        }


class Classification(Task):
    """Cross-entropy of logits (B, classes, …); over further dimensions the mean for each sample is taken."""

    def __init__(self, l2: float | dict[str, float] = 0.0) -> None:
        """Set the weight of the quadratic penalty."""
        self.l2 = l2

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the cross-entropy of each sample, (B,)."""
        losses = functional.cross_entropy(outputs, targets_of(batch), reduction="none")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor | None:
        """Return the class of the largest logit, (B,); None for outputs of further dimensions."""
        return outputs.argmax(1) if outputs.ndim == 2 else None

    def sample(self, outputs: Tensor, batch: Any, generator: Draws) -> Any:
        """Return the batch with a class for each sample, or each of its positions, with the softmax's probability."""
        drawn, own = drawn_classes(outputs.movedim(1, -1), generator), targets_of(batch)
        if own.shape == drawn.shape:  # numbers of classes, and not probabilities
            drawn = torch.where(own == _IGNORED, _IGNORED, drawn)
        return with_targets(batch, drawn)

    def sampled_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss times √n for a mean over n positions, (B,)."""
        return self.losses(outputs, batch) * math.sqrt(outputs[0, 0].numel())


class Regression(Task):
    """Squared error, summed over the outputs of each sample; outputs and targets have equally many entries."""

    def __init__(self, l2: float | dict[str, float] = 0.0) -> None:
        """Set the weight of the quadratic penalty."""
        self.l2 = l2

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the squared error of each sample, (B,).

        Raises:
            RequestError: targets are no tensor, or outputs and targets differ in size.
        """
        targets = targets_of(batch)
        if not isinstance(targets, Tensor):
            raise RequestError(
                f"Regression: targets must be numbers, got a {type(targets).__name__} for a batch of them"
            )
        if outputs.numel() != targets.numel():
            raise RequestError(
                f"Regression: outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}: "
                "they must have equally many entries for each sample"
            )
        squares: Tensor = (outputs - targets.reshape(outputs.shape)).square()
        return squares.flatten(1).sum(1) if squares.ndim > 1 else squares

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor | None:
        """Return the output itself, (B,); None where a sample has several."""
        return outputs.reshape(-1) if outputs.numel() == len(outputs) else None

    def sample(self, outputs: Tensor, batch: Any, generator: Draws) -> Any:
        """Return the batch with targets of variance ½ around the outputs.

        The squared error is −log of that normal density, but for a constant: its Hessian in the outputs is 2, and the
        second moment of its gradient 2 (o − y) is 4 · ½.
        """
        noise = generator.normal(*outputs.shape[1:]).to(outputs.dtype)
        return with_targets(batch, (outputs + math.sqrt(0.5) * noise).reshape(targets_of(batch).shape))


class LanguageModel(Task):
    """Cross-entropy of each next token, of logits (B, S, vocabulary): the loss of a sequence of S tokens.

    A batch is a mapping as models of transformers take it, or ``input_ids`` (B, S) alone, or a tuple of them and their
    labels. Position s of the logits predicts token s + 1 of ``labels``, where -100 counts for nothing; without labels,
    of ``input_ids`` where ``attention_mask`` is 1. An entry ``token_weights`` (B, S) weighs the losses of these tokens.

    Attributes:
        reduction: "mean" over a sequence's counted tokens, by their weights, or "sum"; 0 where none counts.
    """

    def __init__(self, l2: float | dict[str, float] = 0.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        """Set the weight of the quadratic penalty, and what is made of a sequence's losses.

        Raises:
            RequestError: there is no such reduction.
        """
        if reduction not in {"mean", "sum"}:
            raise RequestError(f'LanguageModel: reduction must be "mean" or "sum", got {reduction!r}')
        self.l2 = l2
        self.reduction = reduction

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits, (B, S, vocabulary)."""
        if isinstance(batch, Mapping):
            batch = {key: value for key, value in batch.items() if key != "token_weights"}
        return super().outputs(model, batch)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sequence, (B,)."""
        each, counted = self._each(outputs, batch)
        totals = (each * counted).sum(1)
        return totals if self.reduction == "sum" else totals / _shares(counted)

    def sample(self, outputs: Tensor, batch: Any, generator: Draws) -> Any:
        """Return the batch with each next token drawn given those before it in the sequence, where one counts."""
        targets = self._targets(batch)
        drawn = drawn_classes(outputs[:, :-1], generator)
        drawn = torch.where(targets[:, 1:] == _IGNORED, _IGNORED, drawn)
        return with_targets(batch, torch.cat([targets[:, :1], drawn], dim=1))

    def sampled_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the losses with the square roots of tokens' weights in their sum, (B,)."""
        each, counted = self._each(outputs, batch)
        return (each * (counted if self.reduction == "sum" else counted / _shares(counted).unsqueeze(1)).sqrt()).sum(1)

    def _each(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each next token, and its weight, (B, S − 1).

        Raises:
            RequestError: outputs, targets and weights do not fit one another.
        """
        targets = self._targets(batch)
        weights = batch.get("token_weights") if isinstance(batch, Mapping) else None
        shapes = [tuple(tensor.shape) for tensor in (outputs, targets, *([] if weights is None else [weights]))]
        if outputs.ndim != 3 or any(shape != shapes[0][:2] for shape in shapes[1:]):
            raise RequestError(
                "LanguageModel: logits (B, S, vocabulary), targets (B, S) and token_weights (B, S) are needed, "
                f"got {', '.join(map(str, shapes))}"
            )
        targets = targets[:, 1:]
        each = functional.cross_entropy(outputs[:, :-1].transpose(1, 2), targets, reduction="none")
        return each, (targets != _IGNORED).to(each.dtype) * (1 if weights is None else weights[:, 1:].to(each.dtype))

    @staticmethod
    def _targets(batch: Any) -> Tensor:
        """Return the tokens that are to be predicted, (B, S), and -100 where none is.

        Raises:
            RequestError: the batch has no tokens.
        """
        if not isinstance(batch, Mapping):
            found = batch if isinstance(batch, Tensor) else batch[min(1, len(batch) - 1)]
        elif any(key in batch for key in LABEL_KEYS):
            found = targets_of(batch)
        elif "input_ids" in batch:
            mask = batch.get("attention_mask")
            found = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, _IGNORED)
        else:
            raise RequestError(f"LanguageModel: a batch has neither labels nor input_ids; it has {tuple(batch)}")
        targets: Tensor = found
        return targets


class _FromLoss(Task):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], name: str, l2: float | dict[str, float]) -> None:
        self._loss = loss
        self.name = name
        self.l2 = l2

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return self._loss(outputs, targets_of(batch))


def drawn_classes(logits: Tensor, generator: Draws) -> Tensor:
    """Return classes with the probabilities that logits (B, …, classes) have, (B, …)."""
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    points = generator.uniform(*logits.shape[1:-1]).unsqueeze(-1) * sums[..., -1:]
    return torch.searchsorted(sums, points).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def _shares(counted: Tensor) -> Tensor:
    """Return the sum of each sequence's weights, 1 where none counts."""
    sums = counted.sum(1)
    return torch.where(sums == 0, 1, sums)


def _defined_by(task: Task, method: str) -> str:
    """Name the class that defines a method; a file's experiment has the same name however it is loaded.

    Raises:
        AttributeError: no class does.
    """
    for kind in type(task).__mro__:
        if method in vars(kind):
            ours = kind.__module__.startswith("influence_pipeline.")
            return f"influence_pipeline.{kind.__qualname__}" if ours else kind.__qualname__
    raise AttributeError(method)


def _attributes(task: Task, wanted: Callable[[str], bool]) -> dict[str, Any]:
    ours = {"l2", "version", "higher_is_better"}
    names = {name for name in vars(task) if not name.startswith("_")}
    for kind in type(task).__mro__[:-2]:
        names |= {
            name
            for name, value in vars(kind).items()
            if not name.startswith("_") and not callable(value) and not isinstance(value, (staticmethod, property))
        }
    return {name: plain(getattr(task, name)) for name in sorted(names - ours) if wanted(name)}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it, the same one in every process.

    Raises:
        RequestError: the value has no such form.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"float {value}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        entries = [plain(entry) for entry in value]
        alike = any(all(isinstance(entry, kind) for entry in entries) for kind in ((int, float), str))
        return sorted(entries) if alike else sorted(entries, key=repr)
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
        value = value.detach().cpu().resolve_conj().resolve_neg()
        digest = hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"tensor {tuple(value.shape)} {value.dtype} {digest[:16]}"
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return f"array {value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    raise RequestError(
        f"a task's public attribute of type {type(value).__name__} cannot be part of its identity: "
        "start its name with an underscore, and tell variants apart by `version`"
    )
