"""Per-sample gradients of the parameters of single layers, from a layer's inputs and the gradients of its outputs.

Where a weight meets every sample by itself, its gradient for sample b is a product of that sample's inputs and
output gradients alone (Goodfellow, 2015, "Efficient per-example gradient computations"); a convolution is the same
over the patches that its kernel sees (Rochette et al., 2019, "Efficient per-example gradient computations in
convolutional neural networks").

Shapes: ``B`` samples, ``P`` positions of one sample, ``I`` entries that go into a layer at a position (for a
convolution, the patch of one group), ``O`` that come out, ``C`` channels, ``G`` groups, ``V`` entries of an embedding;
``r`` rows and ``c`` columns of a projected weight, ``Q`` products that are summed for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.coordinates import Kronecker

PATCH_BYTES = 2 * 2**20
"""Patches of a convolution that are laid out at once: few enough for the cache, measured best at 1 to 4 MiB."""

Write = Callable[[Any, str, Tensor, Tensor, Tensor], None]
"""``(module, parameter's name in it, inputs, output gradients, out)`` fills ``out`` (B, *the parameter's shape)."""


Factors = Callable[[Any, Tensor, Tensor, Kronecker], tuple[Tensor, Tensor] | None]
"""``(module, inputs, output gradients, map)`` gives the factors (B, r, Q) and (B, Q, c) whose product is A G Bᵀ for the
weight's gradient G, projected before they meet; None where they have no such form."""


Sides = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(module, inputs, output gradients)`` gives what meets at every position of every sample: what goes in,
(G, I, B · P), or the rows of a table that were looked up, (B · P,); and the gradient of what comes out, (G, O, B · P).
The weight's gradient is the sum of their outer products."""


@dataclass(frozen=True)
class Layer:
    """How the parameters of one kind of module get their per-sample gradients.

    Attributes:
        write: fills one parameter's gradients.
        sample_dims: dimensions of one sample's inputs, at least.
        usable: says whether a module's options are among those that ``write`` knows.
        factors: projects the weight's gradients before they are formed.
        shareable: one call may serve all samples alike, as a table of positions is looked up in.
        sides: gives the factors of the weight's gradient at every position; None where it has none.
        turned: the weight lies with what goes in first.
    """

    write: Write
    sample_dims: Callable[[Any], int]
    usable: Callable[[Any], bool] = lambda module: True
    factors: Factors | None = None
    shareable: bool = False
    sides: Sides | None = None
    turned: bool = False

    def takes(self, module: nn.Module, inputs: object, count: int) -> bool:
        """Say whether the inputs of one call are ``count`` samples, with the batch first."""
        if not isinstance(inputs, Tensor) or inputs.ndim <= self.sample_dims(module):
            return False
        return inputs.shape[0] == count


def layer_of(module: nn.Module) -> Layer | None:
    """Return how a module's parameters are done, None where they are not known by their layer.

    A class of its own is known where it takes the forward pass of a known one as it is.
    """
    forward = getattr(module.forward, "__func__", None)
    for kind, layer in (*LAYERS.items(), *_of_transformers()):
        if isinstance(module, kind) and forward is kind.forward:
            return layer if layer.usable(module) else None
    return None


def _of_transformers() -> list[tuple[type[nn.Module], Layer]]:
    """Return GPT-2's linear layer, whose weight lies transposed, where transformers was imported."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (
        []
        if kind is None
        else [
            (
                kind,
                Layer(
                    write_transposed_linear,
                    lambda module: 1,
                    factors=transposed_linear_factors,
                    sides=linear_sides,
                    turned=True,
                ),
            )
        ]
    )


def write_linear(module: nn.Module, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of y = x Wᵀ + b, summed over all positions that share the weight."""
    grads_BPO = grads.reshape(len(grads), -1, grads.shape[-1])
    if name == "bias":
        torch.sum(grads_BPO, dim=1, out=out)
    else:
        inputs_BPI = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        torch.bmm(grads_BPO.transpose(1, 2), inputs_BPI, out=out)


def linear_factors(module: nn.Module, inputs: Tensor, grads: Tensor, one: Kronecker) -> tuple[Tensor, Tensor]:
    """Project output gradients and inputs at every position."""
    rows_BPr = projected(grads.reshape(len(grads), -1, grads.shape[-1]), one.left)
    return rows_BPr.transpose(1, 2), projected(inputs.reshape(len(inputs), -1, inputs.shape[-1]), one.right)


