"""Per-sample gradients one sample at a time: slow, and right for any model that autograd can take."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.batch import size, take
from stages.grad_z.technique import Values
from stages.parameters import ModelFunction
from stages.stage import Batch


def gradients(function: ModelFunction, values: Values, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient (B, D) and value (B,); a parameter that a sample does not use gets zeros."""
    rows, results = [], []
    for index in range(size(batch)):
        params = {name: p.detach().requires_grad_() for name, p in function.params.items()}
        with torch.enable_grad():
            value = values(params, take(batch, index))[0]
        leaves = list(params.values())
        if value.requires_grad:
            found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(leaf) for leaf in leaves)
        rows.append(function.flatten(dict(zip(params, found, strict=True))))
        results.append(value.detach())
    return torch.stack(rows), torch.stack(results)
