"""Layers whose curvature is taken to be a Kronecker product, of what goes in and of what comes back.

A weight that every sample meets at some positions has a gradient M = Σ_p g_p a_pᵀ for each, where a_p is what goes in
there and g_p the gradient of what comes out; a bias is one more column, where a_p is 1. K-FAC takes the second moments
of M to be those of a and g apart (Martens & Grosse, 2015), with all positions alike (Grosse & Martens, 2016; the
"expand" setting of Eschenhagen et al., 2023):

    E[vec M vec Mᵀ] ≈ S ⊗ A,    A = (1/N) Σ a aᵀ,    S = (1/number of positions) Σ g gᵀ.

EK-FAC keeps the eigenvectors of that, Q = Q_S ⊗ Q_A, and measures the second moments along each of them, the means of
(Q_Sᵀ M Q_A)² (George et al., 2018). Of a table A is diagonal: how often each row is looked up.

Shapes: ``G`` groups of a convolution, each a layer by itself (1 elsewhere), ``O`` entries that come out of one, ``I``
that go in, with 1 for a bias; ``B`` samples, ``P`` positions of one, ``T`` vectors, ``D`` coordinates.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stages.grad_z.hooks import Call, Owner, owners
from stages.parameters import ModelFunction

CHUNK = 2**19
"""Numbers of what goes in and comes back that are laid out at once, where a layer's factors are no larger."""

Calls = Sequence[tuple[Call, Tensor]]
"""Calls of a layer on the same samples, each with the gradients of its outputs."""


