"""``fisher``: H = GᵀG / N + diag(l2) of the cached gradients alone, so that preparing needs no model.

(GᵀG/N + B) x = v with B = λI + diag(l2) is solved by the smaller side. By coordinates, H is a dense (D, D) matrix. By
samples it is Woodbury's identity: x = B⁻¹ (v − Gᵀ w) with (N I + G B⁻¹ Gᵀ) w = G B⁻¹ v, (N, N). With a ``rank`` r, w is
sought among the columns of a basis Q (N, r) alone (a Galerkin condition), which is the exact solution with Ĥ = GᵀQQᵀG/N
in the place of GᵀG/N. Ĥ never has more of any direction than that; what it lacks, E, changes (H + λI)⁻¹ by at most
|E| / (λ (λ + |E|)) (Frangella, Tropp & Udell, 2023, "Randomized Nyström preconditioning", proposition 3.1), and is
nothing where r is N. The share of the trace that Ĥ has is kept, and the residual of every solution is that
of all gradients.

For a Gauss-Newton matrix, GᵀG / N is an estimate with the observed targets in the place of drawn ones, the "empirical"
Fisher matrix; of projected gradients it is (ΦᵀΦ)⁻¹ of TRAK (Park et al., 2023).

Shapes: ``N`` training samples, ``D`` coordinates, ``T`` test samples, ``P`` different penalties, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.numbers import Count
from stages.s_test.exact import factorised
from stages.s_test.solver import DampedSolver, Prepared, Solution, Solve
from stages.stage import ArrayLike, Report, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature
    from stages.gradients import Gradients
    from stages.s_test.preparation import Sources
    from stages.s_test.prepare_fisher import OfGradients

Form = Literal["coordinates", "samples", "rank"]
BAND = 1024
"""Samples whose products with all others are computed in a block, and added to their transpose at once."""


class Fisher(DampedSolver):
    """The empirical Fisher matrix, by the smaller of its two sides, or of low rank.

    Attributes:
        rank: "full", or of how many columns the basis is, for when neither (N, N) nor (D, D) fits the memory.
    """

    of_gradients: ClassVar[bool] = True

    solver: Literal["fisher"] = "fisher"
    rank: Literal["full"] | Count = "full"

    def preparation(self) -> dict[str, Any]:
        """Return what is prepared: not λ, which is added when solving."""
        return {"curvature": "fisher", **({} if self.rank == "full" else {"rank": self.rank, "seed": self.seed})}

    def form(self, count: int, dim: int) -> Form:
        """Return how N and D are solved, by these numbers alone."""
        return "rank" if self.rank != "full" else "coordinates" if dim <= count else "samples"

    def preparing(self, sources: Sources, memory_bytes: int) -> OfGradients:
        """Return the stage that prepares, by the form that N and D ask for.

        Raises:
            StageError: it does not fit the memory.
        """
        from stages.gradients import runs
        from stages.s_test.prepare_fisher import OfCoordinates, OfRank, OfSamples

        count, dim, l2 = len(sources.curvature.samples), sources.curvature.dim, sources.curvature.l2
        penalties, form = len(runs(l2)[0]), self.form(count, dim)
        self.check(count, dim, penalties, memory_bytes)
        gradients = sources.gradients(form == "coordinates")
        if form == "coordinates":
            return OfCoordinates(gradients, l2, sources.parts(count, dim**2))
        if form == "samples":
            return OfSamples(gradients, l2, sources.band("row", BAND))
        rank = int(self.rank)
        return OfRank(gradients, l2, sources.parts(dim, penalties * rank**2), rank, self.seed)

    def check(self, count: int, dim: int, penalties: int, memory_bytes: int) -> None:
        """Refuse what does not fit the memory, and a rank that there is not.

        Raises:
            StageError: with the bytes needed and what would do.
        """
        if self.rank != "full" and self.rank > min(count, dim):
            raise StageError(
                f"rank = {self.rank}, and {count} gradients of {dim} coordinates have at most {min(count, dim)}: "
                'choose fewer, or rank = "full"'
            )
        needed = self.preparing_bytes(count, dim, penalties)
        needed = max(needed, self._solving_bytes(count, dim) + self._row_bytes(count, dim, 4))
        if needed <= memory_bytes:
            return
        fits = 1
        while 2 * fits <= min(count, dim) and self._of_rank(2 * fits, count, dim, penalties) <= memory_bytes:
            fits *= 2
        lower = self._of_rank(fits, count, dim, penalties) <= memory_bytes
        what = {
            "coordinates": f"a {dim} × {dim} matrix and its factor",
            "samples": f"{count} × {count} products of gradients and their factor",
            "rank": f"a basis of {count} × {self.rank}",
        }[self.form(count, dim)]
        raise StageError(
            f'solver = "fisher" needs {needed / 2**30:.1f} GiB for {what}, and runtime.memory is '
            f"{memory_bytes / 2**30:.1f} GiB: raise it{f', or use rank = {fits}' * lower}"
        )

    def _of_rank(self, rank: int, count: int, dim: int, penalties: int) -> int:
        """Return what a rank takes at once."""
        other = self.model_copy(update={"rank": rank})
        solving = other._solving_bytes(count, dim) + other._row_bytes(count, dim, 4)
        return max(other.preparing_bytes(count, dim, penalties), solving)

    def preparing_bytes(self, count: int, dim: int, penalties: int) -> int:
        """Return what preparing holds at once."""
        from stages.s_test.prepare_fisher import coordinates_bytes, rank_bytes, samples_bytes

        match self.form(count, dim):
            case "coordinates":
                return coordinates_bytes(count, dim)
            case "samples":
                return samples_bytes(count, dim, penalties, BAND)
            case "rank":
                return rank_bytes(count, dim, penalties, int(self.rank))

    def _solving_bytes(self, count: int, dim: int) -> int:
        """Return what solving holds at once, beside what each test sample takes."""
        from stages.gradients import reading_bytes

        form = self.form(count, dim)
        if form == "coordinates":
            return 3 * 8 * dim**2
        beside = reading_bytes(count, dim) + 3 * 8 * dim
        if form == "samples":
            return 2 * 8 * count**2 + beside
        return 8 * (count * int(self.rank) + 3 * int(self.rank) ** 2) + beside

    def _row_bytes(self, count: int, dim: int, itemsize: int) -> int:
        from stages.gradients import widest

        if self.form(count, dim) == "coordinates":
            return (2 * itemsize + 6 * 8) * dim
        return 3 * itemsize * dim + 3 * 8 * widest(dim) + 3 * 8 * count

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what factors or the basis take, and tiles of the gradients."""
        return self._solving_bytes(len(curvature.samples), curvature.dim)

    def row_bytes(self, curvature: Curvature) -> int:
        """Return what each test sample takes: vectors, what is summed of a tile, and its products with gradients."""
        return self._row_bytes(len(curvature.samples), curvature.dim, curvature.function.dtype.itemsize)

    def passes(self) -> str:
        """Say how often gradients are read."""
        return " of ≤ 4 passes over grad_z"

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Factorise what is solved for w, or H + λI.

        Raises:
            NotPositiveDefinite: H + λI, by coordinates, has no factor.
            StageError: B is not positive, by samples.
        """
        import torch

        from stages.gradients import Gradients, runs

        damping, gradients = self.resolved(prepared), prepared["gradients"]
        assert isinstance(gradients, Gradients)
        if self.form(*gradients.shape) == "coordinates":
            return factorised(prepared["matrix"], damping, "ggn", gradients.device)
        base_D = curvature.l2.double() + damping
        if not float(base_D.min()) > 0:
            mean = float(prepared["mean_eigenvalue"][()])
            raise StageError(
                f"H + λI is not positive definite: {gradients.count} gradients do not span {gradients.dim} "
                f"coordinates, of which some have no l2, and λ = {damping:.3g}. "
                f"Use damping = {1e-3 * mean:.2g} or more."
            )
        weights_P = 1 / (torch.tensor(runs(curvature.l2)[0], dtype=torch.float64, device=gradients.device) + damping)
        if "basis" in prepared:
            inner = _by_basis(prepared["basis"], prepared["gram"], weights_P)
        else:
            inner = _by_samples(prepared["gram"], weights_P)
        return lambda rhs_TD, report: solve(gradients, base_D, inner, rhs_TD, report)


def solve(
    gradients: Gradients, base_D: Tensor, inner: Callable[[Tensor], Tensor], rhs_TD: Tensor, report: Report
) -> Solution:
    """Solve by Woodbury's identity, and measure the residual: two passes over the gradients for each.

    Args:
        gradients: G.
        base_D: the diagonal of B.
        inner: solves (N I + G B⁻¹ Gᵀ) w = y for the columns of (N, T).
        rhs_TD: right-hand sides.
        report: of progress.
    """
    import torch

    weights_NT = inner(gradients.products(rhs_TD, 1 / base_D, report))
    vectors_TD = torch.empty_like(rhs_TD)
    for part, sum_Tc in gradients.combined(weights_NT, report):
        vectors_TD[:, part] = (rhs_TD[:, part] - sum_Tc) / base_D[part]
    weights_NT = gradients.products(vectors_TD, report=report).div_(gradients.count)
    left_T, size_T = torch.zeros(2, len(rhs_TD), dtype=torch.float64, device=rhs_TD.device)
    for part, sum_Tc in gradients.combined(weights_NT, report):
        right_Tc = rhs_TD[:, part].double()
        size_T += right_Tc.square().sum(1)
        left_T += (sum_Tc + base_D[part] * vectors_TD[:, part] - right_Tc).square().sum(1)
    residual = torch.where(size_T > 0, left_T / size_T.clamp_min(torch.finfo(torch.float64).tiny), left_T).sqrt()
    return Solution(vectors_TD, residual, torch.zeros(len(rhs_TD), dtype=torch.int64))


def _by_samples(gram: ArrayLike, weights_P: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what solves with N I + Σ weight G_p G_pᵀ; ``gram`` is to be added to its transpose for that, (P, N, N)."""
    import torch

    penalties, count, _ = gram.shape
    matrix = torch.zeros(count, count, dtype=torch.float64, device=weights_P.device)
    bands = [slice(start, min(start + BAND, count)) for start in range(0, count, BAND)]
    for penalty in range(penalties):
        for band in bands:
            part = torch.from_numpy(np.asarray(gram[penalty : penalty + 1, band])[0]).to(matrix.device)
            matrix[band] += part.mul_(weights_P[penalty])
    for number, rows in enumerate(bands):  # the lower triangle is all that is read
        for columns in bands[: number + 1]:
            matrix[rows, columns] = matrix[rows, columns] + matrix[columns, rows].T
    matrix.diagonal().add_(count)
    factor = _factor(matrix)
    return lambda right_NT: _substituted(factor, right_NT)


def _by_basis(basis: ArrayLike, gram: ArrayLike, weights_P: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what solves with the same in the span of a basis (N, r), of whose gradients ``gram`` has (P, r, r)."""
    import torch

    basis_Nr = torch.from_numpy(np.asarray(basis[:])).to(weights_P.device)
    gram_Prr = torch.from_numpy(np.asarray(gram[:])).to(weights_P.device)
    matrix = torch.tensordot(weights_P, gram_Prr, dims=1)
    matrix.diagonal().add_(len(basis_Nr))
    factor = _factor(matrix)
    return lambda right_NT: basis_Nr @ _substituted(factor, basis_Nr.T @ right_NT)


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of N I and products of gradients, of which the lower triangle is read.

    Raises:
        StageError: rounding of the products hides N I.
    """
    import torch

    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise StageError("λ is so small that products of gradients are beyond double precision: use a larger damping")
    return factor


def _substituted(factor: Tensor, right: Tensor) -> Tensor:
    """Solve with a lower Cholesky factor, of which no copy is made."""
    import torch

    half = torch.linalg.solve_triangular(factor, right, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return found
