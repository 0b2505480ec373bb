"""``curvature`` of the cached gradients: what ``fisher`` prepares once, for any λ and all test sets.

One stage for each of the forms that H = GᵀG / N + diag(l2) may be solved in. A *penalty* is a value of l2: products of
gradients are kept apart by it, so that λ and l2 are added when solving.

Shapes: ``N`` training samples, ``D`` coordinates, ``P`` different penalties, ``r`` rank, ``n`` samples of a block,
``c`` coordinates of a tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from stages.s_test.preparation import Preparation
from stages.stage import Array, ArrayLike, ArraySpec, Axis, Block, Grid, Progress, Report, silent

if TYPE_CHECKING:
    from torch import Tensor

    from stages.gradients import Gradients

HELD_ENTRIES = 2**23
"""Of gradients whose products with all others are computed in one pass over these."""
PROJECTED_ENTRIES = 2**25
"""Of the gradients of a basis that are held at once. A tile that is wider is read for each part of it again, which
takes less than multiplying it."""
LEAST_COLUMNS = 2**13
MEAN = "mean eigenvalue of H"


class OfGradients(Preparation):
    """What is prepared of the cached gradients, by which solving is done, too.

    Attributes:
        summary: the names of those arrays that solving needs.
    """

    summary: ClassVar[tuple[str, ...]] = ()

    def __init__(self, gradients: Gradients, l2_D: Tensor) -> None:
        """Read ``gradients``, with the penalties ``l2_D``."""
        from stages.gradients import runs

        self.gradients, self.l2 = gradients, l2_D
        self.penalties, self.runs = runs(l2_D)

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of those arrays that solving needs."""
        return self.summary

    @property
    def read(self) -> dict[str, ArrayLike]:
        """The gradients."""
        return {"gradients": self.gradients}

    def mean_eigenvalue(self, squares: float) -> Array:
        """Return tr H / D, of the sum of all squares of G."""
        count, dim = self.gradients.shape
        return np.asarray(squares / count / dim + float(self.l2.double().mean()))


class OfCoordinates(OfGradients):
    """The matrix H itself, (D, D): a block has the sum of g gᵀ over its part of the training set."""

    summary = ("matrix", "mean_eigenvalue")

    def __init__(self, gradients: Gradients, l2_D: Tensor, parts: int) -> None:
        """Cut the training set into ``parts``."""
        super().__init__(gradients, l2_D)
        dim = gradients.dim
        self.grid = Grid((Axis("part", parts, 1),))
        dims = "part", "matrix_sum_row", "matrix_sum_entry"
        self.arrays = (ArraySpec("matrix_sum", dims, (parts, dim, dim), "float64", about="Σ g gᵀ over a part"),)
        self.merged = (
            ArraySpec("matrix", ("coordinate", "column"), (dim, dim), "float64", about="H, dense"),
            ArraySpec("mean_eigenvalue", (), (), "float64", about=MEAN),
        )

    @property
    def passes(self) -> str:
        """One."""
        return f"1 pass over grad_z, a matrix of {self.gradients.dim} coordinates"

    @property
    def held_bytes(self) -> int:
        """Sums, and tiles."""
        return coordinates_bytes(*self.gradients.shape)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Sum over a part of the training set."""
        import torch

        gradients = self.gradients
        part = share(block.index[0], len(self.grid), gradients.count)
        total_DD = torch.zeros(gradients.dim, gradients.dim, dtype=torch.float64, device=gradients.device)
        whole = slice(0, gradients.dim)
        for samples, _, tile_nD in gradients.read((samples, whole) for samples in gradients.samples(part)):
            total_DD.addmm_(tile_nD.T, tile_nD)
            report(Progress(samples.stop - part.start, part.stop - part.start, "products of gradients"))
        return {"matrix_sum": total_DD.cpu().numpy()[np.newaxis]}

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Make H of the sums."""
        sums = (arrays["matrix_sum"][number : number + 1][0] for number in range(len(self.grid)))
        matrix = functools.reduce(np.add, sums)
        squares = float(np.trace(matrix))
        matrix = matrix / self.gradients.count
        matrix[np.diag_indices(len(matrix))] += self.l2.double().cpu().numpy()
        return {"matrix": matrix, "mean_eigenvalue": self.mean_eigenvalue(squares)}


