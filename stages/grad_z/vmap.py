"""Per-sample gradients of a whole batch at once, by ``torch.func.vmap`` over ``grad``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from stages.batch import split
from stages.grad_z.technique import Values
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch


def gradients(function: ModelFunction, values: Values, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient (B, D) and value (B,), every sample computed as a batch of its own.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    tensors, join = split(batch)

    def one(params: Parameters, *sample: Tensor) -> Tensor:
        return values(params, join([tensor.unsqueeze(0) for tensor in sample]))[0]

    per_sample = vmap(grad_and_value(one), in_dims=(None, *(0 for _ in tensors)), randomness="error")
    grads, results = per_sample(function.params, *tensors)
    with torch.no_grad():
        return function.flatten(grads), results.detach()
