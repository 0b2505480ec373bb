"""``nystrom``: the Gauss-Newton matrix K as one of low rank, of its products with random vectors.

Of Y = ΩK with random Ω (r, D), the Nyström approximation is K̂ = Yᵀ (ΩYᵀ)⁻¹ Y = Uᵀ diag(values) U, found by the stable
algorithm of Frangella, Tropp & Udell (2023, "Randomized Nyström preconditioning", algorithm 2.1): K is shifted by a
little, factorised, and shifted back. All of that is done with products of rows with one another, (r, r), in double
precision. K̂ never has more of any direction than K, and gets most of the directions of large curvature right.

(K̂ + B)⁻¹ v, with B = λI + diag(l2), is Woodbury's identity. Directions that K̂ does not have are divided by λ + l2,
where H + λI has more. The residual says how much that is: it is measured with H itself, by one product for each test
sample.

K must be positive semi-definite, so that there is none of the Hessian.

Shapes: ``T`` test samples, ``D`` coordinates, ``r`` rank, ``c`` coordinates of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.numbers import Count
from stages.s_test.preparation import Preparation, Sources
from stages.s_test.prepare import probe_losses, probes
from stages.s_test.solver import (
    PROBE_VECTORS,
    DampedSolver,
    Damping,
    Prepared,
    RelativeDamping,
    Solution,
    Solve,
    relative_residual,
)
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Progress, Report, StageError, silent

if TYPE_CHECKING:
    from torch import Tensor

    from stages.curvature import Curvature
    from stages.parameters import ModelFunction

BAND = 64
"""Random vectors that are multiplied by H in one block."""
KEPT = 4
"""Sets of vectors that are held while eigenvectors are found: random ones, their products as they are read and as they
were kept, and compressed eigenvectors."""
PART_ENTRIES = 2**22
"""Of vectors that are in double precision at once."""


class Nystrom(DampedSolver):
    """A Nyström approximation to the Gauss-Newton matrix.

    Attributes:
        damping: by default ten times that of other solvers, since directions that are left out are divided by it alone.
        rank: random vectors that are multiplied by H.
    """

    state_vectors: ClassVar[int] = 6

    solver: Literal["nystrom"] = "nystrom"
    damping: Damping = RelativeDamping(relative=1.0)
    rank: Count = 256

    def preparation(self) -> dict[str, Any]:
        """Return what is prepared: not λ, which is added when solving."""
        return {"curvature": "nystrom", "rank": self.rank, "seed": self.seed}

    def preparing(self, sources: Sources, memory_bytes: int) -> Sketch:
        """Return the stage that multiplies."""
        return Sketch(sources.curvature, self.rank, self.seed, sources.band("vector", BAND))

    def check_size(self, function: ModelFunction, memory_bytes: int) -> None:
        """Refuse more vectors than fit, or than there are coordinates.

        Raises:
            StageError: with the bytes needed and what would do.
        """
        if self.rank > function.size:
            raise StageError(f"rank = {self.rank}, and there are {function.size} coordinates: choose fewer")
        each = KEPT * function.size * function.dtype.itemsize
        if self.rank * each > memory_bytes:
            fits = max(1, memory_bytes // each)
            raise StageError(
                f"rank = {self.rank} needs {self.rank * each / 2**30:.1f} GiB for vectors of {function.size} "
                f"coordinates, and runtime.memory is {memory_bytes / 2**30:.1f} GiB, enough for rank = {fits}"
            )

    def fixed_bytes(self, curvature: Curvature) -> int:
        """Return what the vectors take, compressed and not, parts of them, and products."""
        return self.held_bytes(curvature) + curvature.product_bytes

    def held_bytes(self, curvature: Curvature) -> int:
        """Return what the vectors take, as they are kept and as they are used, and parts of them."""
        entries = self.rank * curvature.dim
        itemsize = curvature.function.dtype.itemsize
        return 2 * entries * itemsize + 2 * 8 * min(PART_ENTRIES, entries) + 3 * 8 * self.rank**2

    def passes(self) -> str:
        """Say how often the training set is read."""
        return " of 1 pass over the training set"

    def start(self, curvature: Curvature, prepared: Prepared) -> Solve:
        """Return the function that solves by Woodbury's identity, and measures the residual with H itself.

        Raises:
            StageError: λ is not positive, and some coordinates have no l2.
        """
        import torch

        damping = self.resolved(prepared)
        inverse = self.inverse(curvature, prepared, damping)

        def solve(rhs_TD: Tensor, report: Report) -> Solution:
            vectors = inverse(rhs_TD)
            residual = relative_residual(lambda x: curvature.product(x, report=report), damping, rhs_TD, vectors)
            return Solution(vectors, residual, torch.zeros(len(rhs_TD), dtype=torch.int64))

        return solve

    def inverse(
        self, curvature: Curvature, prepared: Prepared, damping: float, *, leave: bool = True
    ) -> Callable[[Tensor], Tensor]:
        """Return what multiplies rows by (K̂ + B)⁻¹.

        Args:
            curvature: over the training set.
            prepared: the vectors and values.
            damping: λ.
            leave: directions that K̂ does not have as they are; otherwise they are given its smallest value, which is
                about what K has there at most.

        Raises:
            StageError: B is not positive.
        """
        import torch

        function = curvature.function
        vectors_rD = torch.from_numpy(np.asarray(prepared["eigenvectors"][:])).to(function.device)
        values_r = torch.from_numpy(np.asarray(prepared["eigenvalues"][:])).to(function.device)
        base_D = curvature.l2.double() + damping
        if not leave:
            base_D = base_D + values_r.min()
            values_r = values_r - values_r.min()
        if not float(base_D.min()) > 0:
            raise StageError(
                f"H + λI is not positive definite: rank {self.rank} leaves directions without curvature, and some "
                f"coordinates have no l2. Use a damping > 0"
            )
        return woodbury(vectors_rD, values_r, base_D)


def woodbury(vectors_rD: Tensor, values_r: Tensor, base_D: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what multiplies rows by (diag(base) + Uᵀ diag(values) U)⁻¹, U being the vectors."""
    import torch

    rank, dim = vectors_rD.shape
    root_r1 = values_r.sqrt().unsqueeze(1)
    core_rr = torch.eye(rank, dtype=torch.float64, device=vectors_rD.device)
    for part in _parts(rank, dim):
        scaled_rc = vectors_rD[:, part] * root_r1
        core_rr.addmm_(scaled_rc / base_D[part], scaled_rc.T)
    factor_rr = torch.linalg.cholesky(core_rr)

    def inverse(rhs_TD: Tensor) -> Tensor:
        parts = list(_parts(rank + len(rhs_TD), dim))
        right_rT = torch.zeros(rank, len(rhs_TD), dtype=torch.float64, device=rhs_TD.device)
        for part in parts:
            right_rT.addmm_(vectors_rD[:, part].double(), (rhs_TD[:, part] / base_D[part]).T)
        weights_Tr = (torch.cholesky_solve(right_rT * root_r1, factor_rr) * root_r1).T
        found_TD = torch.empty_like(rhs_TD)
        for part in parts:
            found_TD[:, part] = (rhs_TD[:, part] - weights_Tr @ vectors_rD[:, part].double()) / base_D[part]
        return found_TD

    return inverse