class OfSamples(OfGradients):
    """Products of all gradients with one another, (P, N, N): a block has those of its rows.

    Of two bands of samples, one block has the products, and of a band with itself half of them: G_p G_pᵀ is what is
    there plus its transpose.
    """

    summary = ("gram", "mean_eigenvalue")
    unit = "samples"

    def __init__(self, gradients: Gradients, l2_D: Tensor, band: int) -> None:
        """Cut the samples into bands."""
        super().__init__(gradients, l2_D)
        count = gradients.count
        self.grid = Grid((Axis("row", count, band),))
        shape = len(self.penalties), count, count
        about = "products of gradients; to be added to its transpose"
        self.arrays = (
            ArraySpec("gram", ("penalty", "row", "column"), shape, "float64", about=about),
            ArraySpec("square_sum", ("row_block",), self.grid.shape, "float64", about="of the entries of G"),
        )
        self.merged = (ArraySpec("mean_eigenvalue", (), (), "float64", about=MEAN),)

    @property
    def passes(self) -> str:
        """Gradients by gradients."""
        return f"products of {self.gradients.count} gradients with one another"

    @property
    def held_bytes(self) -> int:
        """Products of a band, and tiles."""
        return samples_bytes(*self.gradients.shape, len(self.penalties), self.grid.axes[0].band)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Multiply a band by itself, and by those that it shares with."""
        import torch

        gradients, own, axis = self.gradients, block.bounds["row"], self.grid.axes[0]
        others = [own, *(axis.bounds(band) for band in shared_with(block.index[0], axis.count))]
        shape = len(self.penalties), own.stop - own.start, gradients.count
        gram_PnN = torch.zeros(shape, dtype=torch.float64, device=gradients.device)
        step = max(1, HELD_ENTRIES // gradients.tile[1])
        for start in range(own.start, own.stop, step):
            some = slice(start, min(start + step, own.stop))
            self._multiply(some, others, gram_PnN[:, some.start - own.start : some.stop - own.start])
            report(Progress(some.stop - own.start, own.stop - own.start, "products of gradients"))
        gram_PnN[:, :, own] /= 2
        squares = 2 * gram_PnN[:, :, own].diagonal(dim1=1, dim2=2).sum()
        return {"gram": gram_PnN.cpu().numpy(), "square_sum": squares.reshape(1).cpu().numpy()}

    def _multiply(self, some: slice, others: list[slice], out_PnN: Tensor) -> None:
        """Add the products of some gradients with others, in one pass over these."""
        import torch

        from stages.gradients import within

        gradients = self.gradients
        held, tiles = gradients.samples(some), [part for other in others for part in gradients.samples(other)]
        read = gradients.read((samples, part) for part in gradients.coordinates() for samples in (*held, *tiles))
        own_nc = torch.empty(some.stop - some.start, gradients.tile[1]).to(out_PnN)
        for part in gradients.coordinates():
            for samples, _, tile_nc in itertools.islice(read, len(held)):
                own_nc[samples.start - some.start : samples.stop - some.start, : tile_nc.shape[1]] = tile_nc
            for samples, _, tile_nc in itertools.islice(read, len(tiles)):
                for penalty, run in within(self.runs, part):
                    out_PnN[penalty, :, samples].addmm_(own_nc[:, run], tile_nc[:, run].T)

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Take the mean."""
        return {"mean_eigenvalue": self.mean_eigenvalue(float(np.sum(arrays["square_sum"][:])))}


