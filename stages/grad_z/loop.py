"""Per-sample gradients one sample at a time: slow, and right for any model that autograd can take."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.batch import size, take
from stages.grad_z.technique import Values
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch


def gradients(function: ModelFunction, values: Values, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient (B, D) and value (B,); a parameter that a sample does not use gets zeros."""
    results: list[Tensor] = []
    rows_BD = torch.empty(size(batch), function.size, dtype=function.dtype, device=function.device)
    for index, row_D in enumerate(rows_BD):
        found, value = gradient(function, values, take(batch, index))
        function.flatten(found, out=row_D)
        results.append(value)
        del found
    return rows_BD, torch.stack(results)


def gradient(function: ModelFunction, values: Values, sample: Batch) -> tuple[Parameters, Tensor]:
    """Return the gradient of one sample in each parameter, of its shape and dtype, and the value ()."""
    params = {name: p.detach().requires_grad_() for name, p in function.params.items()}
    with torch.enable_grad():
        value = values(params, sample)[0]
    leaves = list(params.values())
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return dict(zip(params, found, strict=True)), value.detach()
