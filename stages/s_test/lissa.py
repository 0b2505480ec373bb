"""``lissa``: the stochastic recursion of Agarwal et al. (2017) as used by Koh & Liang (2017), in absolute terms.

    x ← x + (v − (H_b + λ) x) / scale,        from x = v / scale,

over minibatches b; in expectation its fixed point is (H + λI)⁻¹ v for every scale that lets it converge. (With
h = scale · x and damp = λ / scale this is the usual h ← v + (1 − damp) h − H_b h / scale, divided by scale at the
end, so that "damp 0.01, scale 25" means λ = 0.25.)

One recursion's estimate is the average of its later half (Polyak & Juditsky, 1992): same fixed point, far less
minibatch noise than its last iterate. It has settled where two doublings of the depth in a row change it by less than
the tolerance. Estimates from other sequences of minibatches (``repeats``) are averaged and give the standard error.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.numbers import Count, Fraction, Positive
from stages.s_test.solver import (
    CurvatureSolver,
    NotPositiveDefinite,
    Prepared,
    Solution,
    Solve,
    dots,
    norms,
    relative_residual,
)
from stages.stage import Array, Batch, Progress, Report, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature

log = logging.getLogger(__name__)

SCALE_BATCHES = 8
"""Minibatches whose largest eigenvalue is measured for ``scale = "auto"``."""
EIGENVALUE_STEPS = 12
"""Products for each of these eigenvalues."""
SCALE_MARGIN = 1.25
"""Other minibatches may have larger eigenvalues than these, and Lanczos' estimate is from below."""
LARGEST_AUTO_DEPTH = 50_000
LARGEST_AUTO_REPEATS = 16