class OfRank(OfGradients):
    """A basis Q (N, r) of most of the span of the columns of G, and Qᵀ G_p G_pᵀ Q, (P, r, r).

    The basis is that of G Gᵀ times a random sketch of G, which adds up coordinates with random signs in r groups
    (Clarkson & Woodruff, 2013, "Low rank approximation and regression in input sparsity time"): one step of subspace
    iteration (Halko, Martinsson & Tropp, 2011, "Finding structure with randomness"). Every process makes it by itself.
    A block has the products over its part of the coordinates.
    """

    summary = ("basis", "gram", "mean_eigenvalue")

    def __init__(self, gradients: Gradients, l2_D: Tensor, parts: int, rank: int, seed: int) -> None:
        """Cut the coordinates into ``parts`` at most."""
        super().__init__(gradients, l2_D)
        self.rank, self.seed = rank, seed
        self._narrow = replace(gradients, tile=(gradients.tile[0], min(gradients.tile[1], columns(rank))))
        parts = min(parts, len(self._narrow.coordinates()))
        self.grid = Grid((Axis("part", parts, 1),))
        shape = len(self.penalties), rank, rank
        self.arrays = (
            ArraySpec(
                "gram_sum",
                ("part", "penalty", "gram_sum_row", "gram_sum_entry"),
                (parts, *shape),
                "float64",
                about="products of the basis's gradients over a part of the coordinates",
            ),
            ArraySpec("square_sum", ("part",), (parts,), "float64", about="of the entries of G in that part"),
        )
        self.merged = (
            ArraySpec("basis", ("sample", "rank"), (gradients.count, rank), "float64", about="orthonormal columns"),
            ArraySpec("gram", ("penalty", "rank", "column"), shape, "float64", about="products of its gradients"),
            ArraySpec("mean_eigenvalue", (), (), "float64", about=MEAN),
            ArraySpec("kept_trace", (), (), "float64", about="share of the trace of GᵀG that the basis has"),
        )

    @property
    def passes(self) -> str:
        """For the sketch, twice for the basis, and for products with that."""
        return f"4 passes over grad_z, of rank {self.rank}"

    @property
    def held_bytes(self) -> int:
        """The basis while it is made, products, and tiles."""
        return rank_bytes(*self.gradients.shape, len(self.penalties), self.rank)

    def prepare(self, report: Report = silent) -> None:
        """Make the basis."""
        self.basis_Nr  # noqa: B018 - kept for all blocks

    @functools.cached_property
    def basis_Nr(self) -> Tensor:
        """The basis, on the device."""
        import torch

        start_Nr, gradients = torch.linalg.qr(self._sketch()).Q, self._narrow
        samples, image_Nr = gradients.samples(), torch.zeros_like(start_Nr)
        read = gradients.read((some, part) for part in gradients.coordinates() for some in (*samples, *samples))
        for part in gradients.coordinates():
            projected_cr = torch.zeros(part.stop - part.start, self.rank).to(start_Nr)
            for some, _, tile_nc in itertools.islice(read, len(samples)):
                projected_cr.addmm_(tile_nc.T, start_Nr[some])
            for some, _, tile_nc in itertools.islice(read, len(samples)):
                image_Nr[some].addmm_(tile_nc, projected_cr)
        del start_Nr
        basis_Nr: Tensor = torch.linalg.qr(image_Nr).Q
        return basis_Nr

    def _sketch(self) -> Tensor:
        """Return G times random signs, each coordinate added to one of r, (N, r)."""
        import torch

        gradients, generator = self.gradients, torch.Generator().manual_seed(self.seed)
        sketch_Nr = torch.zeros(gradients.count, self.rank, dtype=torch.float64, device=gradients.device)
        samples = gradients.samples()
        read = gradients.read((some, part) for part in gradients.coordinates() for some in samples)
        for part in gradients.coordinates():
            width = part.stop - part.start
            places = torch.randperm(math.ceil(width / self.rank) * self.rank, generator=generator)
            signs = torch.randint(0, 2, (width,), generator=generator).to(sketch_Nr).mul_(2).sub_(1)
            mixed_nc = torch.zeros(gradients.tile[0], len(places)).to(sketch_Nr)
            for some, _, tile_nc in itertools.islice(read, len(samples)):
                mixed_nc[: len(tile_nc)].index_copy_(1, places[:width].to(signs.device), tile_nc.mul_(signs))
                sketch_Nr[some] += mixed_nc[: len(tile_nc)].reshape(len(tile_nc), -1, self.rank).sum(1)
        return sketch_Nr

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        """Multiply over a part of the coordinates."""
        import torch

        from stages.gradients import within

        gradients, basis_Nr = self._narrow, self.basis_Nr
        parts, samples = gradients.coordinates(), gradients.samples()
        parts = parts[share(block.index[0], len(self.grid), len(parts))]
        shape = len(self.penalties), self.rank, self.rank
        gram_Prr = torch.zeros(shape, dtype=torch.float64, device=gradients.device)
        squares = torch.zeros((), dtype=torch.float64, device=gradients.device)
        read = gradients.read((some, part) for part in parts for some in samples)
        for done, part in enumerate(parts, 1):
            projected_cr = torch.zeros(part.stop - part.start, self.rank).to(gram_Prr)
            for some, _, tile_nc in itertools.islice(read, len(samples)):
                projected_cr.addmm_(tile_nc.T, basis_Nr[some])
                squares += torch.linalg.vector_norm(tile_nc) ** 2
            for penalty, run in within(self.runs, part):
                gram_Prr[penalty].addmm_(projected_cr[run].T, projected_cr[run])
            report(Progress(done, len(parts), "products with the basis"))
        return {"gram_sum": gram_Prr.cpu().numpy()[np.newaxis], "square_sum": squares.reshape(1).cpu().numpy()}

    def finish(self, arrays: Mapping[str, ArrayLike], report: Report = silent) -> dict[str, Array]:
        """Add up all parts."""
        sums = (arrays["gram_sum"][number : number + 1][0] for number in range(len(self.grid)))
        gram_Prr = functools.reduce(np.add, sums)
        squares = float(np.sum(arrays["square_sum"][:]))
        kept = float(gram_Prr.trace(axis1=1, axis2=2).sum()) / squares if squares else 1.0
        return {
            "basis": self.basis_Nr.cpu().numpy(),
            "gram": gram_Prr,
            "mean_eigenvalue": self.mean_eigenvalue(squares),
            "kept_trace": np.asarray(kept),
        }


