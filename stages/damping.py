"""``damping = "auto"``: the λ whose steps do what they should, found without training again.

Leaving out a part R of the training set changes the objective to F(θ) = (1/N) Σ_{i not in R} L_i(θ) + ½ Σ l2 θ², and
influence functions say that its optimum is at θ + δ with (H + λI) δ = (1/N) Σ_{i in R} ∇L_i. Where the loss is no
quadratic, or θ no optimum, such a step is too long in directions in which H is small, and F rises. As in the methods of
Levenberg (1944) and Marquardt (1963), λ is the one at which F(θ + δ) is least; here, on average over random halves R.

Shapes: ``R`` halves, ``D`` coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.numbers import Whole
from stages.s_test.solver import CurvatureSolver, Prepared, Solver
from stages.stage import Array, Progress, Report, StageError, silent

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature, Product
    from stages.parameters import ModelFunction, Parameters
    from stages.stage import Batch

HALVES = 4
"""Random halves that are left out: every second is the complement of the one before it."""
MOST_LOOKED_AT = 1024
"""Training samples on which F is computed, for each half."""
GRID = tuple(10 ** (2 - number / 2) for number in range(11))
"""λ as a multiple of the mean eigenvalue of H, the largest first."""
WORSE = 2
"""Steps down in which F must have risen before no smaller λ is tried."""
TOLERANCE, MOST_ITERATIONS = 0.03, 100
"""Of the solutions by conjugate gradients."""
VECTORS = 13
"""Vectors of D that are held at once for each half, and what the allocator keeps of those before, as measured."""


class AutoDamping(Solver):
    """What finds λ: it prepares for a solver whose own preparation comes before.

    Attributes:
        of: that solver.
        seed: of the halves.
    """

    about: ClassVar[Mapping[str, str]] = {
        "half_sum": "sum of the gradients of those samples of a part of the training set that are in each random half",
        "auto_damping": "λ at which the objective without a random half falls most by the step that leaves it out",
        "tried_damping": "λ that were tried",
        "objective_change": "by how much the objective without a random half changes by the step, NaN if not tried",
    }

    solver: Literal["auto_damping"] = "auto_damping"
    of: CurvatureSolver
    seed: Whole = 0

    def first(self) -> Solver:
        """Return the solver that it prepares for."""
        return self.of

    def preparation(self) -> dict[str, Any]:
        """Return what λ depends on: which H, and the halves."""
        of = {"solver": self.of.solver, **(self.of.preparation() or {})}
        sample = {"sample": self.of.sample} if hasattr(self.of, "sample") else {}
        return {**of, "damping": "auto", "seed": self.seed, **sample}

    def summary_names(self) -> tuple[str, ...]:
        """Return λ, and how it was found."""
        return ("auto_damping", "tried_damping", "objective_change")

    def summary_dims(self, function: ModelFunction) -> dict[str, dict[str, int]]:
        """Return how many λ may be tried."""
        return {"tried_damping": {"tried": len(GRID)}, "objective_change": {"tried": len(GRID)}}

    def guess(self, prepared: Prepared) -> dict[str, Array]:
        """Return the mean eigenvalue."""
        return {"auto_damping": np.asarray(self.of.mean_eigenvalue(prepared))}

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shape of the gradients of the halves."""
        return {"half_sum": (HALVES, function.size)}

    def summed(self, function: ModelFunction) -> str:
        """Say what the sums are of."""
        return f"the gradients of {HALVES} random halves, for λ"

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum the gradients of those samples that are in each half."""
        halves = halves_of(len(curvature.samples), self.seed)
        within = [sorted(half.intersection(ids)) for half in map(set, halves)]
        found_RD = np.empty((HALVES, curvature.dim))
        for row, some in enumerate(within):
            found_RD[row] = curvature.gradient_sum(some, report).cpu().numpy()
        return {"half_sum": found_RD}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Try one λ after the other."""
        import torch

        mean, product = self.of.mean_eigenvalue(prepared), self.of.over(curvature, prepared)
        sums_RD = torch.from_numpy(np.asarray(prepared["half_sum"][:]))
        rhs_RD = sums_RD.to(curvature.function.device, curvature.function.dtype, copy=True).div_(len(curvature.samples))
        found = tried(curvature, product, mean, rhs_RD, self.seed, self.together(curvature), report)
        named = {"auto_damping": found.best, "tried_damping": found.dampings, "objective_change": found.changes}
        return {name: np.asarray(value) for name, value in named.items()}

    def together(self, curvature: Curvature) -> int:
        """Return for how many halves is solved at once: as many as the memory has room for."""
        numbers = curvature.dim * curvature.function.dtype.itemsize
        left = curvature.memory_bytes - self.of.over_bytes(curvature) - self._kept_bytes(curvature)
        return max(1, min(HALVES, left // (VECTORS * numbers)))

    def summing_bytes(self, curvature: Curvature) -> int:
        """Return what the sums take while they are added up, or solving with them, and products with H."""
        numbers = curvature.dim * curvature.function.dtype.itemsize
        solving = self._kept_bytes(curvature) + VECTORS * self.together(curvature) * numbers
        # Those of a part, of the part before while it is written, encoded, and the gradients that are added up.
        return max(4 * 8 * HALVES * curvature.dim, solving) + self.of.over_bytes(curvature)

    def _kept_bytes(self, curvature: Curvature) -> int:
        """Return what the sums take, as they are and as right-hand sides."""
        return HALVES * curvature.dim * (8 + curvature.function.dtype.itemsize)


@dataclass(frozen=True)
class Tried:
    """What came of each λ.

    Attributes:
        dampings: λ, the largest first, (n,).
        changes: F(θ + δ) − F(θ), the mean over halves, (n,); NaN where it was not tried.
    """

    dampings: tuple[float, ...]
    changes: tuple[float, ...]

    @property
    def best(self) -> float:
        """λ at which F is least.

        Raises:
            StageError: at none of them it could be computed.
        """
        pairs = zip(self.changes, self.dampings, strict=True)
        found = [(change, damping) for change, damping in pairs if not math.isnan(change)]
        if not found:
            raise StageError(
                f'damping = "auto": H + λI is not positive definite even for λ = {self.dampings[0]:.3g}: '
                'give a number, or use curvature = "ggn"'
            )
        return min(found)[1]


def tried(
    curvature: Curvature, product: Product, mean: float, rhs_RD: Tensor, seed: int, together: int, report: Report
) -> Tried:
    """Try one λ after the other.

    Args:
        curvature: over the training set.
        product: H x for each row.
        mean: eigenvalue of H, positive.
        rhs_RD: Σ ∇L / N over each half, (R, D).
        seed: of the halves.
        together: halves for which is solved at once.
        report: of progress.
    """
    import torch

    count = len(curvature.samples)
    halves = halves_of(count, seed)
    looked_at = [_kept(curvature, half, seed) for half in halves]
    before = [_mean_loss(curvature, ids, curvature.function.params) for ids in looked_at]
    dampings, changes = [factor * mean for factor in GRID], [math.nan] * len(GRID)
    for number, damping in enumerate(dampings):
        report(Progress(number, len(GRID), "damping"))
        after: list[tuple[float, float]] = []
        for some_RD in torch.split(rhs_RD, together):
            steps_RD = _solved(product, damping, some_RD)
            if steps_RD is None:
                return Tried(tuple(dampings), tuple(changes))  # nor is any smaller one enough
            for step_D in steps_RD:
                after.append(_moved(curvature, looked_at[len(after)], step_D))
        changes[number] = _mean_change([1 - len(half) / count for half in halves], before, after)
        if _rising(changes[: number + 1]):
            break
    return Tried(tuple(dampings), tuple(changes))


def _mean_change(shares: Sequence[float], before: Sequence[float], after: Sequence[tuple[float, float]]) -> float:
    """Return the mean of F(θ + δ) − F(θ), given the share of samples that each F is of, and :func:`_moved`."""
    changes = [s * (loss - at) + penalty for s, at, (loss, penalty) in zip(shares, before, after, strict=True)]
    return sum(changes) / len(changes)


def _rising(changes: Sequence[float]) -> bool:
    """Return whether the last steps down have all made it worse, beyond the first that made it better."""
    steps = [after - before for before, after in pairwise(changes)]
    return (
        len(steps) >= WORSE and all(not step <= 0 for step in steps[-WORSE:]) and any(change < 0 for change in changes)
    )


def halves_of(count: int, seed: int) -> list[list[int]]:
    """Return the samples of each half, in ascending order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    halves: list[list[int]] = []
    for _ in range(HALVES // 2):
        order = torch.randperm(count, generator=generator)
        halves += [sorted(order[: count // 2].tolist()), sorted(order[count // 2 :].tolist())]
    return halves


def _kept(curvature: Curvature, half: Sequence[int], seed: int) -> list[int]:
    """Return samples that are not in the half, a random choice where there are many."""
    import torch

    left = sorted(set(range(len(curvature.samples))).difference(half))
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[:MOST_LOOKED_AT]
    return [left[position] for position in sorted(order.tolist())]


def _solved(product: Product, damping: float, rhs_RD: Tensor) -> Tensor | None:
    """Return the steps δ, (R, D); None where H + λI is not positive definite."""
    from stages.s_test.cg import conjugate_gradients

    found, _, _ = conjugate_gradients(lambda x: product(x).add_(x, alpha=damping), rhs_RD, TOLERANCE, MOST_ITERATIONS)
    return found


def _moved(curvature: Curvature, ids: Sequence[int], step_D: Tensor) -> tuple[float, float]:
    """Return the mean loss of samples at θ + δ, and by how much the penalty is larger there."""
    import torch

    function = curvature.function
    step = function.unflatten(step_D)
    moved = {name: values + step[name] for name, values in function.params.items()}
    penalty = sum(
        0.5 * weight * float((step[name] * (2 * function.params[name] + step[name])).sum(dtype=torch.float64))
        for name, weight in function.penalties().items()
        if weight
    )
    return _mean_loss(curvature, ids, moved), penalty


def _mean_loss(curvature: Curvature, ids: Sequence[int], params: Parameters) -> float:
    """Return the mean loss of samples; not a number where some loss is not."""
    import torch

    def summed(batch: Batch, now: Sequence[int]) -> float:
        with torch.no_grad():
            return float(curvature.function.losses(params, batch).sum(dtype=torch.float64))

    return sum(found for _, _, found in curvature.pieces(ids, summed, "losses", silent)) / len(ids)