class Lissa(CurvatureSolver):
    """Stochastic recursion over minibatches.

    Attributes:
        recursion_depth: steps at most in one recursion; "auto" goes on until the estimate has settled.
        repeats: recursions that are averaged; "auto" until the standard error is within the tolerance.
        scale: step size is 1 / scale; "auto" from the largest eigenvalue over some minibatches.
        batch_size: samples in a minibatch.
        tolerance: relative change of the estimate at which it counts as settled.
    """

    state_vectors: ClassVar[int] = 12
    about: ClassVar[Mapping[str, str]] = {
        **CurvatureSolver.about,
        "largest_eigenvalue": "largest eigenvalue of H over some minibatches",
    }

    solver: Literal["lissa"] = "lissa"
    recursion_depth: Literal["auto"] | Count = "auto"
    repeats: Literal["auto"] | Count = 1
    scale: Literal["auto"] | Positive = "auto"
    batch_size: Count = 64
    tolerance: Fraction = 0.05

    def summary_names(self) -> tuple[str, ...]:
        """Return the largest minibatch eigenvalue too, where the scale is to come of it."""
        names = super().summary_names()
        return (*names, "largest_eigenvalue") if self.scale == "auto" else names

    def preparation(self) -> dict[str, Any] | None:
        """Return what the summary depends on."""
        basis = super().preparation() or {}
        return {**basis, "batch_size": self.batch_size} if self.scale == "auto" else basis

    def preparing_vectors(self, curvature: Curvature) -> int:
        """Return those of the probes, or of the search for the largest eigenvalue."""
        return max(super().preparing_vectors(curvature), EIGENVALUE_STEPS + 4 if self.scale == "auto" else 0)

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Measure, beside the rest, the largest eigenvalue over some minibatches."""
        found = super().summary(curvature, prepared, report)
        if self.scale == "auto":
            found["largest_eigenvalue"] = np.asarray(self._largest(curvature))
        return found

    def _largest(self, curvature: Curvature) -> float:
        from stages.curvature import extreme_eigenvalues

        largest = 0.0
        drawn = itertools.islice(self._minibatches(curvature, 0), SCALE_BATCHES)
        with closing(curvature.samples.stream(drawn)) as batches:
            for batch in batches:
                product = curvature.on(batch)
                smallest, biggest = extreme_eigenvalues(
                    product, curvature.dim, curvature.l2, self.seed, EIGENVALUE_STEPS
                )
                largest = max(largest, biggest, -smallest)
        return largest

    def _minibatches(self, curvature: Curvature, repeat: int) -> Iterator[list[int]]:
        """Yield the ids of minibatches without end, each drawn anew; they depend on (seed, repeat) alone.

        Draws are independent of one another, since going through the data in epochs biases the fixed point.
        """
        count = len(curvature.samples)
        generator = np.random.default_rng([self.seed, repeat])
        while True:
            yield generator.choice(count, min(self.batch_size, count), replace=False).tolist()

    def uncorrectable(self) -> str:
        """Refuse vectors that are a few per cent off: a correction is as small where this solver is at its best.

        Measured on digits, with λ so large that it settles soon, exact corrections moved scores by less than its own
        errors did; and it took a hundred times as long.
        """
        return 'solver = "lissa" is less precise than corrections are large: use "exact" or "cg"'

    def passes(self) -> str:
        """Say how many minibatches are read."""
        steps = LARGEST_AUTO_DEPTH if self.recursion_depth == "auto" else self.recursion_depth
        repeats = LARGEST_AUTO_REPEATS if self.repeats == "auto" else self.repeats
        return f" of ≤ {steps * repeats} minibatches of {self.batch_size}"

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that iterates."""
        import torch

        damping = self.resolved(prepared)
        scale = self.scale
        if scale == "auto":
            scale = SCALE_MARGIN * float(prepared["largest_eigenvalue"][()]) + damping
        most = LARGEST_AUTO_REPEATS if self.repeats == "auto" else self.repeats
        if damping > 0 and self.recursion_depth == "auto":
            steps = scale / damping * math.log(1 / self.tolerance)
            log.info(
                "lissa: λ = %.3g, scale = %.3g: flat directions settle after about %.0f steps", damping, scale, steps
            )
        depth = LARGEST_AUTO_DEPTH if self.recursion_depth == "auto" else self.recursion_depth

        def solve(rhs_TD: Tensor, report: Report) -> Solution:
            mean, squares = torch.zeros_like(rhs_TD), torch.zeros(len(rhs_TD), dtype=torch.float64)
            steps, counts = torch.zeros(len(rhs_TD), dtype=torch.int64), torch.zeros(len(rhs_TD), dtype=torch.int64)
            active, settled = torch.ones(len(rhs_TD), dtype=torch.bool), torch.ones(len(rhs_TD), dtype=torch.bool)
            for repeat in range(most):
                rows = torch.nonzero(active).flatten()
                recursion = _Recursion(self, curvature, damping, scale, depth, repeat, report)
                estimate, used, done = recursion.run(rhs_TD[rows])
                steps[rows] += used
                settled[rows] &= done
                counts[rows] += 1
                before = estimate - mean[rows]
                mean[rows] += before / counts[rows].to(mean).unsqueeze(1)
                squares[rows] += dots(before, estimate - mean[rows]).cpu()
                if self.repeats == "auto" and repeat >= 2:
                    active &= ~(_standard_error(squares, counts) <= self.tolerance * norms(mean).cpu())
                if not active.any():
                    break
            self._tell(mean, squares, counts, steps, settled, depth)
            residual = relative_residual(lambda v: curvature.product(v, report=report), damping, rhs_TD, mean)
            return Solution(mean, residual, steps)

        return solve

    def _tell(self, mean: Tensor, squares: Tensor, counts: Tensor, steps: Tensor, settled: Tensor, depth: int) -> None:
        """Say what was not reached, and what was more than enough."""
        import torch

        goal = self.tolerance * norms(mean).cpu()
        unsettled = int((~settled).sum())
        per_repeat = int((steps / counts).max())
        if unsettled:
            log.warning(
                "lissa: the estimates of %d of %d samples have not settled within %.2g after %d steps: "
                "raise recursion_depth, batch_size or damping",
                unsettled, len(settled), self.tolerance, depth,
            )  # fmt: skip
        elif self.recursion_depth != "auto" and per_repeat < depth:
            log.info("lissa: settled after at most %d of %d steps", per_repeat, depth)
        used = int(counts.max())
        if used > 1:
            needed = torch.ceil(squares / (counts - 1).clamp_min(1) / goal.clamp_min(1e-300) ** 2)
            enough = max(1, int(needed.max()))
            if enough < used:
                log.info("lissa: %d repeats would have been within the tolerance; %d were made", enough, used)
            elif self.repeats == "auto" and (_standard_error(squares, counts) > goal).any():
                log.warning("lissa: above the tolerance %.2g after %d repeats: raise batch_size or damping",
                            self.tolerance, used)  # fmt: skip


def _standard_error(squares: Tensor, counts: Tensor) -> Tensor:
    """Return the standard error of each mean over repeats, (T,)."""
    return (squares / (counts * (counts - 1).clamp_min(1))).sqrt()


