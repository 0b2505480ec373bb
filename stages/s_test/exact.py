"""``exact``: the dense matrix, factorised; for models of some thousands of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.s_test.solver import CurvatureSolver, NotPositiveDefinite, Prepared, Solution, Solve, relative_residual
from stages.stage import Array, ArrayLike, Report, StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.curvature import Curvature, Kind, Product
    from stages.parameters import ModelFunction


class Exact(CurvatureSolver):
    """Cholesky factorisation of the dense (D, D) matrix H + λI, in double precision."""

    state_vectors: ClassVar[int] = 11  # in double precision all but the first
    about: ClassVar[Mapping[str, str]] = {
        **CurvatureSolver.about,
        "matrix_sum": "Σ H_i over a part of the training set",
        "matrix": "H, dense",
    }

    solver: Literal["exact"] = "exact"

    def preparation(self) -> dict[str, Any]:
        """Return what the matrix depends on: no draws, and not λ."""
        return {"curvature": self.curvature, "summary": list(self.summary_names())}

    def summary_names(self) -> tuple[str, ...]:
        """Return the distance from an optimum, the matrix, and the mean eigenvalue, which its diagonal gives."""
        return ("gradient_norm", "mean_eigenvalue", "matrix")

    def summary_dims(self, function: ModelFunction) -> dict[str, dict[str, int]]:
        """Return the dimensions of the matrix."""
        return {"matrix": {"coordinate": function.size, "column": function.size}}

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the gradient and the matrix."""
        return {"gradient_sum": (function.size,), "matrix_sum": (function.size, function.size)}

    def summed(self, function: ModelFunction) -> str:
        """Say what the sums are of."""
        return "the mean gradient and the matrix"

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum gradients and matrices."""
        found = super().sums(curvature, ids, prepared, report)
        return {**found, "matrix_sum": curvature.matrix(ids, report).cpu().numpy()}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Make H of the sum."""
        matrix = np.array(prepared["matrix_sum"][:])
        matrix /= len(curvature.samples)
        matrix[np.diag_indices(len(matrix))] += curvature.l2.double().cpu().numpy()
        mean = np.asarray(np.trace(matrix) / len(matrix))
        return {**super().summary(curvature, prepared, report), "matrix": matrix, "mean_eigenvalue": mean}

    def over(self, curvature: Curvature, prepared: Prepared) -> Product:
        """Return what multiplies by the matrix."""
        import torch

        matrix = torch.from_numpy(np.asarray(prepared["matrix"][:])).to(curvature.function.device)
        return lambda vectors: (vectors.double() @ matrix).to(vectors.dtype)

    def over_bytes(self, curvature: Curvature) -> int:
        """Return what the matrix takes, and what it is read from."""
        return 2 * 8 * curvature.dim**2

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what H, its factor and one copy take."""
        return 3 * 8 * curvature.dim**2

    def check_size(self, function: ModelFunction, memory_bytes: int) -> None:
        """Refuse a matrix that does not fit: H, its factor and one copy are held at once.

        Raises:
            StageError: with the bytes needed and what would do.
        """
        dim = function.size
        needed = 3 * 8 * dim**2
        if needed > memory_bytes:
            fits = int((memory_bytes / 24) ** 0.5)
            raise StageError(
                f'solver = "exact" needs {needed / 2**30:.1f} GiB for a {dim} × {dim} matrix and its factor, '
                f"and runtime.memory is {memory_bytes / 2**30:.1f} GiB, enough for {fits} parameters: "
                'choose fewer by [grad_z] parameters, raise memory, or use solver = "cg"'
            )

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Factorise H + λI once.

        Raises:
            NotPositiveDefinite: H + λI has no factor.
        """
        return factorised(prepared["matrix"], self.resolved(prepared), self.curvature, curvature.function.device)


def factorised(dense: ArrayLike, damping: float, kind: Kind, device: torch.device) -> Solve:
    """Return the function that solves by the factor of a dense matrix.

    Args:
        dense: H, (D, D).
        damping: λ.
        kind: what H is.
        device: where it is factorised.

    Raises:
        NotPositiveDefinite: H + λI has no factor.
    """
    import torch

    matrix = torch.from_numpy(np.asarray(dense[:], dtype=np.float64)).to(device)
    matrix = (matrix + matrix.T).div_(2)
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    pivots = factor.diagonal()
    if failed or float(pivots.min() / pivots.max()) ** 2 < torch.finfo(torch.float64).eps:
        eigenvalues = torch.linalg.eigvalsh(matrix)
        raise NotPositiveDefinite(float(eigenvalues[0]), float(eigenvalues[-1]), damping, kind)

    def solve(rhs_TD: Tensor, report: Report) -> Solution:
        right = rhs_TD.double()
        vectors = torch.cholesky_solve(right.T, factor).T
        residual = relative_residual(lambda x: x @ matrix, damping, right, vectors)
        return Solution(vectors, residual, torch.zeros(len(right), dtype=torch.int64))

    return solve
