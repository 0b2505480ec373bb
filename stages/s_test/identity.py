"""``identity``: no curvature at all, so that scores are plain products of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.s_test.solver import Prepared, Solution, Solve, Solver
from stages.stage import Report

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature


class Identity(Solver):
    """H + λI is taken to be the identity: x = v."""

    solver: Literal["identity"] = "identity"

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that gives back its right-hand sides."""
        import torch

        def solve(rhs_TD: Tensor, report: Report) -> Solution:
            zeros = torch.zeros(len(rhs_TD), dtype=torch.float64)
            return Solution(rhs_TD, zeros, zeros.long())

        return solve
