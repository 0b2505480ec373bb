"""``newton``: training gradients corrected for what leaving the sample out does to H (N, D).

To first order, leaving sample i out moves the parameters by (N (H + λI))⁻¹ gᵢ with gᵢ = Jᵢᵀ rᵢ. But the H that is left
has lost the sample's own JᵢᵀAᵢJᵢ. The whole Newton step (Pregibon, 1981; Rad & Maleki, 2020) is, by Woodbury,

    (N (H + λI) − JᵢᵀAᵢJᵢ)⁻¹ Jᵢᵀ rᵢ = (N (H + λI))⁻¹ Jᵢᵀ (I − AᵢMᵢ)⁻¹ rᵢ    with    Mᵢ = Jᵢ (N (H + λI))⁻¹ Jᵢᵀ,

so that scores are those of the Newton step where gᵢ is replaced by Jᵢᵀ (I − AᵢMᵢ)⁻¹ rᵢ. It is exact where the loss is
quadratic in the parameters. The largest eigenvalue of AᵢMᵢ is the sample's leverage: below 1 as long as H + λI stays
positive definite without the sample.

Shapes: ``B`` samples in a batch, ``K`` entries of one sample's outputs, ``D`` coordinates, ``N`` training samples that
H is of. Jᵢ (K, D) is the Jacobian of a sample's outputs, rᵢ (K,) the gradient of its loss in these, Aᵢ (K, K) the
Hessian.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.batch import only_tensors, size
from stages.curvature import Curvature
from stages.device_batch import DeviceBatch
from stages.grad_z import GradZ, Rows, norms
from stages.grad_z.choose import naming, relative_difference, tolerance
from stages.grad_z.fidelity import RoundTrip
from stages.grad_z.hooks import Hooks
from stages.jacobian import jacobian, loss_derivatives, one_by_one
from stages.parameters import ModelFunction
from stages.s_test.solver import Prepared, Solve, Solver
from stages.stage import ArraySpec, Batch, Progress, Report, Samples, StageError, silent

log = logging.getLogger(__name__)

Way = Callable[[ModelFunction, Batch], tuple[Tensor, Tensor]]
"""A way to each sample's Jacobian (B, K, D) and outputs (B, …)."""
COMPARED = 2
"""Samples on which a way to the Jacobian is compared with their gradients."""
SOLVING = 2
"""Vectors that are held for each row of the Jacobian beside those of the solver; measured."""
SMALL = 6
"""Matrices (K, K) that are held at once for each sample, at most."""