class _Recursion:
    """One recursion for some test samples, over one sequence of minibatches."""

    def __init__(
        self,
        settings: Lissa,
        curvature: Curvature,
        damping: float,
        scale: float,
        depth: int,
        repeat: int,
        report: Report,
    ) -> None:
        self.settings, self.curvature = settings, curvature
        self.damping, self.scale, self.depth = damping, scale, depth
        self.repeat, self.report = repeat, report

    def run(self, rhs_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the estimates (T, D), the steps that each took (T,), and whether each has settled (T,).

        Raises:
            StageError: the recursion diverges.
        """
        import torch

        estimate = rhs_TD / self.scale
        steps = torch.full((len(rhs_TD),), self.depth, dtype=torch.int64)
        settled, calm = torch.zeros(2, len(rhs_TD), dtype=torch.bool)
        # Test samples that have not settled, and what there is of these alone, so that the others cost nothing.
        rows = torch.arange(len(rhs_TD))
        start, norm, current = estimate, norms(estimate), estimate.clone()
        window, previous_window = torch.zeros_like(current), torch.zeros_like(current)
        estimate = estimate.clone()
        checkpoint = 0
        minibatches = itertools.islice(self.settings._minibatches(self.curvature, self.repeat), self.depth)
        with closing(self.curvature.samples.stream(minibatches)) as batches:
            for step, batch in enumerate(batches, 1):
                self._step(start, current, batch)
                window += current
                diverged = self._diverged(norm, current, step)
                if diverged:
                    break
                at_checkpoint = step == max(1, 2 * checkpoint)
                if at_checkpoint or step == self.depth:
                    if at_checkpoint:
                        found = window / (step - checkpoint)
                        previous_window, window = window, torch.zeros_like(window)
                        checkpoint = step
                    else:
                        found = (previous_window + window) / (step - checkpoint // 2)
                    change = norms(found - estimate[rows]) / norms(found).clamp_min(torch.finfo(torch.float64).tiny)
                    estimate[rows] = found
                    del found
                    small = (change <= self.settings.tolerance).cpu() & (step >= 4)
                    done = small & at_checkpoint & (calm[rows] | (step == self.depth))
                    calm[rows] = small
                    settled[rows[done]] = True
                    steps[rows[done]] = step
                    if done.any():
                        rows = rows[~done]
                        start, norm, current, window, previous_window = (
                            part[~done] for part in (start, norm, current, window, previous_window)
                        )
                self.report(Progress(step, self.depth, f"lissa step {step}, {len(rows)} samples"))
                if not len(rows):
                    break
        if diverged:
            raise self._divergence(step)
        return estimate, steps, settled

    def _step(self, start: Tensor, current: Tensor, batch: Batch) -> None:
        """Replace x by the next one."""
        import torch

        product = self.curvature.on(batch)(current)
        torch.add(start, current, alpha=1 - self.damping / self.scale, out=current).sub_(product, alpha=1 / self.scale)

    def _diverged(self, norm: Tensor, current: Tensor, step: int) -> bool:
        """Say whether some x has left where a recursion that converges stays, given its start's norm.

        That is |x| ≤ |v| · (step + 1) / scale, which is reached where H + λI is zero.
        """
        if step % 8 and step != self.depth:
            return False
        return not bool((norms(current) <= 10 * (step + 1) * norm).all())

    def _divergence(self, step: int) -> StageError:
        """Make the error for a recursion that diverges: with the damping, or the scale, that would have worked."""
        from stages.curvature import extreme_eigenvalues

        smallest, largest = extreme_eigenvalues(
            self.curvature.product, self.curvature.dim, self.curvature.l2, self.settings.seed, steps=40
        )
        if smallest + self.damping < 0:
            return NotPositiveDefinite(smallest, largest, self.damping, self.curvature.kind)
        needed = SCALE_MARGIN * self.settings._largest(self.curvature) + self.damping
        if needed <= self.scale:
            return StageError(
                f"lissa diverged after {step} steps with scale = {self.scale:.3g}, though minibatches' largest "
                f"eigenvalue is about {needed / SCALE_MARGIN:.3g}: use scale = {2 * self.scale:.2g} and a larger "
                "batch_size" + (', or curvature = "ggn"' if self.curvature.kind == "hessian" else "")
            )
        return StageError(
            f"lissa diverged after {step} steps: scale = {self.scale:.3g} is below the largest eigenvalue of the "
            f'minibatches. Use scale = {needed:.2g} or more, or scale = "auto".'
        )