class Sketch(Preparation):
    """Products of random vectors with H, and what comes of them: a block has those of some vectors."""

    def __init__(self, curvature: Curvature, rank: int, seed: int, band: int) -> None:
        """Lay out the products of ``rank`` vectors, ``band`` in a block."""
        self.curvature, self.rank, self.seed = curvature, rank, seed
        dim, dtype = curvature.dim, str(curvature.function.dtype).removeprefix("torch.")
        count = len(probes(len(curvature.samples)))
        self.grid = Grid((Axis("vector", rank, band),))
        about = "products of random vectors with H, without l2"
        self.arrays = (ArraySpec("sketch", ("vector", "coordinate"), (rank, dim), dtype, about=about),)
        self.merged = (
            ArraySpec("probe_loss", ("probe",), (count,), about="of some samples"),
            ArraySpec("gradient_norm", (), (), "float64", about="norm of the objective's gradient, zero at an optimum"),
            ArraySpec("mean_eigenvalue", (), (), "float64", about="mean eigenvalue of H"),
            ArraySpec("kept_trace", (), (), "float64", about="share of the trace that the approximation has"),
            ArraySpec("eigenvalues", ("rank",), (rank,), "float64", about="of the approximation to H without l2"),
            ArraySpec("eigenvectors", ("rank", "coordinate"), (rank, dim), dtype, about="of that, one in each row"),
        )

    unit = "vectors"

    @property
    def needed(self) -> tuple[str, ...]:
        """All that comes of the products."""
        return ("gradient_norm", "mean_eigenvalue", "eigenvalues", "eigenvectors")

    @property
    def passes(self) -> str:
        """A block is a pass."""
        return f"{self.rank} products with H"

    @property
    def held_bytes(self) -> int:
        """Products, or all vectors while they are turned into eigenvectors; or looking at samples before."""
        from stages.grad_z.choose import choosing_bytes

        function, band = self.curvature.function, min(self.rank, self.grid.axes[0].band)
        row = self.curvature.dim * function.dtype.itemsize
        multiplying = self.curvature.product_bytes + row * (band + PROBE_VECTORS * self._together)
        return max(multiplying, _vector_bytes(self.rank, function), choosing_bytes(function))

    @property
    def _together(self) -> int:
        """How many vectors share a pass over the training set: as many as the memory has room for."""
        curvature, band = self.curvature, min(self.rank, self.grid.axes[0].band)
        row = curvature.dim * curvature.function.dtype.itemsize
        left = curvature.memory_bytes - curvature.product_bytes - band * row
        return max(1, min(band, left // (PROBE_VECTORS * row)))

    def prepare(self, report: Report = silent) -> None:
        """Check model and training data."""
        self.curvature.per_sample.check()

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Multiply some vectors."""
        curvature, rows = self.curvature, block.ids("vector")
        samples, found = range(len(curvature.samples)), []
        for start in range(0, len(rows), self._together):
            vectors = self._random(rows[start : start + self._together])
            found.append(curvature.total(vectors, samples, report).div_(len(samples)).cpu().numpy())
        return {"sketch": np.concatenate(found)}

    def _random(self, rows: Sequence[int]) -> Tensor:
        """Return some of the random vectors; each has a stream of its own."""
        import torch

        dim, like = self.curvature.dim, self.curvature.l2
        found = torch.empty(len(rows), dim, dtype=like.dtype)
        for row, into in zip(rows, found, strict=True):
            drawn = np.random.default_rng([self.seed, row]).standard_normal(dim, dtype=np.float32)
            into.copy_(torch.from_numpy(drawn))
        return found.to(like.device)

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Find the eigenvectors."""
        import torch

        curvature, ids = self.curvature, probes(len(self.curvature.samples))
        losses = probe_losses(curvature.function, curvature.samples, ids)
        gradient = curvature.gradient(curvature.gradient_sum(range(len(curvature.samples)), report))
        random_rD = self._random(range(self.rank))
        sketch_rD = torch.from_numpy(np.asarray(arrays["sketch"][:])).to(random_rD.device)
        report(Progress(note="eigenvectors"))
        trace, values_r = eigenvectors(random_rD, sketch_rD)
        return {
            "probe_loss": losses,
            "gradient_norm": np.asarray(float(gradient.norm())),
            "mean_eigenvalue": np.asarray(trace / curvature.dim + float(curvature.l2.double().mean())),
            "kept_trace": np.asarray(float(values_r.sum()) / trace if trace else 1.0),
            "eigenvalues": values_r.cpu().numpy(),
            "eigenvectors": sketch_rD.cpu().numpy(),
        }


def eigenvectors(random_rD: Tensor, sketch_rD: Tensor) -> tuple[float, Tensor]:
    """Find the eigenvectors of the Nyström approximation, in the place of the products.

    Args:
        random_rD: Ω, independent standard normal numbers.
        sketch_rD: ΩK.

    Returns:
        An estimate of the trace of K; and the eigenvalues, (r,) in descending order.
    """
    import torch

    rank, dim = sketch_rD.shape
    of_random, mixed, of_sketch = torch.zeros(3, rank, rank, dtype=torch.float64, device=sketch_rD.device)
    for part in _parts(2 * rank, dim):
        random_rc, sketch_rc = random_rD[:, part].double(), sketch_rD[:, part].double()
        of_random.addmm_(random_rc, random_rc.T)
        mixed.addmm_(random_rc, sketch_rc.T)
        of_sketch.addmm_(sketch_rc, sketch_rc.T)
    mixed = (mixed + mixed.T) / 2
    orthonormal = torch.linalg.inv(torch.linalg.cholesky(of_random))
    shift, factor = _shifted(orthonormal @ mixed @ orthonormal.T, torch.finfo(sketch_rD.dtype).eps)
    half = torch.linalg.solve_triangular(factor, orthonormal, upper=False)
    squares_r, turn = torch.linalg.eigh(half @ (of_sketch + 2 * shift * mixed + shift**2 * of_random) @ half.T)
    squares_r, turn = squares_r.flip(0).clamp_min(0), turn.flip(1)
    # What the shift alone makes is no direction: its value is nothing, and its vector left zero.
    along = turn.T @ half * torch.where(squares_r > shift, squares_r.rsqrt(), 0).unsqueeze(1)
    for part in _parts(3 * rank, dim):
        sketch_rD[:, part] = along @ (sketch_rD[:, part].double() + shift * random_rD[:, part])
    return float(mixed.diagonal().mean()), (squares_r - shift).clamp_min_(0)


def _shifted(core_rr: Tensor, precision: float) -> tuple[float, Tensor]:
    """Return a shift by which a matrix is positive definite in the precision of its products, and its factor then."""
    import torch

    shift = precision * max(float(torch.linalg.matrix_norm(core_rr, 2)), torch.finfo(torch.float64).tiny)
    while True:
        shifted_rr = core_rr.clone()
        shifted_rr.diagonal().add_(shift)
        factor_rr, failed = torch.linalg.cholesky_ex(shifted_rr)
        if not failed:
            return shift, factor_rr
        shift *= 10


def _parts(rows: int, dim: int) -> Iterator[slice]:
    """Cut coordinates into those of which so many rows are in double precision at once."""
    step = max(1, PART_ENTRIES // rows)
    return (slice(start, min(start + step, dim)) for start in range(0, dim, step))


def _vector_bytes(rank: int, function: ModelFunction) -> int:
    """Return what finding eigenvectors holds, with parts of them in double precision."""
    entries = rank * function.size
    return KEPT * entries * function.dtype.itemsize + 3 * 8 * min(PART_ENTRIES, 2 * entries) + 8 * 8 * rank**2
