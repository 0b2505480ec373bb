"""How much work products with a batch are: counted and not timed, so that choices depend on sizes alone.

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``K`` entries of one sample's outputs.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.batch import size
from stages.device_batch import DeviceBatch
from stages.grad_z.hooks import formed
from stages.parameters import ModelFunction, evaluating
from stages.stage import Batch, Samples

log = logging.getLogger(__name__)

TOGETHER = 2**22
"""Numbers in the largest array that is worth making at once: larger ones leave the caches, and are paged in anew each
time. Measured on networks of 650 to 42,000 parameters."""
ARRAYS = {"ggn": 9, "hessian": 12}
"""How many arrays of that size products with a curvature hold at once, at most; measured."""
KEPT = {"gradients": 5, "ggn": 4, "hessian": 6}
"""How many times as much as a forward pass saves is held at once, at most; measured. That is the gradients of it, too,
what the heap keeps of arrays below 32 MiB, up to as much as is in use, and what a linearisation saves."""
FEW = 4
"""Samples of which the work is counted before there is a batch."""


@dataclass(frozen=True)
class Work:
    """What a backward pass from the outputs of one batch takes.

    Attributes:
        samples: B.
        outputs: K; 0 where the outputs have not one entry for each sample.
        dim: D.
        entries: of the parameters.
        formed: entries of one gradient, or part of it, that are formed at once: D at least.
        backward: operations of a backward pass for one sample, of its matrix products and convolutions.
        widest: numbers in the largest array that a backward pass needs, parameters aside.
        saved: bytes that a forward pass saves of one sample for the backward pass, parameters aside.
    """

    samples: int
    outputs: int
    dim: int
    entries: int
    formed: int
    backward: float
    widest: int
    saved: int = 0

    def jacobian_pays(self, vectors: int, together: int) -> bool:
        """Say whether GGN products take fewer operations by the Jacobian: K backward passes and two matrix products.

        The other way, a product of one vector takes as much as two backward passes. One sample's Jacobian, and what
        making it takes, must not be larger than an array of ``together`` numbers, or than the vectors.
        """
        by_jacobian = self.outputs * (self.backward + 4 * self.dim * vectors)
        fits = self.one_jacobian <= max(together, self.dim * vectors // 3)
        return 0 < by_jacobian < 2 * self.backward * vectors and fits

    def kept_jacobian_pays(self, together: int) -> bool:
        """Say whether GGN products take fewer operations by a Jacobian that is there, for however many vectors."""
        return 2 * self.outputs * self.dim < self.backward and self.jacobian_fits(together)

    def jacobian_fits(self, together: int) -> bool:
        """Say whether one sample's Jacobian, and what making it takes, is no larger than ``together`` numbers."""
        return 0 < self.one_jacobian <= together

    def vectors_together(self, together: int) -> int:
        """How many vectors to multiply at once, where each needs arrays of its own for the whole batch."""
        return max(1, together // max(self.entries, self.widest))

    def samples_together(self, together: int) -> int:
        """Of how many samples to have the Jacobian at once."""
        return max(1, together // self.one_jacobian)

    def kept(self, kind: str, device: torch.device) -> int:
        """Return how many bytes are kept in memory for each sample of a batch; on a GPU they are the device's."""
        return KEPT[kind] * self.saved if device.type == "cpu" else 0

    def on_device(self, kind: str, itemsize: int) -> int:
        """Return how many bytes each sample of a batch takes on the device, at most."""
        own = 2 * self.formed if kind == "gradients" else ARRAYS[kind] * self.widest // self.samples
        return own * itemsize + KEPT[kind] * self.saved

    @property
    def one_jacobian(self) -> int:
        """Numbers in the largest array that one sample's Jacobian takes."""
        return self.outputs * max(self.formed, self.widest // self.samples)


def together(dim: int, kind: str, memory_bytes: int, itemsize: int) -> int:
    """Return how many numbers an array may hold: one vector at least, and all such arrays a quarter of the memory."""
    return max(dim, min(TOGETHER, memory_bytes // (4 * ARRAYS[kind] * itemsize)))


def count(function: ModelFunction, batch: Batch) -> Work:
    """Count the work of a batch by one forward pass."""
    known = {parameter.untyped_storage().data_ptr() for parameter in function.everything}
    widest, held, operations = 0, dict[int, int](), 0

    def saved(tensor: Tensor) -> Tensor:
        nonlocal widest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            widest = max(widest, tensor.numel())
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal operations
        operations += _backward(module, args, output)

    leaves = {name: parameter.detach().requires_grad_() for name, parameter in function.params.items()}
    with ExitStack() as hooks:
        for module in function.model.modules():
            hooks.callback(module.register_forward_hook(called).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor))
        outputs = function.outputs(leaves, batch)
    samples = size(batch)
    per_sample = outputs.numel() // samples if outputs.ndim and len(outputs) == samples else 0
    backward, each = operations / samples, math.ceil(sum(held.values()) / samples)
    return Work(samples, per_sample, function.size, function.entries, formed(function), backward, widest, each)


def _backward(module: nn.Module, args: tuple[Any, ...], output: Any) -> int:
    """Return the operations of a backward pass through one call of a module, by the weights that it has itself.

    A weight takes two for each entry and position, and two for the gradient of what went in. (PyTorch's own counter
    gives the same for linear layers and convolutions, and takes a second to load.)
    """
    if not isinstance(output, Tensor) or not output.requires_grad:
        return 0
    inputs = next((one for one in args if isinstance(one, Tensor)), output)
    if not inputs.is_floating_point():  # a table is looked up
        return 0
    found = 0
    for weight in module.parameters(recurse=False):
        if weight.ndim > 1:
            outer = next((n for n in weight.shape if n in (output.shape[-1], *output.shape[1:2])), weight.shape[0])
            positions = output.numel() // outer
            found += 2 * positions * weight.numel() * (bool(weight.requires_grad) + bool(inputs.requires_grad))
    return found


def of_samples(function: ModelFunction, samples: Samples) -> Work:
    """Count the work of the first samples of a data set; none where the model raises, which stages say better.

    Raises:
        MemoryError: they do not fit, one at a time.
    """
    batch = samples.batch(range(min(FEW, len(samples))))
    try:
        with evaluating(function.model):
            return next(DeviceBatch(FEW).pieces(batch, lambda piece: count(function, piece)))[1]
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model raises
        log.info("what a batch keeps is not known: the model raised %s", type(error).__name__)
        return Work(1, 0, function.size, function.entries, function.entries, 0.0, 0)