class Newton(GradZ):
    """Corrected training gradients: ``gradients`` (sample, coordinate), with each sample's leverage."""

    name = "newton"

    def __init__(
        self,
        solver: Solver,
        curvature: Curvature,
        prepared: Prepared,
        samples: Samples,
        block_rows: int,
        encoding: str,
        batch: DeviceBatch,
        round_trip: RoundTrip,
    ) -> None:
        """Lay out the corrected gradients of ``samples``, the first of which H is of, as their gradients are."""
        super().__init__(curvature.function, samples, block_rows, encoding, batch, round_trip)
        self.solver, self.curvature, self.prepared = solver, curvature, prepared
        gradients, *others = self.arrays
        each = ("sample",), (len(samples),), "float64"
        self.arrays = (
            replace(gradients, about="Jᵀ (I − AM)⁻¹ r, gradient of each training sample's loss as its absence counts"),
            *(spec for spec in others if spec.name != "projection_fidelity"),
            ArraySpec("leverage", *each, about="largest eigenvalue of AM: the sample's share of H where it is largest"),
            ArraySpec("residual", *each, about="largest |v − (H + λI) x| / |v| for the rows v of J"),
        )

    def held_bytes(self, samples: int) -> int:
        """Return what correcting so many samples together holds at once, at most, beside their gradients.

        That is two copies of the Jacobian while it is made; or what solving for its rows takes, and some matrices over
        the outputs.
        """
        few, itemsize = self.curvature.few, self.curvature.function.dtype.itemsize
        outputs = max(1, few.outputs)
        making = 2 * few.one_jacobian * itemsize + few.kept("ggn", self.curvature.function.device)
        solving = outputs * self.curvature.dim * itemsize * (self.solver.state_vectors + SOLVING)
        each = max(making, solving + SMALL * 8 * outputs**2)
        return self.solver.fixed_bytes(self.curvature) + each * samples

    def prepare(self, report: Report = silent) -> None:
        """Check model and data, and choose how gradients and Jacobians are computed."""
        super().prepare(report)
        self._jacobian  # noqa: B018 - chooses it

    def rows(self, ids: Sequence[int], report: Report = silent) -> Iterator[Rows]:
        """Yield the corrected gradients of samples, a batch at a time.

        Raises:
            StageError: some sample cannot be left out, or its derivatives are not finite; the message names it.
        """
        done = 0

        def corrected(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            return self._correction(batch, ids[done : done + size(batch)], report)

        for found in super().rows(ids, report):
            leverages, residuals, first = [], [], done
            for batch, (change_BD, leverage_B, residual_B) in self.per_sample.batch.pieces(found.batch, corrected):
                found.grads[done - first : done - first + len(change_BD)] += change_BD
                leverages.append(leverage_B)
                residuals.append(residual_B)
                done += size(batch)
                del change_BD
            evidence = {"leverage": torch.cat(leverages), "residual": torch.cat(residuals)}
            beside = {name: values.cpu().numpy() for name, values in evidence.items()}
            yield found._replace(norms=norms(found.grads), beside=beside)

    @functools.cached_property
    def _solve(self) -> Solve:
        return self.solver.start(self.curvature, self.prepared)

    def _correction(self, batch: Batch, ids: Sequence[int], report: Report) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is to be added to gradients (B, D), and leverages and residuals (B,).

        Raises:
            StageError: some sample cannot be left out, or its derivatives are not finite; the message names it.
        """

        def note(progress: Progress) -> None:
            report(Progress(note=progress.note))

        with naming(f"in the derivatives of samples {ids[0]} to {ids[-1]}"):
            rows_BKD, outputs = self._jacobian(self.curvature.function, batch)
            grads_BK, inner_BKK = _derivatives(self.curvature.function, batch, outputs)
        finite = torch.isfinite(rows_BKD.sum((1, 2)) + grads_BK.sum(1) + inner_BKK.sum((1, 2)))
        if not finite.all():
            sample = ids[int(torch.nonzero(~finite)[0])]
            raise StageError(
                f"training sample {sample} has outputs, or a second derivative of its loss in these, that are NaN or "
                "infinite: look at its inputs, or leave the correction out ([influence] correction)"
            )
        count, solution = len(self.curvature.samples), self._solve(rows_BKD.flatten(0, 1), note)
        vectors_BKD, residual_BK = solution.vectors.view_as(rows_BKD), solution.residual.view_as(grads_BK)
        leverage_BKK = rows_BKD.double() @ vectors_BKD.double().mT / count
        del solution, vectors_BKD
        leverage_BKK[torch.tensor([sample >= count for sample in ids])] = 0  # H is without these already
        extra_BK, leverage_B = correction(inner_BKK, leverage_BKK, grads_BK)
        most = 1 - torch.finfo(rows_BKD.dtype).eps ** 0.5
        if not (leverage_B < most).all():
            worst = int(leverage_B.argmax())
            raise StageError(
                f"training sample {ids[worst]} has a leverage of {float(leverage_B[worst]):.6g}, not below 1 but for "
                "rounding: without it H + λI would not be positive definite, so that there is no step to take. "
                "Use a larger damping or l2, or leave the correction out ([influence] correction)"
            )
        return _products(extra_BK, rows_BKD), leverage_B, residual_BK.amax(1)

    @functools.cached_property
    def _jacobian(self) -> Way:
        """The way to Jacobians, the fastest of those with which Jᵀr is the gradient.

        Raises:
            StageError: it is not, in whatever way.
        """
        function, technique = self.curvature.function, self.per_sample.technique
        batch = self.per_sample.samples.batch(range(min(COMPARED, self.grid.axes[0].length)))
        expected_BD, _ = technique(function, function.losses, batch)
        most = tolerance(function, function.losses, batch)
        ways: list[Way] = [functools.partial(jacobian, hooks=None)] if only_tensors(batch) else []
        if isinstance(technique, Hooks) and technique.names == frozenset(function.params):
            # Hooks project layer by layer; of what is not projected, vmap makes less.
            ways.insert(0 if function.projected else len(ways), functools.partial(jacobian, hooks=technique))
        for way in [*ways, one_by_one]:
            try:
                with naming("in the derivatives of the outputs"):
                    rows_BKD, outputs = way(function, batch)
                    grads_BK, _ = _derivatives(function, batch, outputs)
            except StageError as error:
                if way is one_by_one:
                    raise
                log.info("a way to the Jacobian cannot follow this model: %s", error)
                continue
            difference = relative_difference(_products(grads_BK, rows_BKD), expected_BD)
            if difference <= most:
                return way
            log.warning("a way to the Jacobian is not used: gradients by it differ by %.2g", difference)
        raise StageError(
            f"gradients differ by {difference:.2g} (relative) from those by way of Task.outputs and Task.losses: the "
            "losses must depend on the model through the outputs alone to be corrected ([influence] correction)"
        )


def _products(of_outputs_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """Return Jᵀ v of each sample, (B, D)."""
    return (of_outputs_BK.to(rows_BKD.dtype).unsqueeze(1) @ rows_BKD).squeeze(1)


def _derivatives(function: ModelFunction, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return each loss's gradient (B, K) and Hessian (B, K, K) in the outputs, in double precision."""
    gradient, product = loss_derivatives(function, batch, outputs)
    count, entries = size(batch), outputs.numel() // size(batch)
    units = torch.eye(entries, dtype=outputs.dtype, device=outputs.device)
    columns = product(units.unsqueeze(1).expand(-1, count, -1).reshape(-1, *outputs.shape))
    return gradient.reshape(count, -1).double(), columns.reshape(entries, count, -1).transpose(0, 1).double()


def correction(inner_BKK: Tensor, leverage_BKK: Tensor, grads_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return ((I − AM)⁻¹ − I) r for each sample, (B, K), and the largest eigenvalue of AM, (B,).

    With M = RRᵀ and RᵀAR = U diag(μ) Uᵀ, whose eigenvalues μ are those of AM, it is A R U diag(1 / (1 − μ)) Uᵀ Rᵀ r.

    Args:
        inner_BKK: A, symmetric.
        leverage_BKK: M, symmetric and positive semi-definite but for what solving leaves.
        grads_BK: r.
    """
    squares_BK, vectors_BKK = torch.linalg.eigh((leverage_BKK + leverage_BKK.mT) / 2)
    roots_BKK = vectors_BKK * squares_BK.clamp_min(0).sqrt().unsqueeze(1)
    shares_BK, turns_BKK = torch.linalg.eigh(roots_BKK.mT @ inner_BKK @ roots_BKK)
    turned_BKK = roots_BKK @ turns_BKK
    parts_BK1 = turned_BKK.mT @ grads_BK.unsqueeze(2) / (1 - shares_BK).unsqueeze(2)
    return (inner_BKK @ (turned_BKK @ parts_BK1)).squeeze(2), shares_BK[:, -1]