@dataclass(frozen=True)
class Factored:
    """One layer with its factors.

    Attributes:
        owner: the module, with the names of its parameters.
        groups: G.
        outputs: O.
        inputs: I.
    """

    owner: Owner
    groups: int
    outputs: int
    inputs: int

    @property
    def names(self) -> tuple[str, ...]:
        """The weight and, where there is one, the bias."""
        return tuple(self.owner.names[own] for own in ("weight", "bias") if own in self.owner.names)

    @property
    def table(self) -> bool:
        """Whether rows are looked up, so that A is diagonal."""
        return isinstance(self.owner.module, nn.Embedding)

    @property
    def padding(self) -> int | None:
        """The row of a table that has no gradient."""
        return getattr(self.owner.module, "padding_idx", None)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of S and A; of the diagonal where A is."""
        right = (self.inputs,) if self.table else (self.groups, self.inputs, self.inputs)
        return (self.groups, self.outputs, self.outputs), right

    def of(self, calls: Calls) -> Calls:
        """Return those of some calls that are of this layer."""
        return [(call, grads) for call, grads in calls if call.owner.module is self.owner.module]

    # ---- gradients as matrices -----------------------------------------------------------------------------------

    def matrices(self, vectors_TD: Tensor, columns: Mapping[str, slice]) -> Tensor:
        """Return the layer's part of vectors, (T, G, O, I)."""
        weight, *bias = (vectors_TD[:, columns[name]] for name in self.names)
        inputs = self.inputs - len(bias)
        if self.owner.layer.turned:
            found = weight.reshape(-1, 1, inputs, self.outputs).mT
        else:
            found = weight.reshape(-1, self.groups, self.outputs, inputs)
        return torch.cat([found, *(b.reshape(-1, self.groups, self.outputs, 1) for b in bias)], dim=-1)

    def put(self, matrices_TGOI: Tensor, out_TD: Tensor, columns: Mapping[str, slice]) -> None:
        """Write the layer's part of vectors."""
        weight, *bias = self.names
        for name in bias:
            out_TD[:, columns[name]] = matrices_TGOI[..., -1].flatten(1)
            matrices_TGOI = matrices_TGOI[..., :-1]
        out_TD[:, columns[weight]] = (matrices_TGOI.mT if self.owner.layer.turned else matrices_TGOI).flatten(1)

    # ---- sums over samples ---------------------------------------------------------------------------------------

    def add_factors(self, left_GOO: Tensor, right: Tensor, calls: Calls, dtype: torch.dtype) -> int:
        """Add up the outer products of what comes back and of what goes in, over all positions; return their number.

        Args:
            left_GOO: Σ g gᵀ so far.
            right: Σ a aᵀ so far, (G, I, I), or its diagonal (I,) for a table.
            calls: of the layer, on a batch.
            dtype: of single products.
        """
        positions = 0
        left, inner = torch.zeros_like(left_GOO, dtype=dtype), torch.zeros_like(right, dtype=dtype)
        for inputs, grads_GOBP in self._chunks(calls, dtype):
            grads_GOR = grads_GOBP.flatten(2)
            left.baddbmm_(grads_GOR, grads_GOR.mT)
            if self.table:
                counts_I = torch.bincount(inputs.flatten(), minlength=self.inputs)
                if self.padding is not None:
                    counts_I[self.padding] = 0
                inner += counts_I
                positions += int(counts_I.sum())
            else:
                inputs_GIR, whole = inputs.flatten(2), inner[:, : inputs.shape[1], : inputs.shape[1]]
                whole += inputs_GIR @ inputs_GIR.mT
                positions += inputs_GIR.shape[2]
                if inputs.shape[1] < self.inputs:
                    sums_GI = inputs_GIR.sum(2)
                    inner[:, -1, :-1] += sums_GI
                    inner[:, :-1, -1] += sums_GI
                    inner[:, -1, -1] += inputs_GIR.shape[2]
        left_GOO += left
        right += inner
        return positions

    def add_squares(self, total_GOI: Tensor, left_GOO: Tensor, right_GII: Tensor | None, calls: Calls) -> None:
        """Add up the squares of gradients in the eigenbasis, (Q_Sᵀ M Q_A)², over the samples of a batch.

        What goes in and comes back is rotated before the two meet, or gradients after that, whatever takes fewer
        operations.

        Args:
            total_GOI: the sum so far, in double precision.
            left_GOO: Q_S, of the dtype of single products.
            right_GII: Q_A, likewise; None where that is the identity.
            calls: of the layer, on a batch.
        """
        groups, outputs, inputs = self.groups, self.outputs, self.inputs
        for seen, grads_GOBP in self._chunks(calls, left_GOO.dtype):
            count, positions = grads_GOBP.shape[2:]
            if right_GII is None:
                self._add_squares_of_table(total_GOI, seen, left_GOO[0].mT @ grads_GOBP.flatten(2)[0])
                continue
            first = positions * (inputs**2 + outputs**2) < outputs * inputs * (inputs + outputs)
            seen_GIR, grads_GOR = seen.flatten(2), grads_GOBP.flatten(2)
            if first:
                seen_GIR, grads_GOR = _rotated_inputs(right_GII, seen_GIR), left_GOO.mT @ grads_GOR
            elif seen.shape[1] < inputs:
                ones = torch.ones(groups, 1, seen_GIR.shape[2], dtype=seen.dtype, device=seen.device)
                seen_GIR = torch.cat([seen_GIR, ones], dim=1)
            if first and positions == 1:
                total_GOI += grads_GOR.square() @ seen_GIR.square().mT
                continue
            seen_GBPI = seen_GIR.view(*seen_GIR.shape[:2], count, positions).permute(0, 2, 3, 1)
            grads_GBOP = grads_GOR.view(*grads_GOR.shape[:2], count, positions).transpose(1, 2)
            for few in _parts(count, max(1, CHUNK // (groups * outputs * inputs))):
                matrices_GBOI = grads_GBOP[:, few] @ seen_GBPI[:, few]
                if not first:
                    matrices_GBOI = rotated(matrices_GBOI.transpose(0, 1), left_GOO, right_GII).transpose(0, 1)
                total_GOI += matrices_GBOI.square_().sum(1)

    def _add_squares_of_table(self, total_GOI: Tensor, index_BP: Tensor, grads_OR: Tensor) -> None:
        """Add up squares of a table's gradients, row by row of those that each sample looked up."""
        rows = torch.arange(len(index_BP), device=index_BP.device).unsqueeze(1) * self.inputs + index_BP
        known, where = torch.unique(rows, return_inverse=True)
        sums = torch.zeros(len(known), self.outputs, dtype=grads_OR.dtype, device=grads_OR.device)
        sums.index_add_(0, where.flatten(), grads_OR.T)
        total_GOI[0].T.index_add_(0, known % self.inputs, sums.square_().to(total_GOI.dtype))

    def _chunks(self, calls: Calls, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what goes in, (G, I, B, P) without the column of a bias, or a table's rows (B, P); and what comes back.

        Every yield is of some of the samples, with the positions of all calls.
        """
        if not calls:
            return
        count = len(calls[0][1])
        positions = sum(grads[0].numel() for _, grads in calls) // (self.groups * self.outputs)
        wide = self.groups * (self.outputs + (1 if self.table else self.inputs))
        largest = max(CHUNK, *(math.prod(shape) for shape in self.shapes))
        for few in _parts(count, max(1, largest // (wide * positions))):
            seen, grads = [], []
            for call, found in calls:
                inputs = call.inputs[few]
                inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
                assert call.owner.layer.sides is not None
                into, back = call.owner.layer.sides(call.owner.module, inputs, found[few].to(dtype))
                seen.append(into.view(*into.shape[:-1], few.stop - few.start, -1))
                grads.append(back.view(*back.shape[:-1], few.stop - few.start, -1))
            yield _joined(seen), _joined(grads)


def factored(function: ModelFunction) -> list[Factored]:
    """List the layers that have factors: linear ones, convolutions and tables whose weights no other layer has.

    A bias belongs to them where it has the weight's l2, which then adds to all eigenvalues alike.
    """
    owned, l2 = owners(function), function.penalties()
    users = Counter(name for owner in owned for name in owner.names.values())
    found = []
    for owner in owned:
        own = {n: full for n, full in owner.names.items() if users[full] == 1 and function.params[full].numel()}
        if owner.layer.sides is None or "weight" not in own:
            continue
        own = {n: full for n, full in own.items() if l2[full] == l2[own["weight"]]}
        shape, groups = function.params[own["weight"]].shape, getattr(owner.module, "groups", 1)
        inputs, outputs = (shape[0], shape[1]) if owner.layer.turned else (shape[1:].numel(), shape[0] // groups)
        found.append(Factored(replace(owner, names=own), groups, outputs, inputs + ("bias" in own)))
    return found


# ---- all factors in one array ------------------------------------------------------------------------------------


def entries(layers: Sequence[Factored]) -> int:
    """Return how many numbers the factors S and A of some layers are."""
    return sum(math.prod(shape) for layer in layers for shape in layer.shapes)


def packed_entries(layers: Sequence[Factored]) -> int:
    """Return how many there are without those that symmetry gives."""
    return sum(
        shape[0] * shape[1] * (shape[1] + 1) // 2 if len(shape) > 1 else shape[0]
        for layer in layers
        for shape in layer.shapes
    )


def views(flat: Tensor, layers: Sequence[Factored]) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's S and A (or what has their shapes) as parts of one array."""
    found = _cut(flat, [shape for layer in layers for shape in layer.shapes])
    return list(zip(found[::2], found[1::2], strict=True))


def packed(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the upper triangles of symmetric factors in one array."""
    parts = itertools.chain.from_iterable(factors)
    return torch.cat([(one[:, _triangle(one)] if one.ndim > 1 else one).flatten() for one in parts])


def unpacked(flat: Tensor, layers: Sequence[Factored]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's factors, of what :func:`packed` gave."""
    start = 0
    for layer in layers:
        made = []
        for shape in layer.shapes:
            one = torch.zeros(shape, dtype=flat.dtype, device=flat.device)
            if one.ndim > 1:
                mask = _triangle(one)
                count = int(mask.sum())
                stop = start + shape[0] * count
                one[:, mask] = flat[start:stop].view(shape[0], count)
                one += one.triu(1).mT
            else:
                stop = start + one.numel()
                one.copy_(flat[start:stop])
            made.append(one)
            start = stop
        left, right = made
        yield left, right


def _triangle(like_Gnn: Tensor) -> Tensor:
    return torch.ones(like_Gnn.shape[1:], dtype=torch.bool, device=like_Gnn.device).triu_()


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]


# ---- the eigenbasis ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenbasis:
    """An orthogonal basis of all coordinates: of each layer that of its factors, elsewhere the coordinates themselves.

    A coordinate's place in the basis is its own place among the coordinates.

    Attributes:
        layers: with factors.
        vectors: Q_S and Q_A of each; of a table a Q_A that is not looked at, since it is the identity.
        columns: of each parameter.
    """

    layers: Sequence[Factored]
    vectors: Sequence[tuple[Tensor, Tensor]]
    columns: Mapping[str, slice]

    def scaled(self, vectors_TD: Tensor, eigenvalues_D: Tensor) -> Tensor:
        """Return Q diag(eigenvalues) Qᵀ v for each row v, (T, D) in double precision."""
        out_TD = vectors_TD * eigenvalues_D
        for layer, (left, right) in zip(self.layers, self.vectors, strict=True):
            inner = None if layer.table else right
            matrices = rotated(layer.matrices(vectors_TD, self.columns).to(left.dtype), left, inner)
            matrices *= layer.matrices(eigenvalues_D.unsqueeze(0), self.columns)
            layer.put(rotated(matrices, left.mT, None if inner is None else inner.mT), out_TD, self.columns)
        return out_TD


def rotated(matrices_TGOI: Tensor, left_GOO: Tensor, right_GII: Tensor | None) -> Tensor:
    """Return leftᵀ M right for each matrix; None stands for the identity."""
    found = torch.einsum("gop,tgoi->tgpi", left_GOO, matrices_TGOI)
    return found if right_GII is None else torch.einsum("tgpi,gij->tgpj", found, right_GII)


def _rotated_inputs(right_GII: Tensor, inputs_GIR: Tensor) -> Tensor:
    """Return Q_Aᵀ a of every position; where there is a bias, with the 1 that is not laid out."""
    if inputs_GIR.shape[1] == right_GII.shape[1]:
        return right_GII.mT @ inputs_GIR
    return (right_GII[:, :-1].mT @ inputs_GIR).add_(right_GII[:, -1].unsqueeze(2))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _parts(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
