"""How much work products with a batch are: counted and not timed, so that choices depend on sizes alone.

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``K`` entries of one sample's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stages.batch import size
from stages.parameters import ModelFunction
from stages.stage import Batch

TOGETHER = 2**22
"""Numbers in the largest array that is worth making at once: larger ones leave the caches, and are paged in anew each
time. Measured on networks of 650 to 42,000 parameters."""


@dataclass(frozen=True)
class Work:
    """What a backward pass from the outputs of one batch takes.

    Attributes:
        samples: B.
        outputs: K; 0 where the outputs have not one entry for each sample.
        dim: D.
        backward: operations of a backward pass for one sample.
        widest: numbers in the largest array that a backward pass needs.
    """

    samples: int
    outputs: int
    dim: int
    backward: float
    widest: int

    def jacobian_pays(self, vectors: int) -> bool:
        """Say whether GGN products take fewer operations by the Jacobian: K backward passes and two matrix products.

        The other way, a product of one vector takes as much as two backward passes.
        """
        by_jacobian = self.outputs * (self.backward + 4 * self.dim * vectors)
        return 0 < by_jacobian < 2 * self.backward * vectors

    @property
    def vectors_together(self) -> int:
        """How many vectors to multiply at once, where each needs arrays of its own for the whole batch."""
        return max(1, TOGETHER // max(self.dim, self.widest))

    @property
    def samples_together(self) -> int:
        """Of how many samples to have the Jacobian at once."""
        return max(1, TOGETHER // (self.outputs * self.dim))


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
    return Work(samples, per_sample, function.size, counter.get_total_flops() / samples, widest)
