"""``cg``: conjugate gradients (Hestenes & Stiefel, 1952), one recurrence for each test sample.

All test samples of a block share the passes over the training set, and nothing else: each stops by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from stages.numbers import Count, Fraction
from stages.s_test.nystrom import Nystrom
from stages.s_test.solver import (
    CurvatureSolver,
    Prepared,
    Sample,
    Solution,
    Solve,
    check_sample,
    dots,
    fixed_sample,
    negative_curvature,
    norms,
    relative_residual,
)
from stages.stage import Progress, Report, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature, Product, Repeated
    from stages.parameters import ModelFunction

log = logging.getLogger(__name__)

HOPELESS = 10
"""Largest relative residual that is kept; zero has 1, and iterates on the way to a solution may have a few times 1."""


class Cg(CurvatureSolver):
    """Conjugate gradients over the full training set, or a fixed sample of it.

    Attributes:
        tolerance: of the relative residual.
        max_iterations: products with H at most, for each test sample.
        sample: "all", or how many training samples H is taken over.
        preconditioner: "none"; or "nystrom", by whose approximation residuals are divided: that changes how many
            iterations are needed, and not what is solved.
        rank: of that approximation.
    """

    state_vectors: ClassVar[int] = 9

    solver: Literal["cg"] = "cg"
    tolerance: Fraction = 1e-3
    max_iterations: Count = 200
    sample: Sample = "all"
    preconditioner: Literal["none", "nystrom"] = "none"
    rank: Count = 128

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.preconditioner != "nystrom" and self.rank != type(self).model_fields["rank"].default:
            raise ValueError('rank is of preconditioner = "nystrom"')
        if self.preconditioner == "nystrom" and self.curvature != "ggn":
            raise ValueError('preconditioner = "nystrom" is of the Gauss-Newton matrix: use curvature = "ggn"')
        return self

    def first(self) -> Nystrom | None:
        """Return the solver whose approximation is the preconditioner."""
        return None if self.preconditioner == "none" else Nystrom(rank=self.rank, seed=self.seed)

    def preparation(self) -> dict[str, Any] | None:
        """Return what the summary depends on; it stands beside what the preconditioner prepares."""
        found, first = super().preparation() or {}, self.first()
        return found if first is None else {**found, "preconditioner": first.preparation()}

    def check_size(self, function: ModelFunction, memory_bytes: int) -> None:
        """Refuse a preconditioner that does not fit."""
        if (first := self.first()) is not None:
            first.check_size(function, memory_bytes)

    def row_bytes(self, curvature: Curvature) -> int:
        """Return what it holds for each right-hand side: preconditioned, two vectors more."""
        more = 0 if self.preconditioner == "none" else 2
        return super().row_bytes(curvature) + more * curvature.dim * curvature.function.dtype.itemsize

    def check_samples(self, count: int) -> None:
        """Refuse to take more samples than there are."""
        check_sample(self.sample, count)

    def uncorrectable(self) -> str:
        """Refuse an H over some training samples: others cannot be taken out of it."""
        if self.sample == "all":
            return ""
        return f'sample = {self.sample}: H must be of all training samples, so that each can be taken out: "all"'

    def passes(self) -> str:
        """Say how often the training set is read."""
        of = "the training set" if self.sample == "all" else f"{self.sample} training samples"
        return f" of ≤ {self.max_iterations} passes over {of}"

    def over(self, curvature: Curvature, prepared: Prepared) -> Repeated:
        """Return what multiplies by the H of all training samples, or of the fixed sample."""
        return curvature.over(fixed_sample(self.sample, len(curvature.samples), self.seed))

    def over_bytes(self, curvature: Curvature) -> int:
        """Return what products with H take, and the Jacobian that is kept between them."""
        count = len(curvature.samples) if self.sample == "all" else int(self.sample)
        return curvature.product_bytes + curvature.kept_bytes(count)

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return that, and what the preconditioner takes."""
        first = self.first()
        return self.over_bytes(curvature) + (0 if first is None else first.held_bytes(curvature))

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that iterates; it refuses an (H + λI) that is not, or hardly, positive definite."""
        import torch

        damping = self.resolved(prepared)
        over, first = self.over(curvature, prepared), self.first()
        precondition = None if first is None else first.inverse(curvature, prepared, damping, leave=False)

        def solve(rhs_TD: Tensor, report: Report) -> Solution:
            calls = 0

            def product(vectors: Tensor) -> Tensor:
                def inner(progress: Progress) -> None:
                    report(Progress(calls, self.max_iterations, f"cg iteration {calls}, {len(vectors)} samples"))

                return over(vectors, inner)

            def damped(vectors: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return product(vectors).add_(vectors, alpha=damping)

            vectors, iterations, residual = conjugate_gradients(
                damped, rhs_TD, self.tolerance, self.max_iterations, precondition
            )
            if vectors is None:
                raise negative_curvature(curvature, over, damping, self.seed)
            unknown = torch.nonzero(residual.isnan()).flatten()
            if len(unknown):
                residual[unknown] = relative_residual(product, damping, rhs_TD[unknown], vectors[unknown])
            if float(residual.max()) > HOPELESS:
                raise self._hopeless(curvature, over, damping, residual)
            missed = int((residual > 1.5 * self.tolerance).sum())
            if missed:
                log.warning(
                    "cg: %d of %d samples are above the tolerance %.1g (largest residual %.2g after %d "
                    "iterations): raise max_iterations, tolerance or damping",
                    missed, len(residual), self.tolerance, float(residual.max()), int(iterations.max()),
                )  # fmt: skip
            report(Progress(self.max_iterations, self.max_iterations, "cg"))
            return Solution(vectors, residual, iterations)

        return solve

    def _hopeless(self, curvature: Curvature, over: Product, damping: float, residual: Tensor) -> StageError:
        """Make the error for solutions that are far worse than zero, with a damping that would do.

        The number of steps is at most ½√κ ln(2√κ / tolerance) for the condition number κ (Saad, 2003, 6.11.3).
        """
        from stages.curvature import extreme_eigenvalues

        smallest, largest = extreme_eigenvalues(over, curvature.dim, curvature.l2, self.seed, steps=60)
        condition = (2 * self.max_iterations / math.log(2 * self.max_iterations / self.tolerance)) ** 2
        enough = 1.1 * (max(0.0, -smallest) + largest / condition)
        return StageError(
            f"cg: the residual of {int((residual > HOPELESS).sum())} of {len(residual)} samples is above "
            f"{HOPELESS} (up to {float(residual.max()):.2g}) after {self.max_iterations} iterations, so that they are "
            f"no solutions: H + λI is nearly singular, with eigenvalues of H from about {smallest:.3g} to "
            f"{largest:.3g} and λ = {damping:.3g}. Use damping = {enough:.2g} or more, or raise max_iterations."
        )


def conjugate_gradients(
    product: Any,
    rhs_TD: Tensor,
    tolerance: float,
    max_iterations: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Solve A x = v for each row v of ``rhs_TD`` by conjugate gradients from x = 0.

    The recurrence's residual drifts from the true one in single precision; where it claims to be done, the true
    residual is measured, and iteration starts again from there as long as that gains a factor of two.

    Args:
        product: A, (T, D) -> (T, D), symmetric positive definite.
        rhs_TD: right-hand sides.
        tolerance: of |v − A x| / |v|.
        max_iterations: products at most, for each row.
        precondition: (T, D) -> (T, D), symmetric positive definite, near A⁻¹; what is measured is the residual itself.

    Returns:
        The solutions (T, D), None where A was found not to be positive definite; the products used, (T,); and the
        relative residuals where the true ones were measured at the end, NaN where iterations ran out, (T,).
    """
    import torch

    def towards(left: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step from each residual, and its product with that."""
        if precondition is None:
            return left, norms(left) ** 2
        step = precondition(left)
        return step, dots(left, step)

    goal = tolerance * norms(rhs_TD)
    vectors = torch.zeros_like(rhs_TD)
    iterations = torch.zeros(len(rhs_TD), dtype=torch.int64)
    residual = rhs_TD.clone()
    best = norms(residual)
    size, true = best.clone(), best.clone()
    active = best > goal
    while active.any():
        true[active] = torch.nan
        # Rows that have not stopped, and what there is of these alone, so that the others cost nothing.
        rows = torch.nonzero(active).flatten()
        found, left = vectors[rows], residual[rows]
        turned, square = towards(left)
        direction = turned.clone()
        while len(rows):
            image = product(direction)
            iterations[rows.cpu()] += 1
            curve = dots(direction, image)
            if not (curve > 0).all():
                return None, iterations, true
            step = (square / curve).unsqueeze(1).to(left.dtype)
            found.addcmul_(step, direction)
            left.addcmul_(step, image, value=-1)
            del image
            turned, following = towards(left)
            direction.mul_((following / square).unsqueeze(1).to(left.dtype)).add_(turned)
            del turned
            square = following
            length = norms(left) if precondition else square.sqrt()
            on = (length > goal[rows]) & (iterations[rows.cpu()] < max_iterations).to(rows.device)
            if not on.all():
                vectors[rows[~on]], residual[rows[~on]] = found[~on], left[~on]
                rows, found, left, direction, square = (part[on] for part in (rows, found, left, direction, square))
        active &= (iterations < max_iterations).to(active.device)
        rows = torch.nonzero(active).flatten()
        if len(rows):
            residual[rows] = rhs_TD[rows] - product(vectors[rows])
            iterations[rows.cpu()] += 1
            size_left = norms(residual[rows])
            active[rows] = (size_left > goal[rows]) & (size_left < best[rows] / 2)
            best[rows] = true[rows] = size_left
    return vectors, iterations, torch.where(size > 0, true / size, true)
