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
        found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        grads = {
            name: torch.zeros_like(p) if g is None else g.detach()
            for (name, p), g in zip(params.items(), found, strict=True)
        }
        rows.append(function.flatten(grads))
        results.append(value.detach())
    return torch.stack(rows), torch.stack(results)
