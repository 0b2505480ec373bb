"""Parameters: select them, flatten and unflatten them, and the model as a function of them.

Shapes: ``D`` coordinates (see :mod:`stages.coordinates`), ``B`` samples in a batch.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.coordinates import entries, projected
from stages.draws import Draws
from stages.projection import Projection
from stages.stage import Batch, StageError

Parameters = dict[str, Tensor]


class TaskLike(Protocol):
    """What is learnt, in two steps, so that curvature can see the outputs."""

    l2: float | dict[str, float]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the loss is a function of, (B, …)."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of each sample, (B,)."""

    def measurements(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return what influence is asked about, for each sample, (B,)."""

    def sample(self, outputs: Tensor, batch: Batch, generator: Draws) -> Batch:
        """Return the batch with targets drawn from the model's own distribution."""

    def sampled_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return losses of such targets, (B,), of which the second moments of gradients are the Hessian of losses."""

    def labels(self, batch: Batch) -> Tensor | None:
        """Return each sample's label as a number, (B,), or None where there is none."""

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """Return whether each sample's prediction is right, (B,), or None where nothing is predicted."""


def select(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters whose names match any glob, in the model's order; tied ones once.

    Raises:
        StageError: a glob matches no parameter, or nothing is left that requires a gradient.
    """
    named = dict(model.named_parameters())
    for glob in globs:
        if not fnmatch.filter(named, glob):
            raise StageError(f"parameters: {glob!r} matches no parameter of the model; it has {', '.join(named)}")
    chosen = {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad and any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    }
    if not chosen:
        raise StageError(f"parameters: none of {', '.join(named)} is matched by {list(globs)} and requires a gradient")
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise StageError(
                f"parameters: {name} is of {parameter.dtype}, which is not real: leave it out of the globs"
            )
    if not any(parameter.numel() for parameter in chosen.values()):
        raise StageError(f"parameters: {', '.join(chosen)} have no entries at all")
    return chosen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into ``eval()`` mode, and back into the mode that it had.

    Meanwhile everything is done by plain operations that can be differentiated twice: attention by the plain kernel,
    PyTorch's transformer layers without their inference path, recurrent layers without cuDNN, and what was compiled
    as it was before. A reentrant checkpoint, which drops gradients, is an error.
    """
    modes = {module: module.training for module in model.modules()}
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    fastpath, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), _uncompiled():
            torch.backends.mha.set_fastpath_enabled(False)
            torch.backends.cudnn.enabled = cudnn and not recurrent
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.cudnn.enabled = cudnn
        for module, training in modes.items():
            module.training = training


def _uncompiled() -> AbstractContextManager[object]:
    """Have what ``torch.compile`` made run as it was before; its compiler is not loaded for that."""
    stance = getattr(torch.compiler, "set_stance", None)  # not before torch 2.6
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()


class _Outputs(nn.Module):
    """A model with its task, so that ``functional_call`` reaches whatever the task does with the model."""

    def __init__(self, model: nn.Module, task: TaskLike) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> Tensor:
        outputs = self.task.outputs(self.model, batch)
        if not isinstance(outputs, Tensor):
            named = list(outputs) if isinstance(outputs, Mapping) else []
            entries = f" of {', '.join(map(str, named))}" if named else ""
            which = repr(named[0]) if named else "0"
            raise StageError(
                f"Task.outputs must return a tensor, got {type(outputs).__name__}{entries}: write a Task whose "
                "`outputs(self, model, batch)` picks the tensor that the loss is computed from, as in "
                f"`return super().outputs(model, batch)[{which}]`"
            )
        return outputs


class ModelFunction:
    """A model's losses as a function of its selected parameters.

    The model itself is never changed: values are copied to the device where needed, and every call gets
    its own copy of the buffers. Run it inside :func:`evaluating`.

    Attributes:
        params: the selected parameters by name, detached, on the device.
        coordinates: of their gradients.
        dtype: of gradients and vectors, fit for all selected parameters: float32 at least.
        coarsest: the least precise dtype in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: TaskLike,
        globs: Sequence[str],
        device: torch.device,
        projection: Projection | None = None,
    ) -> None:
        """Select the parameters that match ``globs``; everything else of the model stays constant.

        Raises:
            StageError: they cannot be selected, or not be projected so.
        """
        chosen = select(model, globs)
        self.device = device
        self.task = task
        self.params: Parameters = {name: p.detach().to(device) for name, p in chosen.items()}
        self.dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.params.values()), torch.float32)
        self.coordinates = entries(self.params)
        if projection is not None:
            self.coordinates = projected(projection, self.params, self.dtype, device)
        self._module = _Outputs(model, task)
        self._constant = {n: p.detach().to(device) for n, p in model.named_parameters() if n not in chosen}
        self._buffers = {name: b.detach().to(device) for name, b in model.named_buffers()}
        self.coarsest = max(
            (t.dtype for t in self.everything if t.is_floating_point()), key=lambda d: torch.finfo(d).eps
        )

    def outputs(self, params: Parameters, batch: Batch) -> Tensor:
        """Return the outputs, (B, …)."""
        values = {**self._constant, **params, **{name: b.clone() for name, b in self._buffers.items()}}
        result: Tensor = functional_call(self._module, {f"model.{n}": v for n, v in values.items()}, (batch,))
        return result

    def losses(self, params: Parameters, batch: Batch) -> Tensor:
        """Return the training loss of each sample, (B,)."""
        return self.losses_of(self.outputs(params, batch), batch)

    def losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of each sample, (B,), given its outputs."""
        return self._each(self.task.losses(outputs, batch), "losses")

    def sample(self, outputs: Tensor, batch: Batch, draws: Draws) -> Batch:
        """Return a batch with targets drawn from the model's own distribution.

        Raises:
            StageError: the task does not say how.
        """
        if not hasattr(self.task, "sample"):
            raise StageError(
                f'fisher = "sampled" draws targets by {type(self.task).__name__}.sample(outputs, batch, generator), '
                'which is not there: write it, or use fisher = "empirical"'
            )
        return self.task.sample(outputs, batch, draws)

    def sampled_losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the losses of targets that were drawn, (B,), given the outputs."""
        return self._each(self.task.sampled_losses(outputs, batch), "sampled_losses")

    def measurements(self, params: Parameters, batch: Batch) -> Tensor:
        """Return the measurement of each sample, (B,)."""
        return self._each(self.task.measurements(self.outputs(params, batch), batch), "measurements")

    @property
    def everything(self) -> tuple[Tensor, ...]:
        """All parameters and buffers of the model, on the device."""
        return *self.params.values(), *self._constant.values(), *self._buffers.values()

    @property
    def model(self) -> nn.Module:
        """The caller's model."""
        return self._module.model

    @property
    def size(self) -> int:
        """D."""
        return self.coordinates.size

    @property
    def entries(self) -> int:
        """The number of entries of the selected parameters, which are D unless gradients are projected."""
        return sum(p.numel() for p in self.params.values())

    def part(self, names: Collection[str]) -> ModelFunction:
        """Return the function of some of the selected parameters; the others stay constant."""
        part = copy.copy(self)
        part.params = {name: p for name, p in self.params.items() if name in names}
        part.coordinates = self.coordinates.part(names)
        part._constant = {**self._constant, **{n: p for n, p in self.params.items() if n not in names}}
        return part

    @property
    def projected(self) -> bool:
        """Whether coordinates are not the entries."""
        return self.size < self.entries

    def unprojected(self) -> ModelFunction:
        """Return the same function with the parameters' entries as coordinates."""
        plain = copy.copy(self)
        plain.coordinates = entries(self.params)
        return plain

    def flatten(self, values: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Return the coordinates (…, D) of one tensor for each parameter, (…, *its shape), in ``out`` where given."""
        return self.coordinates.project(values, self.dtype, out)

    def unflatten(self, vectors: Tensor) -> Parameters:
        """Return one tensor for each parameter, (…, *its shape), of its dtype, by the transpose of ``flatten``."""
        found = self.coordinates.expand(vectors)
        return {name: found[name].to(parameter.dtype) for name, parameter in self.params.items()}

    def l2(self) -> Tensor:
        """Return the weight of the quadratic penalty on each coordinate, (D,).

        Raises:
            StageError: as for :meth:`penalties`; or they differ between parameters that share coordinates.
        """
        own = self.penalties()
        if not self.coordinates.separate and len(set(own.values())) > 1:
            raise StageError(
                "l2 differs between parameters that are projected to the same coordinates: "
                'give one l2 for all, or use projection = { kind = "kronecker", … }'
            )
        found_D = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for name, columns in self.coordinates.columns.items():
            found_D[columns] = own[name]
        return found_D

    def penalties(self) -> dict[str, float]:
        """Return the weight of the quadratic penalty on each selected parameter.

        Raises:
            StageError: the task's ``l2`` is no weight, or a glob of it matches no parameter of the model.
        """
        weights = self.task.l2
        if not isinstance(weights, Mapping):
            weights = {"*": weights}
        most = torch.finfo(self.dtype).max
        for glob, weight in weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not isinstance(glob, str) or not number or not 0 <= weight <= most:
                raise StageError(
                    "l2 must be a finite number of at least 0 (or one for each glob), and at most "
                    f"{most:.2g} for {self.dtype}, got {weight!r} for {glob!r}"
                )
        everything = [*self.params, *self._constant]
        for glob in weights:
            if not fnmatch.filter(everything, glob):
                raise StageError(f"l2: {glob!r} matches no parameter of the model; it has {', '.join(everything)}")
        return {n: next((w for g, w in weights.items() if fnmatch.fnmatchcase(n, g)), 0.0) for n in self.params}

    @staticmethod
    def _each(values: Any, what: str) -> Tensor:
        if not isinstance(values, Tensor) or values.ndim != 1:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise StageError(
                f"Task.{what} must return one number for each sample, shape (B,), got {shape}: "
                'compute it with reduction="none" and average over everything but the batch'
            )
        if not values.is_floating_point():
            raise StageError(f"Task.{what} must return real numbers, which have a gradient, got {values.dtype}")
        return values
