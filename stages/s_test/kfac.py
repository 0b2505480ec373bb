"""``kfac``: the Fisher matrix with one Kronecker product for each layer (Martens & Grosse, 2015).

Layers are linear ones, convolutions (each group by itself) and tables, whose weight no other layer has, each with its
bias where both have the same l2; see :mod:`stages.kronecker`. Further calls of a layer are further positions. All other
parameters, and layers that hooks do not follow, have the diagonal of the Fisher matrix. H is that plus l2, and
(H + λI)⁻¹ is exact in the eigenbasis: the residual is that of this H, so that it has nothing but rounding; it does not
say how near this H is to the Gauss-Newton matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.s_test.solver import (
    DampedSolver,
    Damping,
    NotPositiveDefinite,
    Prepared,
    RelativeDamping,
    Solution,
    Solve,
    relative_residual,
)
from stages.stage import Array, Progress, Report, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature
    from stages.kronecker import Factored
    from stages.parameters import ModelFunction
    from stages.second_moments import SecondMoments


MEETING = 6
"""Arrays of what goes into a layer, comes back and is made of both that are held at once, at most."""


class EigenbasisSolver(DampedSolver):
    """A solver in the eigenbasis of layers' Kronecker factors.

    Attributes:
        fisher: "sampled" draws targets from the model's own distribution, which a task must know (``Task.sample``);
            "empirical" takes the training targets.

    Directions have eigenvalues of their own, of which the small ones are no worse known than the large: λ may be small.
    """

    state_vectors: ClassVar[int] = 15
    about: ClassVar[Mapping[str, str]] = {
        "gradient_sum": "sum of the gradients of a part of the training set",
        "factor_sum": "Σ g gᵀ and Σ a aᵀ of each layer over a part of the training set, upper triangles",
        "position_sum": "positions at which each layer was met in a part of the training set",
        "square_sum": "Σ of squared gradients over a part of the training set, in the eigenbasis where a layer has one",
        "gradient_norm": "Euclidean norm of the training objective's gradient, zero at an optimum",
        "mean_eigenvalue": "mean eigenvalue of H",
        "eigenvectors": "of the Kronecker factors S and A of each layer, one after the other",
        "eigenvalues": "of the approximation to H without l2, at the place of each eigenvector among the coordinates",
        "positions": "training samples times positions at which each layer was met, 0 for one without factors",
    }

    damping: Damping = RelativeDamping(relative=0.01)
    fisher: Literal["sampled", "empirical"] = "sampled"

    @property
    def draws(self) -> bool:
        """Whether targets are drawn."""
        return self.fisher == "sampled"

    def preparation(self) -> dict[str, Any]:
        """Return what the summary depends on: not λ, and the seed only where something is drawn."""
        found = {"curvature": self.solver, "fisher": self.fisher}
        return {**found, "seed": self.seed} if self.draws else found

    def of(self, curvature: Curvature) -> SecondMoments:
        """Return the sums over the training set that this solver takes."""
        from stages.second_moments import SecondMoments

        return SecondMoments(curvature, self.fisher, self.seed)

    def check_size(self, function: ModelFunction, memory_bytes: int) -> None:
        """Refuse coordinates without a Kronecker structure, and factors that do not fit.

        Raises:
            StageError: with what would do.
        """
        if function.projected:
            raise StageError(
                f'solver = "{self.solver}" needs the entries of weights, which [grad_z] projection mixes: leave it '
                'out, or use solver = "cg"'
            )
        layers = _layers(function)
        if not layers:
            raise StageError(
                f'solver = "{self.solver}" needs a linear layer, a convolution or an embedding with a weight of its '
                f'own, and {", ".join(function.params)} are none: use solver = "cg"'
            )
        needed = max(one.least_bytes(layers) for one in self.chain() if isinstance(one, EigenbasisSolver))
        if needed > memory_bytes:
            largest = max(layers, key=lambda layer: factor_bytes([layer]))
            raise StageError(
                f'solver = "{self.solver}" needs {needed / 2**30:.1f} GiB for the factors of {len(layers)} layers, and '
                f"runtime.memory is {memory_bytes / 2**30:.1f} GiB; {largest.names[0]} alone has factors of "
                f"{factor_bytes([largest]) / 2**30:.1f} GiB: leave it out by [grad_z] parameters, raise memory, or use "
                'solver = "cg"'
            )

    def least_bytes(self, layers: Sequence[Factored]) -> int:
        """Return what preparing and solving hold of factors at once, at most."""
        raise NotImplementedError

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what the eigenbasis takes, compressed and not, and the eigenvalues and their inverse."""
        return 2 * factor_bytes(_layers(curvature.function)) + 3 * 8 * curvature.dim

    def summing_bytes(self, curvature: Curvature) -> int:
        """Return what preparing holds beside its vectors: factors, activations, and what meets in a layer."""
        from stages.kronecker import CHUNK

        layers = _layers(curvature.function)
        kept = curvature.few.kept("gradients", curvature.function.device)
        widest = max(CHUNK, max(factor_bytes([layer]) // 8 for layer in layers))
        meeting = MEETING * widest * curvature.function.dtype.itemsize
        return self.least_bytes(layers) + curvature.batch.size * kept + meeting

    def preparing_vectors(self, curvature: Curvature) -> int:
        """Return the sums of gradients and squares, two of each, and one of them as it is made."""
        return 4 * 8 // curvature.function.dtype.itemsize + 2

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that divides by eigenvalues.

        Raises:
            NotPositiveDefinite: some eigenvalue and λ are both zero.
        """
        import torch

        function, damping = curvature.function, self.resolved(prepared)
        basis = self.basis(curvature, prepared, torch.float64)
        eigenvalues_D = torch.from_numpy(np.asarray(prepared["eigenvalues"][:])).to(function.device)
        eigenvalues_D = eigenvalues_D + function.l2()
        smallest, largest = float(eigenvalues_D.min()), float(eigenvalues_D.max())
        if smallest + damping <= torch.finfo(torch.float64).eps * largest:
            raise NotPositiveDefinite(smallest, largest, damping, "ggn")
        inverse_D = 1 / (eigenvalues_D + damping)

        def solve(rhs_TD: Tensor, report: Report) -> Solution:
            vectors = basis.scaled(rhs_TD, inverse_D)
            residual = relative_residual(lambda x: basis.scaled(x, eigenvalues_D), damping, rhs_TD, vectors)
            return Solution(vectors, residual, torch.zeros(len(rhs_TD), dtype=torch.int64))

        return solve

    def basis(self, curvature: Curvature, prepared: Prepared, dtype: Any) -> Any:
        """Return the eigenbasis that was prepared, in one dtype."""
        import torch

        from stages.kronecker import Eigenbasis, views

        function = curvature.function
        layers = _layers(function)
        flat = torch.from_numpy(np.asarray(prepared["eigenvectors"][:])).to(function.device, dtype)
        return Eigenbasis(layers, views(flat, layers), function.coordinates.columns)


class Kfac(EigenbasisSolver):
    """K-FAC: eigenvalues are the products of those of a layer's two factors."""

    solver: Literal["kfac"] = "kfac"

    def least_bytes(self, layers: Sequence[Factored]) -> int:
        """Return what sums over a part take, one that is made and one that is kept; and eigenvectors, beside sums.

        The heap keeps the former while the latter are found, which takes five arrays of a layer's factors.
        """
        packed, largest = _packed_bytes(layers), max(factor_bytes([layer]) for layer in layers)
        return factor_bytes(layers) + 4 * packed + max(3 * packed, packed + factor_bytes(layers) + 5 * largest)

    def summary_names(self) -> tuple[str, ...]:
        """Return the eigenbasis, the eigenvalues and their mean, and the distance from an optimum."""
        return ("gradient_norm", "mean_eigenvalue", "eigenvalues", "eigenvectors", "positions")

    def summary_dims(self, function: ModelFunction) -> dict[str, dict[str, int]]:
        """Return the dimensions of the eigenbasis."""
        from stages.kronecker import entries

        layers = _layers(function)
        return {
            "eigenvalues": {"coordinate": function.size},
            "eigenvectors": {"factor_entry": entries(layers)},
            "positions": {"layer": len(layers)},
        }

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the gradient, of the layers' factors, and of squares for all other parameters."""
        from stages.kronecker import packed_entries

        layers, dim = _layers(function), function.size
        factors = {"factor_sum": (packed_entries(layers),), "position_sum": (len(layers),)}
        return {"gradient_sum": (dim,), **factors, "square_sum": (dim,)}

    def summed(self, function: ModelFunction) -> str:
        """Say what the sums are of."""
        return f"the mean gradient and the factors of {len(_layers(function))} layers"

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum gradients, the outer products of what layers get and give back, and other squares."""
        import torch

        from stages.kronecker import entries, packed, views

        function, fisher = curvature.function, self.of(curvature)
        flat = torch.zeros(entries(fisher.layers), dtype=torch.float64, device=function.device)
        positions_L, squares_D, gradient_D = fisher.factor_sums(flat, ids, report)
        found = {"factor_sum": packed(views(flat, fisher.layers)), "position_sum": positions_L}
        found |= {"gradient_sum": gradient_D, "square_sum": squares_D}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Find the eigenvectors of all factors, in double precision."""
        import torch

        from stages.kronecker import entries, unpacked, views

        function, count = curvature.function, len(curvature.samples)
        layers, columns = _layers(function), function.coordinates.columns
        gradient = curvature.gradient(torch.from_numpy(prepared["gradient_sum"][:]).to(function.device))
        eigenvalues_D = torch.from_numpy(prepared["square_sum"][:]).to(function.device) / count
        flat = torch.zeros(entries(layers), dtype=torch.float64, device=function.device)
        sums = torch.from_numpy(prepared["factor_sum"][:]).to(function.device)
        positions_L = prepared["position_sum"][:]
        every = zip(layers, views(flat, layers), unpacked(sums, layers), positions_L.tolist(), strict=True)
        for number, (layer, (left, right), (left_sum, right_sum), positions) in enumerate(every):
            report(Progress(number, len(layers), f"eigenvectors of {layer.names[0]}"))
            along_left = _eigen(left_sum.div_(max(1.0, positions)), left)
            along_right = right_sum / count if layer.table else _eigen(right_sum.div_(count), right)
            if positions:
                products_GOI = along_left.unsqueeze(2) * along_right.reshape(layer.groups, 1, -1)
                layer.put(products_GOI.unsqueeze(0), eigenvalues_D.unsqueeze(0), columns)
        found = {
            "gradient_norm": np.asarray(float(gradient.norm())),
            "eigenvalues": eigenvalues_D.cpu().numpy(),
            "eigenvectors": flat.cpu().numpy(),
            "positions": positions_L,
        }
        found["mean_eigenvalue"] = mean_eigenvalue(found["eigenvalues"], curvature)
        return found


def mean_eigenvalue(eigenvalues_D: Array, curvature: Curvature) -> Array:
    """Return the mean eigenvalue of H."""
    return np.asarray(float(eigenvalues_D.mean()) + float(curvature.l2.double().mean()))


def _eigen(factors_Gnn: Tensor, out_Gnn: Tensor) -> Tensor:
    """Find the eigenvectors of positive semi-definite matrices, into ``out``; return the eigenvalues, (G, n)."""
    import torch

    values_Gn, vectors_Gnn = torch.linalg.eigh(factors_Gnn)
    out_Gnn.copy_(vectors_Gnn)
    found: Tensor = values_Gn.clamp_min_(0)
    return found


def factor_bytes(layers: Sequence[Factored]) -> int:
    """Return what the factors of layers take, as whole matrices."""
    from stages.kronecker import entries

    return 8 * entries(layers)


def _packed_bytes(layers: Sequence[Factored]) -> int:
    """Return what they take without those entries that symmetry gives."""
    from stages.kronecker import packed_entries

    return 8 * packed_entries(layers)


def _layers(function: ModelFunction) -> list[Factored]:
    from stages.kronecker import factored

    return factored(function)