def coordinates_bytes(count: int, dim: int) -> int:
    """Return what the matrix H takes while it is prepared."""
    from stages.gradients import reading_bytes

    return 3 * 8 * dim**2 + reading_bytes(count, dim)


def samples_bytes(count: int, dim: int, penalties: int, band: int) -> int:
    """Return what products of a band of gradients with all take while they are prepared."""
    from stages.gradients import reading_bytes, widest

    band = min(count, band)
    held = 8 * min(max(HELD_ENTRIES, widest(dim)), band * dim)
    return (penalties + 2) * 8 * band * count + held + reading_bytes(count, dim)


def rank_bytes(count: int, dim: int, penalties: int, rank: int) -> int:
    """Return what a basis and products with it take while they are prepared."""
    from stages.gradients import reading_bytes, tile_entries, widest

    projected = 8 * rank * min(widest(dim), columns(rank)) + 8 * tile_entries(count, dim)
    return 8 * (5 * count * rank + 3 * penalties * rank**2) + projected + reading_bytes(count, dim)


def columns(rank: int) -> int:
    """Return how many coordinates are multiplied by a basis at once: fewer, the more columns that has."""
    return max(LEAST_COLUMNS, PROJECTED_ENTRIES // rank)


def share(number: int, of: int, count: int) -> slice:
    """Return the entries of one of several parts of about the same size."""
    return slice(number * count // of, (number + 1) * count // of)


def shared_with(band: int, bands: int) -> list[int]:
    """Return the bands whose products with a band are computed with it: of every two bands one has the other."""
    ahead = [(band + step) % bands for step in range(1, (bands + 1) // 2)]
    return [*ahead, band + bands // 2] if bands % 2 == 0 and band < bands // 2 else ahead
