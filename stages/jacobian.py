"""Products with the Gauss-Newton matrix by the Jacobian itself: Σ JᵢᵀAᵢJᵢ v for many v at once, as matrix products.

Shapes: ``T`` vectors, ``D`` coordinates, ``B`` samples in a batch, ``K`` entries of one sample's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stages.batch import size, split, take
from stages.grad_z.hooks import Hooks
from stages.grad_z.hooks import jacobian as by_hooks
from stages.parameters import ModelFunction, Parameters
from stages.stage import Batch

MATRIX_ROWS = 1024
"""Rows of a dense matrix that are added to at once."""


def jacobian(function: ModelFunction, batch: Batch, hooks: Hooks | None = None) -> tuple[Tensor, Tensor]:
    """Return each sample's Jacobian (B, K, D) and outputs (B, …).

    By layer hooks where these are given and follow the batch, otherwise every sample as a batch of its own.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    if hooks is not None and (found := by_hooks(function, batch, hooks)) is not None:
        return found
    tensors, join = split(batch)

    def one(params: Parameters, *sample: Tensor) -> tuple[Parameters, Tensor]:
        alone = join([tensor.unsqueeze(0) for tensor in sample])
        outputs, pullback = vjp(lambda p: function.outputs(p, alone), params)[:2]
        units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        (rows,) = vmap(pullback)(units.reshape(-1, *outputs.shape))
        return rows, outputs.squeeze(0)

    rows, outputs = vmap(one, in_dims=(None, *(0 for _ in tensors)), randomness="error")(function.params, *tensors)
    with torch.no_grad():
        return function.flatten(rows), outputs.detach()


def one_by_one(function: ModelFunction, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the same by a backward pass for each entry of each sample's outputs: slow, and right for any model."""
    rows_BKD, outputs = [], []
    for index in range(size(batch)):
        params = {name: p.detach().requires_grad_() for name, p in function.params.items()}
        with torch.enable_grad():
            found = function.outputs(params, take(batch, index))
        rows_KD = torch.empty(found.numel(), function.size, dtype=function.dtype, device=function.device)
        for entry, row_D in zip(found.reshape(-1), rows_KD, strict=True):
            grads = torch.autograd.grad(
                entry, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            function.flatten(dict(zip(params, grads, strict=True)), out=row_D)
        rows_BKD.append(rows_KD)
        outputs.append(found.detach())
    return torch.stack(rows_BKD), torch.cat(outputs)


@dataclass(frozen=True)
class Linearised:
    """A model at some samples: their Jacobian, and the product with the Hessians of their losses in the outputs.

    Attributes:
        rows: the Jacobian, (B, K, D).
        inner: (T, B, …) -> (T, B, …), as the outputs are shaped.
        outputs: these, (B, …).
    """

    rows: Tensor
    inner: Callable[[Tensor], Tensor]
    outputs: Tensor

    def add_products(self, vectors_TD: Tensor, total_TD: Tensor) -> None:
        """Add Σ JᵢᵀAᵢJᵢ v for each row v to ``total_TD``."""
        rows = self.rows.flatten(0, 1)
        forward = (vectors_TD @ rows.T).to(self.outputs.dtype)
        backward = self.inner(forward.reshape(-1, *self.outputs.shape)).reshape(forward.shape)
        total_TD.addmm_(backward.to(vectors_TD.dtype), rows)

    def add_matrix(self, total_DD: Tensor) -> None:
        """Add Σ JᵢᵀAᵢJᵢ to ``total_DD``, its rows some at a time."""
        rows = self.rows.flatten(0, 1)
        for columns, into in zip(torch.split(rows.T, MATRIX_ROWS), torch.split(total_DD, MATRIX_ROWS), strict=True):
            backward = self.inner(columns.to(self.outputs.dtype).reshape(-1, *self.outputs.shape))
            into.addmm_(backward.reshape(columns.shape).to(rows.dtype), rows)


def linearised(
    function: ModelFunction, batch: Batch, together: int, hooks: Hooks | None = None
) -> Iterator[Linearised]:
    """Yield a batch's parts of ``together`` samples with their Jacobian.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    tensors, join = split(batch)
    for pieces in zip(*(torch.split(tensor, together) for tensor in tensors), strict=True):
        part = join(list(pieces))
        rows_BKD, outputs = jacobian(function, part, hooks)
        yield Linearised(rows_BKD, loss_derivatives(function, part, outputs)[1], outputs)


def ggn_products(
    function: ModelFunction, batch: Batch, vectors_TD: Tensor, together: int, hooks: Hooks | None = None
) -> Tensor:
    """Return Σ JᵢᵀAᵢJᵢ v over a batch for each row v, (T, D), with the Jacobian of ``together`` samples at once.

    Raises:
        RuntimeError: the model does something that ``vmap`` cannot follow.
    """
    total_TD = torch.zeros_like(vectors_TD)
    for part in linearised(function, batch, together, hooks):
        part.add_products(vectors_TD, total_TD)
    return total_TD


def loss_derivatives(
    function: ModelFunction, batch: Batch, outputs: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return each loss's gradient in its outputs (B, …), and the product with Aᵢ of many tangents at once."""

    def total(values: Tensor) -> Tensor:
        return function.task.losses(values, batch).sum()

    gradient, pullback = vjp(grad(total), outputs)[:2]

    def products(tangents: Tensor) -> Tensor:
        found: Tensor = vmap(pullback)(tangents)[0]
        return found.detach()

    return gradient.detach(), products
