"""Second moments of gradients over the training set, the Fisher information of a model in one of two senses.

"sampled": targets are drawn from the model's own distribution, so that the second moments are those of the
Gauss-Newton matrix in expectation (Martens, 2014); each sample draws from its own stream of random numbers, so that
what is drawn depends on the seed and the sample alone. "empirical": the training targets themselves, which is another
matrix (Kunstner et al., 2019), and needs no distribution.

Shapes: ``B`` samples in a batch, ``D`` coordinates, ``L`` layers that have factors (see :mod:`stages.kronecker`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stages.batch import part, size
from stages.curvature import Curvature
from stages.draws import Draws
from stages.grad_z import hooks
from stages.grad_z.choose import naming
from stages.grad_z.technique import Values
from stages.kronecker import CHUNK, Calls, Factored, factored, views
from stages.parameters import Parameters
from stages.stage import Batch, Report, StageError

Kind = Literal["sampled", "empirical"]


@dataclass(frozen=True)
class Gradients:
    """What was differentiated for one batch.

    Attributes:
        ids: of the samples.
        recorded: calls of layers with the gradients of their outputs.
        batch: the samples, with their targets as they were drawn.
        gradient: (D,), sum of the gradients of training losses, where it was asked for.
    """

    ids: Sequence[int]
    recorded: hooks.Recorded
    batch: Batch
    gradient: Tensor | None


@dataclass
class SecondMoments:
    """Sums of second moments over training samples.

    Attributes:
        curvature: the model and its training set.
        kind: "sampled" or "empirical".
        seed: of what is drawn.
    """

    curvature: Curvature
    kind: Kind
    seed: int

    @functools.cached_property
    def layers(self) -> list[Factored]:
        """The layers that have factors, whether or not hooks follow them."""
        return factored(self.curvature.function)

    @functools.cached_property
    def followed(self) -> list[bool]:
        """Whether layer hooks follow each of them, as was found on a few training samples."""
        return [self.curvature.hooks.names.issuperset(layer.names) for layer in self.layers]

    def factor_sums(self, flat: Tensor, ids: Sequence[int], report: Report) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the factors of layers over some samples, into ``flat`` in double precision.

        Returns:
            The number of positions of each layer, (L,), none where hooks do not follow it; the sum of squares of all
            coordinates that have no factors, (D,), zero elsewhere; and the sum of gradients of training losses, (D,).

        Raises:
            StageError: a sum is not finite, or a layer is called on something else than one row for each sample.
        """
        positions_L = torch.zeros(len(self.layers), dtype=torch.float64)
        squares_D, gradient_D = self._zeros(), self._zeros()
        for found in self._gradients(ids, report, whole=True):
            assert found.gradient is not None
            gradient_D += found.gradient
            for number, (layer, (left, right)) in enumerate(zip(self.layers, views(flat, self.layers), strict=True)):
                if self.followed[number]:
                    calls = layer.of(found.recorded.calls)
                    positions_L[number] += layer.add_factors(left, right, calls, self.curvature.function.dtype)
            self._add_other_squares(squares_D, found)
        self._refuse_infinite((flat, squares_D, gradient_D), ids)
        return positions_L, squares_D, gradient_D

    def eigenvalue_sum(
        self, vectors: Sequence[tuple[Tensor, Tensor]], positions_L: Sequence[float], ids: Sequence[int], report: Report
    ) -> Tensor:
        """Return the sum over some samples of squared gradients in the eigenbasis of the layers' factors, (D,).

        Args:
            vectors: the eigenvectors of each layer's factors, of the dtype of single products.
            positions_L: positions that the factors were added up over.
            ids: the samples.
            report: of progress.

        Raises:
            StageError: as above, or layers with factors are not followed any more.
        """
        lost = [layer.names[0] for layer, now, then in self._layers(positions_L) if then and not now]
        if lost:
            raise StageError(
                f"the factors of {', '.join(lost)} are cached, and layer hooks do not follow it on this machine: "
                "remove them (`gc`, `rm`) and run again"
            )
        function = self.curvature.function
        squares_D = self._zeros()
        totals = [torch.zeros(layer.groups, layer.outputs, layer.inputs).to(squares_D) for layer in self.layers]
        for found in self._gradients(ids, report):
            for layer, follows, (left, right), total in zip(self.layers, self.followed, vectors, totals, strict=True):
                if follows:
                    inner = None if layer.table else right
                    layer.add_squares(total, left, inner, layer.of(found.recorded.calls))
            self._add_other_squares(squares_D, found)
        for layer, follows, total in zip(self.layers, self.followed, totals, strict=True):
            if follows:
                layer.put(total.unsqueeze(0), squares_D.unsqueeze(0), function.coordinates.columns)
        self._refuse_infinite((squares_D,), ids)
        return squares_D

    def _layers(self, positions_L: Sequence[float]) -> Iterator[tuple[Factored, bool, bool]]:
        """Yield each layer, whether hooks follow it, and whether it was met before."""
        for layer, follows, positions in zip(self.layers, self.followed, positions_L, strict=True):
            yield layer, follows, positions > 0

    def _zeros(self) -> Tensor:
        function = self.curvature.function
        return torch.zeros(function.size, dtype=torch.float64, device=function.device)

    @functools.cached_property
    def _with_factors(self) -> frozenset[str]:
        """The parameters of layers that hooks follow."""
        return frozenset(
            name for layer, follows in zip(self.layers, self.followed, strict=True) if follows for name in layer.names
        )

    def _gradients(self, ids: Sequence[int], report: Report, *, whole: bool = False) -> Iterator[Gradients]:
        """Differentiate for some samples, a batch at a time.

        Args:
            ids: the samples.
            report: of progress.
            whole: differentiate the training losses, too, which shares the forward pass.

        Raises:
            StageError: a layer is called on something else than one row for each sample.
        """
        function, followed = self.curvature.function, self.curvature.hooks

        def of_these(batch: Batch, now: Sequence[int]) -> Gradients:
            used, gradient = batch, None

            def values(params: Parameters, batch: Batch) -> Tensor:
                nonlocal used, gradient
                leaves = {name: _leaf(value) for name, value in params.items()} if whole else params
                outputs = function.outputs(leaves, batch)
                if whole:
                    gradient = self._gradient(leaves, function.losses_of(outputs, batch))
                if self.kind == "sampled":
                    used = function.sample(outputs.detach(), batch, Draws(self.seed, now, function.device))
                return self._losses_of(outputs, used)

            with naming(f"at training samples {now[0]} to {now[-1]}"):
                found = hooks.recorded(function, values, batch, followed.names, followed.shared)
            return Gradients(now, found, used, gradient)

        for _, now, found in self.curvature.pieces(ids, of_these, "Fisher", report):
            if unfit := found.recorded.unfit & self._with_factors:
                raise StageError(
                    f"{', '.join(sorted(unfit))}: at training samples {now[0]} to {now[-1]} the layer is called on "
                    "something else than one row for each sample, so that it has no factors there: leave it out of "
                    '[grad_z] parameters, or use solver = "cg"'
                )
            yield found
            del found

    def _add_other_squares(self, squares_D: Tensor, found: Gradients) -> None:
        """Add the squares of gradients of all parameters without factors, by hooks where these follow them."""
        function, columns = self.curvature.function, self.curvature.function.coordinates.columns
        others = [name for name in function.params if name not in self._with_factors]
        known = self.curvature.hooks.names - found.recorded.unfit
        for names, by_hooks in (
            ([name for name in others if name in known], True),
            ([name for name in others if name not in known], False),
        ):
            if not names:
                continue
            own, count = function.part(names), size(found.batch)
            step = max(1, CHUNK // own.size)
            for start in range(0, count, step):
                few = slice(start, min(start + step, count))
                if by_hooks:
                    rows_BD = hooks.empty(own, few.stop - few.start)
                    calls = _few(found.recorded.calls, few)
                    with torch.no_grad():
                        hooks.fill(rows_BD, own, calls, frozenset(names))
                else:
                    rows_BD, _ = self.curvature.hooks.other(own, self._values_of(names), part(found.batch, few))
                sums = rows_BD.square().sum(0, dtype=torch.float64)
                for name, mine in own.coordinates.columns.items():
                    squares_D[columns[name]] += sums[mine]

    def _values_of(self, names: Sequence[str]) -> Values:
        """Return what is differentiated as a function of some parameters alone, for a batch with drawn targets."""
        function = self.curvature.function
        fixed = {name: value for name, value in function.params.items() if name not in names}
        return lambda params, batch: self._losses_of(function.outputs({**fixed, **params}, batch), batch)

    def _losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return what is differentiated, (B,), given the outputs; for a batch with drawn targets where they are."""
        function = self.curvature.function
        return (function.losses_of if self.kind == "empirical" else function.sampled_losses_of)(outputs, batch)

    def _gradient(self, leaves: Parameters, losses: Tensor) -> Tensor:
        """Return the gradient of the sum of losses, (D,), and keep what others need to be differentiated."""
        found = torch.autograd.grad(
            *(losses.sum(), list(leaves.values())), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self.curvature.function.flatten(dict(zip(leaves, found, strict=True)))

    def _refuse_infinite(self, sums: Sequence[Tensor], ids: Sequence[int]) -> None:
        """Refuse sums that are not finite.

        Raises:
            StageError: naming the samples, where their own gradients are not.
        """
        if not all(torch.isfinite(one.sum()) for one in sums):
            self.curvature.gradient_sum(ids)  # where that is not finite either, it names the samples
            raise StageError(
                f"second moments of gradients are NaN or infinite over training samples {ids[0]} to {ids[-1]}: look at "
                "the scale of inputs and losses"
            )


def _leaf(value: Tensor) -> Tensor:
    return value if value.requires_grad else value.detach().requires_grad_()


def _few(calls: Calls, few: slice) -> list[tuple[hooks.Call, Tensor]]:
    """Return what calls have of some samples."""
    return [(replace(call, inputs=call.inputs[few]), grads[few]) for call, grads in calls]
