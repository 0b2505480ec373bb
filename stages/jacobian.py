"""Products with the Gauss-Newton matrix by the Jacobian itself: Σ JᵢᵀAᵢJᵢ v for many v at once, as matrix products.

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``K`` entries of one sample's outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stages.batch import split
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch


def jacobian(function: ModelFunction, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's Jacobian (B, K, D) and outputs (B, …), every sample computed as a batch of its own.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    tensors, join = split(batch)

    def one(params: Parameters, *sample: Tensor) -> tuple[Tensor, Tensor]:
        alone = join([tensor.unsqueeze(0) for tensor in sample])
        outputs, pullback = vjp(lambda p: function.outputs(p, alone), params)[:2]
        units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        (rows,) = vmap(pullback)(units.reshape(-1, *outputs.shape))
        return function.flatten(rows), outputs.squeeze(0)

    rows_BKD, outputs = vmap(one, in_dims=(None, *(0 for _ in tensors)), randomness="error")(function.params, *tensors)
    return rows_BKD.detach(), outputs.detach()


def ggn_products(function: ModelFunction, batch: Batch, vectors_TD: Tensor, together: int) -> Tensor:
    """Return Σ JᵢᵀAᵢJᵢ v over a batch for each row v, (T, D), with the Jacobian of ``together`` samples at once.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    tensors, join = split(batch)
    total_TD = torch.zeros_like(vectors_TD)
    for pieces in zip(*(torch.split(tensor, together) for tensor in tensors), strict=True):
        part = join(list(pieces))
        rows_BKD, outputs = jacobian(function, part)
        inner = _loss_curvature(function, part, outputs)
        forward = (vectors_TD @ rows_BKD.flatten(0, 1).T).to(outputs.dtype)
        backward = inner(forward.reshape(-1, *outputs.shape)).reshape(forward.shape)
        total_TD.addmm_(backward.to(vectors_TD.dtype), rows_BKD.flatten(0, 1))
    return total_TD


def _loss_curvature(function: ModelFunction, batch: Batch, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product with Aᵢ, the Hessian of each loss in its outputs, of many tangents at once."""

    def total(values: Tensor) -> Tensor:
        return function.task.losses(values, batch).sum()

    pullback = vjp(grad(total), outputs)[1]

    def products(tangents: Tensor) -> Tensor:
        found: Tensor = vmap(pullback)(tangents)[0]
        return found.detach()

    return products
