"""What a solver is: its settings, what it prepares once for all test sets, and how it solves.

Every solver returns X with (H + λI) x = v for each row v of the right-hand sides, and its evidence.

Settings are read by commands that compute nothing, so that PyTorch, and what needs it, is imported here and in the
solvers' files where it is used, not at their heads.
Shapes: ``T`` test samples, ``D`` coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from stages.numbers import Count, Number, Positive, Whole
from stages.stage import Array, ArrayLike, Report, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature, Kind, Product
    from stages.parameters import ModelFunction
    from stages.s_test.preparation import Preparation, Sources


class RelativeDamping(BaseModel):
    """λ as a multiple of the mean eigenvalue of H."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    relative: Positive


def _form(value: object) -> str:
    """Return which form of damping is meant, so that what is wrong is said of that form alone."""
    if isinstance(value, (Mapping, RelativeDamping)):
        return "table"
    return "name" if isinstance(value, str) and not value.replace(".", "").isdigit() else "absolute"


Damping = Annotated[
    Annotated[Number, Field(ge=0), Tag("absolute")]
    | Annotated[RelativeDamping, Tag("table")]
    | Annotated[Literal["auto"], Tag("name")],
    Discriminator(_form),
]
Prepared = Mapping[str, ArrayLike]
PROBES = 32
"""Random vectors by which the mean eigenvalue of H is estimated."""
PROBE_VECTORS = 6
"""Vectors that are held for each of them that is multiplied by H."""
SPARE = 8
"""One part in so many of the memory is left to what the heap keeps of what stages before have freed."""


@dataclass(frozen=True)
class Solution:
    """The answer for some test samples, with its evidence.

    Attributes:
        vectors: X (T, D).
        residual: |v − (H + λI) x| / |v| for each, (T,); 0 where v is 0.
        iterations: products with the curvature that each took, (T,).
    """

    vectors: Tensor
    residual: Tensor
    iterations: Tensor


Solve = Callable[["Tensor", Report], Solution]


