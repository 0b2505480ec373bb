"""How much work products with a batch are: counted and not timed, so that choices depend on sizes alone.

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``K`` entries of one sample's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stages.batch import size
from stages.grad_z.hooks import formed
from stages.parameters import ModelFunction
from stages.stage import Batch

TOGETHER = 2**22
"""Numbers in the largest array that is worth making at once: larger ones leave the caches, and are paged in anew each
time. Measured on networks of 650 to 42,000 parameters."""
ARRAYS = {"ggn": 9, "hessian": 12}
"""How many arrays of that size products with a curvature hold at once, at most; measured."""


@dataclass(frozen=True)
class Work:
    """What a backward pass from the outputs of one batch takes.

    Attributes:
        samples: B.
        outputs: K; 0 where the outputs have not one entry for each sample.
        dim: D.
        entries: of the parameters.
        formed: entries of one gradient, or part of it, that are formed at once: D at least.
        backward: operations of a backward pass for one sample.
        widest: numbers in the largest array that a backward pass needs.
    """

    samples: int
    outputs: int
    dim: int
    entries: int
    formed: int
    backward: float
    widest: int

    def jacobian_pays(self, vectors: int, together: int) -> bool:
        """Say whether GGN products take fewer operations by the Jacobian: K backward passes and two matrix products.

        The other way, a product of one vector takes as much as two backward passes. One sample's Jacobian, and what
        making it takes, must not be larger than an array of ``together`` numbers, or than the vectors.
        """
        by_jacobian = self.outputs * (self.backward + 4 * self.dim * vectors)
        fits = self._one_jacobian <= max(together, self.dim * vectors // 3)
        return 0 < by_jacobian < 2 * self.backward * vectors and fits

    def kept_jacobian_pays(self, together: int) -> bool:
        """Say whether GGN products take fewer operations by a Jacobian that is there, for however many vectors."""
        return 2 * self.outputs * self.dim < self.backward and self.jacobian_fits(together)

    def jacobian_fits(self, together: int) -> bool:
        """Say whether one sample's Jacobian, and what making it takes, is no larger than ``together`` numbers."""
        return 0 < self._one_jacobian <= together

    def vectors_together(self, together: int) -> int:
        """How many vectors to multiply at once, where each needs arrays of its own for the whole batch."""
        return max(1, together // max(self.entries, self.widest))

    def samples_together(self, together: int) -> int:
        """Of how many samples to have the Jacobian at once."""
        return max(1, together // self._one_jacobian)

    @property
    def _one_jacobian(self) -> int:
        """Numbers in the largest array that one sample's Jacobian takes."""
        return self.outputs * max(self.formed, self.widest // self.samples)


def together(dim: int, kind: str, memory_bytes: int, itemsize: int) -> int:
    """Return how many numbers an array may hold: one vector at least, and all such arrays a quarter of the memory."""
    return max(dim, min(TOGETHER, memory_bytes // (4 * ARRAYS[kind] * itemsize)))


def count(function: ModelFunction, batch: Batch) -> Work:
    """Count the work of a batch by one forward and one backward pass."""
    widest = 0

    def saved(tensor: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, tensor.numel())
        return tensor

    leaves = {name: parameter.detach().requires_grad_() for name, parameter in function.params.items()}
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        outputs = function.outputs(leaves, batch)
    samples = size(batch)
    per_sample = outputs.numel() // samples if outputs.ndim and len(outputs) == samples else 0
    with FlopCounterMode(display=False) as counter:
        if outputs.requires_grad:
            torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    sizes = function.size, function.entries, formed(function)
    return Work(samples, per_sample, *sizes, counter.get_total_flops() / samples, widest)
