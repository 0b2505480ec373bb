"""``ekfac``: K-FAC's eigenvectors, with eigenvalues measured along each of them.

That is the approximation of George et al. (2018), used for influence functions by Grosse et al. (2023). What has no
factors has the diagonal of the Fisher matrix, as for :mod:`stages.s_test.kfac`, whose factors these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from stages.s_test.kfac import EigenbasisSolver, Kfac, factor_bytes, mean_eigenvalue
from stages.s_test.solver import Prepared
from stages.stage import Array, Report

if TYPE_CHECKING:
    from stages.curvature import Curvature
    from stages.kronecker import Factored
    from stages.parameters import ModelFunction


class Ekfac(EigenbasisSolver):
    """EK-FAC: eigenvalues are the second moments of gradients along the eigenvectors of a layer's factors."""

    solver: Literal["ekfac"] = "ekfac"

    def first(self) -> Kfac:
        """Return the solver that finds the eigenvectors."""
        return Kfac(fisher=self.fisher, seed=self.seed)

    def least_bytes(self, layers: Sequence[Factored]) -> int:
        """Return what the eigenvectors take: compressed, as they are kept, and as they are used."""
        return 3 * factor_bytes(layers)

    def summary_names(self) -> tuple[str, ...]:
        """Return the eigenvalues and their mean, and the distance from an optimum."""
        return ("gradient_norm", "mean_eigenvalue", "eigenvalues")

    def summary_dims(self, function: ModelFunction) -> dict[str, dict[str, int]]:
        """Return the dimension of the eigenvalues."""
        return {"eigenvalues": {"coordinate": function.size}}

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shape of the squares."""
        return {"square_sum": (function.size,)}

    def summed(self, function: ModelFunction) -> str:
        """Say what the sums are of."""
        return "squared gradients in the eigenbasis"

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum squared gradients in the eigenbasis."""
        vectors = self.basis(curvature, prepared, curvature.function.dtype).vectors
        positions_L = np.asarray(prepared["positions"][:]).tolist()
        squares_D = self.of(curvature).eigenvalue_sum(vectors, positions_L, ids, report)
        return {"square_sum": squares_D.cpu().numpy()}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Take the means of these."""
        eigenvalues_D = prepared["square_sum"][:] / len(curvature.samples)
        return {
            "gradient_norm": np.asarray(prepared["gradient_norm"][()]),
            "eigenvalues": eigenvalues_D,
            "mean_eigenvalue": mean_eigenvalue(eigenvalues_D, curvature),
        }