def linear_sides(module: nn.Module, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out the inputs and output gradients of all positions."""
    return inputs.reshape(-1, inputs.shape[-1]).T.unsqueeze(0), grads.reshape(-1, grads.shape[-1]).T.unsqueeze(0)


def projected(values: Tensor, side: Tensor | None) -> Tensor:
    """Project the last dimension, to (…, r); None where it stays."""
    return values if side is None else values @ side.T


def write_transposed_linear(module: nn.Module, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of y = x W + b, summed over all positions that share the weight."""
    if name == "bias":
        write_linear(module, name, inputs, grads, out)
    else:
        write_linear(module, name, grads, inputs, out)


def transposed_linear_factors(
    module: nn.Module, inputs: Tensor, grads: Tensor, one: Kronecker
) -> tuple[Tensor, Tensor]:
    """Project as for a linear layer, with inputs and output gradients in each other's place."""
    return linear_factors(module, grads, inputs, one)


def write_convolution(module: Any, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of a convolution: that of a linear layer over the patches under its kernel, group by group.

    Measured for 64 samples of 16 channels to 32 on 12 × 12: patches copied from a view 1.9 ms, 2.7 in the pieces
    used here, which are twice as fast for larger work; by ``unfold`` 3.7;
    a product for each position of the kernel 2.7; a convolution for each sample 3.9; one with a group for each 4.1.
    """
    grads_BCP = grads.flatten(2)
    if name == "bias":
        torch.sum(grads_BCP, dim=2, out=out)
        return
    count, groups, positions = len(grads), module.groups, grads_BCP.shape[2]
    out_BGOI = out.view(count, groups, module.out_channels // groups, -1)
    patch = inputs.shape[1] * math.prod(module.kernel_size) * positions * inputs.element_size()
    together = max(1, PATCH_BYTES // max(1, patch))
    for start in range(0, count, together):
        part = slice(start, start + together)
        # A group is to bmm what a sample is; the copy that lays the patches out is the only large one.
        patches_GIP = patches(module, inputs[part]).reshape(-1, out_BGOI.shape[3], positions)
        grads_GPO = grads_BCP[part].reshape(-1, out_BGOI.shape[2], positions).transpose(1, 2)
        products_GIO = torch.bmm(patches_GIP, grads_GPO)
        out_BGOI[part] = products_GIO.view(-1, groups, *products_GIO.shape[1:]).transpose(2, 3)


def convolution_factors(module: Any, inputs: Tensor, grads: Tensor, one: Kronecker) -> tuple[Tensor, Tensor] | None:
    """Project the patches by a convolution whose kernels are the rows of B, so that they are never laid out."""
    groups, count = module.groups, len(grads)
    if one.right is None or (one.left is None and groups > 1):
        return None
    dims, width = len(module.kernel_size), len(one.right)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    kernels = one.right.reshape(width, -1, *module.kernel_size)
    seen = convolve(
        padded(module, inputs), kernels.repeat(groups, *(1 for _ in kernels.shape[1:])),
        stride=module.stride, dilation=module.dilation, groups=groups,
    )  # fmt: skip
    seen_BQc = seen.reshape(count, groups, width, -1).permute(0, 1, 3, 2).reshape(count, -1, width)
    grads_BGOP = grads.reshape(count, groups, module.out_channels // groups, -1)
    if one.left is None:
        return grads_BGOP.squeeze(1), seen_BQc
    left_rGO = one.left.reshape(len(one.left), groups, -1)
    return torch.einsum("rgo,bgop->brgp", left_rGO, grads_BGOP).flatten(2), seen_BQc


def convolution_sides(module: Any, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out the patches that the kernel sees, and the output gradients, group by group."""
    seen = patches(module, inputs)
    dims = len(module.kernel_size)
    seen = seen.permute(*range(1, 2 + dims), 0, *range(2 + dims, 2 + 2 * dims))
    patch = inputs.shape[1] // module.groups * math.prod(module.kernel_size)
    out = module.out_channels // module.groups
    return seen.reshape(module.groups, patch, -1), grads.transpose(0, 1).reshape(module.groups, out, -1)


def padded(module: Any, inputs: Tensor) -> Tensor:
    """Return a convolution's inputs with its padding around them."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = padded_by(module)
    return functional.pad(inputs, padding, mode) if any(padding) else inputs


def patches(module: Any, inputs: Tensor) -> Tensor:
    """Return what a convolution's kernel sees, (B, C, *kernel, *positions), as a view of the padded inputs."""
    view = padded(module, inputs)
    dims = len(module.kernel_size)
    for dim, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        view = view.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return view.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


def padded_by(module: Any) -> list[int]:
    """Return what a convolution adds before and after each dimension, the last dimension first."""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for width in reversed(module.padding) for side in (width, width)]


def write_embedding(module: nn.Embedding, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill the gradient of a table of which each position took one row, but not that of the padding's row."""
    index_BP = inputs.reshape(len(inputs), -1)
    grads_BPO = grads.reshape(*index_BP.shape, -1)
    if module.padding_idx is not None:
        grads_BPO = grads_BPO.masked_fill((index_BP == module.padding_idx).unsqueeze(2), 0)
    out.zero_().scatter_add_(1, index_BP.unsqueeze(2).expand_as(grads_BPO), grads_BPO)


def embedding_factors(
    module: nn.Embedding, inputs: Tensor, grads: Tensor, one: Kronecker
) -> tuple[Tensor, Tensor] | None:
    """Take the columns of A that belong to the rows that were looked up."""
    if one.left is None:
        return None
    index_BP = inputs.reshape(len(inputs), -1)
    grads_BPO = grads.reshape(*index_BP.shape, -1)
    if module.padding_idx is not None:
        grads_BPO = grads_BPO.masked_fill((index_BP == module.padding_idx).unsqueeze(2), 0)
    rows_BrP = one.left[:, index_BP].transpose(0, 1)
    return rows_BrP, projected(grads_BPO, one.right)


def embedding_sides(module: nn.Embedding, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out the rows that were looked up and the output gradients, which are zero for the padding's row."""
    index, flat = inputs.reshape(-1), grads.reshape(inputs.numel(), -1)
    if module.padding_idx is not None:
        flat = flat.masked_fill((index == module.padding_idx).unsqueeze(1), 0)
    return index, flat.T.unsqueeze(0)


def write_layer_norm(module: Any, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of y = w · x̂ + b, where every position has all of the weight."""
    if name == "weight":
        grads = grads * functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    torch.sum(grads.reshape(len(grads), -1, *module.normalized_shape), dim=1, out=out)


def write_group_norm(module: nn.GroupNorm, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of y = w · x̂ + b, where every channel has one weight."""
    if name == "weight":
        grads = grads * functional.group_norm(inputs, module.num_groups, eps=module.eps)
    torch.sum(grads.reshape(*grads.shape[:2], -1), dim=2, out=out)


def write_batch_norm(module: Any, name: str, inputs: Tensor, grads: Tensor, out: Tensor) -> None:
    """Fill a gradient of y = w · x̂ + b, where x̂ comes of the running statistics."""
    if name == "weight":
        mean, variance = (stat.to(inputs) for stat in (module.running_mean, module.running_var))
        grads = grads * functional.batch_norm(inputs, mean, variance, eps=module.eps)
    torch.sum(grads.reshape(*grads.shape[:2], -1), dim=2, out=out)


def has_plain_rows(module: nn.Embedding) -> bool:
    """Say whether a table's gradient is dense, its rows' own, and taken without changing the table."""
    return not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)


def has_running_statistics(module: Any) -> bool:
    """Say whether a normalisation is the same function for every batch."""
    return module.running_mean is not None and not module.training


_convolution = Layer(
    *(write_convolution, lambda module: 1 + len(module.kernel_size)),
    factors=convolution_factors,
    sides=convolution_sides,
)
_batch_norm = Layer(write_batch_norm, lambda module: 1, has_running_statistics)
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(write_linear, lambda module: 1, factors=linear_factors, sides=linear_sides),
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: Layer(
        *(write_embedding, lambda module: 0, has_plain_rows, embedding_factors),
        shareable=True,
        sides=embedding_sides,
        turned=True,
    ),
    nn.LayerNorm: Layer(write_layer_norm, lambda module: len(module.normalized_shape)),
    nn.GroupNorm: Layer(write_group_norm, lambda module: 1),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
"""The kinds of modules whose parameters are known by their layer."""