class Solver(BaseModel):
    """The settings of one way to solve; a subclass in a file of its own adds a solver.

    Attributes:
        state_vectors: vectors of D floats that it holds for each right-hand side at once, products' results among them.
        of_gradients: whether it is made of the cached gradients, and not of the model and the training set.
        about: a sentence on each array that it prepares, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_vectors: ClassVar[int] = 3
    of_gradients: ClassVar[bool] = False
    about: ClassVar[Mapping[str, str]] = {}

    solver: str

    @property
    def draws(self) -> bool:
        """Whether preparing draws targets from the model's own distribution."""
        return False

    def first(self) -> Solver | None:
        """Return the solver whose preparation comes before this one's, which reads it; None where there is none."""
        return None

    def last(self) -> Solver:
        """Return the solver whose preparation solving reads, with those before it: this one, or one that follows it."""
        return self

    def chain(self) -> list[Solver]:
        """Return the solvers whose preparations are needed, in the order in which they are made."""
        found: list[Solver] = []
        solver: Solver | None = self.last()
        while solver is not None:
            found.insert(0, solver)
            solver = solver.first()
        return found

    def guess(self, prepared: Prepared) -> dict[str, Array]:
        """Return what stands in for the :meth:`summary` where time is measured before it is there.

        Args:
            prepared: what the :meth:`first` solver prepared.
        """
        return {}

    def preparation(self) -> dict[str, Any] | None:
        """Return what :meth:`summary` depends on, None where nothing is prepared."""
        return None

    def preparing(self, sources: Sources, memory_bytes: int) -> Preparation:
        """Return the stage that prepares: sums over parts of the training set, and their :meth:`summary`, by default.

        Raises:
            StageError: it does not fit the memory.
        """
        from stages.s_test.prepare import Prepare

        curvature = sources.curvature
        summed = sum(map(math.prod, self.sum_shapes(curvature.function).values()))
        return Prepare(self, curvature, sources.parts(len(curvature.samples), summed), sources.prepared)

    def summary_names(self) -> tuple[str, ...]:
        """Return the names of what :meth:`summary` finds."""
        return ()

    def summary_dims(self, function: ModelFunction) -> dict[str, dict[str, int]]:
        """Return the dimensions, by name, of what :meth:`summary` finds that is more than a number."""
        return {}

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the :meth:`sums`, by name."""
        return {}

    def summed(self, function: ModelFunction) -> str:
        """Say, for people, what is summed over the training set."""
        return ""

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum over some training samples what :meth:`summary` takes the sum of over all, float64.

        Args:
            curvature: over the training set.
            ids: the samples.
            prepared: what the :meth:`first` solver prepared.
            report: of progress.
        """
        return {}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Find once what all test samples share.

        Args:
            curvature: over the training set.
            prepared: the sums over all of that, and what the :meth:`first` solver prepared.
            report: of progress.
        """
        return {}

    def summing_bytes(self, curvature: Curvature) -> int:
        """Return what preparing holds beside its vectors: sums over a part while they are added up, and products."""
        summed = sum(8 * math.prod(shape) for shape in self.sum_shapes(curvature.function).values())
        return 3 * summed + curvature.product_bytes

    def preparing_vectors(self, curvature: Curvature) -> int:
        """Return how many vectors of D floats preparing holds at once."""
        return 0

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what it holds beside its vectors."""
        return 0

    def row_bytes(self, curvature: Curvature) -> int:
        """Return what it holds for each right-hand side."""
        return self.state_vectors * curvature.dim * curvature.function.dtype.itemsize

    def rows_within(self, curvature: Curvature, memory_bytes: int, beside_bytes: int) -> int:
        """Return how many right-hand sides are solved for together, at least one, with so much held beside these."""
        return max(1, (memory_bytes - memory_bytes // SPARE - beside_bytes) // self.row_bytes(curvature))

    def check_size(self, function: ModelFunction, memory_bytes: int) -> None:
        """Refuse a problem that this solver cannot hold, or has no answer for.

        Raises:
            StageError: with the bytes needed and what would do.
        """

    def check_samples(self, count: int) -> None:
        """Refuse a training set that is too small for this solver's settings.

        Raises:
            StageError: it has fewer samples than are asked for.
        """

    def uncorrectable(self) -> str:
        """Say why gradients cannot be corrected for leverage with this solver, and what can; nothing where they can."""
        return f'solver = "{self.solver}" has no H that a sample could have leverage in: use "exact" or "cg"'

    def passes(self) -> str:
        """Say, for people, how often the training set is read for each block."""
        return ""

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that solves, with whatever it sets up once."""
        raise NotImplementedError(f"{type(self).__name__}.start")

    def resolved(self, prepared: Prepared) -> float:
        """Return λ, 0 for a solver without damping."""
        return 0.0


class DampedSolver(Solver):
    """A solver with damping.

    Attributes:
        damping: λ ≥ 0, absolute, or ``{ relative = r }`` times the mean eigenvalue of H; or "auto", see
            :mod:`stages.damping`, for solvers that have products with H.
        seed: of every random draw.
    """

    damping: Damping = RelativeDamping(relative=0.1)
    seed: Whole = 0

    @field_validator("damping")
    @classmethod
    def _has_products(cls, value: Damping) -> Damping:
        """Refuse what is found by products with H where there are none.

        Raises:
            ValueError: it is that.
        """
        if value == "auto" and not issubclass(cls, CurvatureSolver):
            raise ValueError('"auto" is for "exact", "cg" and "lissa": give a number, or { relative = 0.1 }')
        return value

    def resolved(self, prepared: Prepared) -> float:
        """Return λ.

        Raises:
            StageError: λ is relative to a mean eigenvalue that is not positive.
        """
        if self.damping == "auto":
            return float(prepared["auto_damping"][()])
        if not isinstance(self.damping, RelativeDamping):
            return float(self.damping)
        return self.damping.relative * self.mean_eigenvalue(prepared)

    def mean_eigenvalue(self, prepared: Prepared) -> float:
        """Return the mean eigenvalue of H, for a λ that is relative to it.

        Raises:
            StageError: it is not positive.
        """
        mean = float(prepared["mean_eigenvalue"][()])
        if not mean > 0:
            other = ', or use curvature = "ggn"' if getattr(self, "curvature", None) == "hessian" else ""
            raise StageError(
                f"damping relative to the mean eigenvalue of H, and that is {mean:.3g}: "
                f"give an absolute `damping`{other}"
            )
        return mean


class CurvatureSolver(DampedSolver):
    """A solver against (H + λI).

    Attributes:
        curvature: "ggn" (positive semi-definite for losses that are convex in the outputs) or "hessian".
    """

    about: ClassVar[Mapping[str, str]] = {
        "gradient_sum": "sum of the gradients of a part of the training set",
        "probe_sum": "vᵀ Σ H_i v over a part of the training set, for random signs v",
        "gradient_norm": "Euclidean norm of the training objective's gradient, zero at an optimum",
        "mean_eigenvalue": "mean eigenvalue of H",
    }

    damping: Damping = "auto"
    curvature: Literal["hessian", "ggn"] = "ggn"

    def last(self) -> Solver:
        """Return what finds λ, where that is "auto": all else is prepared as for any λ that is relative."""
        from stages.damping import AutoDamping

        return AutoDamping(of=self, seed=self.seed) if self.damping == "auto" else self

    def over(self, curvature: Curvature, prepared: Prepared) -> Product:
        """Return what multiplies by the H that is solved for again and again."""
        return curvature.over(range(len(curvature.samples)))

    def over_bytes(self, curvature: Curvature) -> int:
        """Return what it holds."""
        return curvature.product_bytes + curvature.kept_bytes(len(curvature.samples))

    def uncorrectable(self) -> str:
        """Say nothing: H is of all training samples, so that each can be taken out of it."""
        return ""

    def preparation(self) -> dict[str, Any] | None:
        """Return what the summary depends on: not λ, which is added when solving."""
        names = list(self.summary_names())
        return {"curvature": self.curvature, "seed": self.seed, "summary": names}

    def summary_names(self) -> tuple[str, ...]:
        """Return the distance from an optimum, and the mean eigenvalue where λ comes of it."""
        return ("gradient_norm",) if isinstance(self.damping, (int, float)) else ("gradient_norm", "mean_eigenvalue")

    def sum_shapes(self, function: ModelFunction) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the gradient and, where they are wanted, of the quadratic forms of probes."""
        probes: dict[str, tuple[int, ...]] = (
            {"probe_sum": (PROBES,)} if "mean_eigenvalue" in self.summary_names() else {}
        )
        return {"gradient_sum": (function.size,), **probes}

    def summed(self, function: ModelFunction) -> str:
        """Say what the sums are of."""
        products = self.sum_shapes(function).get("probe_sum", (0,))[0]
        return "the mean gradient" + (f" and {products} products with H" if products else "")

    def sums(self, curvature: Curvature, ids: Sequence[int], prepared: Prepared, report: Report) -> dict[str, Array]:
        """Sum gradients and, where they are wanted, quadratic forms of probes."""
        import torch

        from stages.curvature import few_random_signs

        found = {"gradient_sum": curvature.gradient_sum(ids, report)}
        if "probe_sum" in self.sum_shapes(curvature.function):
            signs = few_random_signs(PROBES, curvature.dim, curvature.l2, self.seed, self.probes_together(curvature))
            found["probe_sum"] = torch.cat([curvature.forms(few, ids, report) for few in signs])
        return {name: value.cpu().numpy() for name, value in found.items()}

    def summary(self, curvature: Curvature, prepared: Prepared, report: Report) -> dict[str, Array]:
        """Measure |ḡ + l2·θ|, and estimate the mean eigenvalue where λ is relative to it."""
        import torch

        gradient = curvature.gradient(torch.from_numpy(prepared["gradient_sum"][:]).to(curvature.function.device))
        found = {"gradient_norm": float(gradient.norm())}
        if "probe_sum" in prepared:
            found["mean_eigenvalue"] = curvature.mean_eigenvalue(torch.from_numpy(prepared["probe_sum"][:]))
        return {name: np.asarray(value) for name, value in found.items()}

    def probes_together(self, curvature: Curvature) -> int:
        """Return how many probes share a pass over the training set: as many as the memory has room for."""
        left = curvature.memory_bytes - self.summing_bytes(curvature)
        return max(1, min(PROBES, left // (PROBE_VECTORS * curvature.dim * curvature.function.dtype.itemsize)))

    def preparing_vectors(self, curvature: Curvature) -> int:
        """Return the vectors of probes, where there are any."""
        wanted = "probe_sum" in self.sum_shapes(curvature.function)
        return PROBE_VECTORS * self.probes_together(curvature) if wanted else 2 * PROBE_VECTORS

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what products with H take."""
        return curvature.product_bytes


def norms(vectors_TD: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, (T,), in double precision."""
    import torch

    found: Tensor = torch.linalg.vector_norm(vectors_TD, dim=1, dtype=torch.float64)
    return found


def dots(first_TD: Tensor, second_TD: Tensor) -> Tensor:
    """Return the product of each row with the other's, (T,), in double precision: a few rows' copies at a time."""
    import torch

    pairs = zip(torch.split(first_TD, 8), torch.split(second_TD, 8), strict=True)
    return torch.cat([torch.linalg.vecdot(first.double(), second.double()) for first, second in pairs])


def relative_residual(product: Product, damping: float, rhs_TD: Tensor, vectors_TD: Tensor) -> Tensor:
    """Return |v − (H + λI) x| / |v| for each row, (T,); 0 where v and x are 0."""
    import torch

    scale = norms(rhs_TD)
    left = norms(rhs_TD - product(vectors_TD) - damping * vectors_TD)
    return torch.where(scale > 0, left / scale.clamp_min(torch.finfo(torch.float64).tiny), left)


class NotPositiveDefinite(StageError):
    """(H + λI) is not positive definite; the message names the damping that would do."""

    def __init__(self, smallest: float, largest: float, damping: float, kind: Kind) -> None:
        """Say what is so.

        Args:
            smallest: smallest eigenvalue of H, or a bound from above.
            largest: largest eigenvalue of H.
            damping: λ.
            kind: what H is.
        """
        enough = max(1.1 * -smallest, 1e-6 * largest)
        other = ', or use curvature = "ggn"' if kind == "hessian" else ""
        super().__init__(
            f"H + λI is not positive definite: the smallest eigenvalue of H is about {smallest:.3g} "
            f"(largest {largest:.3g}) and λ = {damping:.3g}. Use damping = {enough:.2g} or more{other}."
        )


def negative_curvature(curvature: Curvature, product: Product, damping: float, seed: int) -> NotPositiveDefinite:
    """Make the error for negative curvature that a solver met, measuring the ends of the spectrum."""
    from stages.curvature import extreme_eigenvalues

    smallest, largest = extreme_eigenvalues(product, curvature.dim, curvature.l2, seed, steps=60)
    return NotPositiveDefinite(smallest, largest, damping, curvature.kind)


Sample = Literal["all"] | Count


def check_sample(sample: int | str, count: int) -> None:
    """Refuse to take more training samples than there are.

    Raises:
        StageError: with both numbers.
    """
    if sample != "all" and int(sample) > count:
        raise StageError(f"sample = {sample}, and the training set has {count} samples")


def fixed_sample(sample: int | str, count: int, seed: int) -> list[int] | range:
    """Return the training samples that H is taken over: all, or a fixed random choice in ascending order.

    Raises:
        StageError: more samples are asked for than there are.
    """
    import torch

    if sample == "all":
        return range(count)
    check_sample(sample, count)
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[: int(sample)].tolist())
