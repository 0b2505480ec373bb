"""Coordinates of gradients: the entries of the selected parameters, or a projection of them.

Every parameter has a linear map to its coordinates, and the map's transpose. A projection's random numbers are made
of its seed whenever they are needed; only the two small factors of a Kronecker projection are kept.

Shapes: ``P`` entries of one parameter, ``R`` and ``C`` its rows and columns as a matrix, ``r`` and ``c`` what they are
projected to, ``D`` coordinates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.projection import Projection, as_matrix, consecutive
from stages.stage import StageError

TILE = 2**20
"""Random numbers that are made at once."""


class Map(Protocol):
    """A linear map of a parameter's values to its coordinates."""

    @property
    def size(self) -> int:
        """The number of coordinates."""

    def project(self, values: Tensor) -> Tensor:
        """(…, *shape) -> (…, size)."""

    def expand(self, vectors: Tensor) -> Tensor:
        """(…, size) -> (…, *shape), by the transpose."""


@dataclass(frozen=True)
class Entries:
    """The entries themselves."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """P."""
        return math.prod(self.shape)

    def project(self, values: Tensor) -> Tensor:
        """Lay the entries out one after the other."""
        return values.reshape(*_lead(values, self.shape), self.size)

    def expand(self, vectors: Tensor) -> Tensor:
        """Give them their shape."""
        return vectors.reshape(*vectors.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Kronecker:
    """A matrix projected from both sides: A G Bᵀ, with A (r, R) and B (c, C), or None for a side that stays."""

    shape: tuple[int, ...]
    left: Tensor | None
    right: Tensor | None

    @property
    def sides(self) -> tuple[int, int]:
        """(r, c)."""
        rows, columns = as_matrix(self.shape)
        return rows if self.left is None else len(self.left), columns if self.right is None else len(self.right)

    @property
    def size(self) -> int:
        """The number of coordinates, r · c."""
        return math.prod(self.sides)

    def project(self, values: Tensor) -> Tensor:
        """(…, *shape) -> (…, r · c)."""
        matrix = values.reshape(*_lead(values, self.shape), *as_matrix(self.shape))
        matrix = matrix if self.left is None else self.left @ matrix
        return (matrix if self.right is None else matrix @ self.right.T).flatten(-2)

    def expand(self, vectors: Tensor) -> Tensor:
        """(…, r · c) -> (…, *shape)."""
        matrix = vectors.reshape(*vectors.shape[:-1], *self.sides)
        matrix = matrix if self.left is None else self.left.T @ matrix
        matrix = matrix if self.right is None else matrix @ self.right
        return matrix.reshape(*vectors.shape[:-1], *self.shape)


@dataclass(frozen=True)
class Random:
    """A random matrix (D, P) of independent columns, made tile by tile of the seed.

    Attributes:
        shape: the parameter's.
        size: D.
        key: of the random numbers, the parameter's own.
        sparse: each column has one entry, ±1, at a random row; otherwise all entries are ±1/√D.
    """

    shape: tuple[int, ...]
    size: int
    key: int
    sparse: bool

    def project(self, values: Tensor) -> Tensor:
        """(…, *shape) -> (…, D)."""
        flat_nP = values.reshape(-1, math.prod(self.shape))
        total_Dn = torch.zeros(self.size, len(flat_nP), dtype=values.dtype, device=values.device)
        for part, tile in self._tiles(values):
            if self.sparse:
                rows, signs = tile
                total_Dn.index_add_(0, rows, (flat_nP[:, part] * signs).T)
            else:
                total_Dn.addmm_(tile[0], flat_nP[:, part].T)
        return total_Dn.T.reshape(*_lead(values, self.shape), self.size)

    def expand(self, vectors: Tensor) -> Tensor:
        """(…, D) -> (…, *shape)."""
        flat_nD = vectors.reshape(-1, self.size)
        found_nP = torch.empty(len(flat_nD), math.prod(self.shape), dtype=vectors.dtype, device=vectors.device)
        for part, tile in self._tiles(vectors):
            if self.sparse:
                rows, signs = tile
                found_nP[:, part] = flat_nD[:, rows] * signs
            else:
                torch.mm(flat_nD, tile[0], out=found_nP[:, part])
        return found_nP.reshape(*vectors.shape[:-1], *self.shape)

    def _tiles(self, like: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Yield some columns, and of these the rows and signs (n,) of the only entries, or all entries (D, n)."""
        step = max(1, TILE // (1 if self.sparse else self.size))
        numbers = np.random.Philox(self.key)
        for start in range(0, math.prod(self.shape), step):
            part = slice(start, min(start + step, math.prod(self.shape)))
            count = part.stop - part.start
            if self.sparse:
                raw = np.asarray(numbers.random_raw(count))
                rows = ((raw >> np.uint64(1)) % np.uint64(self.size)).astype(np.int64)
                signs = (raw & np.uint64(1)).astype(np.float32) * 2 - 1
                yield part, (torch.from_numpy(rows).to(like.device), torch.from_numpy(signs).to(like))
            else:
                octets = np.asarray(numbers.random_raw(math.ceil(self.size * count / 64))).view(np.uint8)
                bits = torch.from_numpy(np.unpackbits(octets, count=self.size * count).reshape(self.size, count))
                yield part, ((bits.to(like) * 2 - 1) / math.sqrt(self.size),)


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of some parameters.

    Attributes:
        maps: of each parameter.
        columns: each parameter's coordinates.
        separate: whether no two parameters share coordinates.
    """

    maps: Mapping[str, Map]
    columns: Mapping[str, slice]
    separate: bool = True

    @property
    def size(self) -> int:
        """D."""
        return max((part.stop for part in self.columns.values()), default=0)

    def project(self, values: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the coordinates (…, D) of one tensor (…, *shape) for each parameter, in ``out`` where given."""
        parts = [one.project(values[name].to(dtype)) for name, one in self.maps.items()]
        return torch.cat(parts, dim=-1, out=out) if self.separate else torch.sum(torch.stack(parts), 0, out=out)

    def expand(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return one tensor (…, *shape) for each parameter, by the transpose."""
        return {name: one.expand(vectors[..., self.columns[name]]) for name, one in self.maps.items()}

    def part(self, names: Collection[str]) -> Coordinates:
        """Return the coordinates of some of the parameters, without those that only others have."""
        maps = {name: one for name, one in self.maps.items() if name in names}
        if not self.separate:
            return Coordinates(maps, {name: self.columns[name] for name in maps}, separate=False)
        return Coordinates(maps, consecutive({name: one.size for name, one in maps.items()}))


def entries(params: Mapping[str, Tensor]) -> Coordinates:
    """Return the parameters' entries as coordinates."""
    maps = {name: Entries(tuple(p.shape)) for name, p in params.items()}
    return Coordinates(maps, consecutive({name: one.size for name, one in maps.items()}))


def projected(
    projection: Projection, params: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Coordinates:
    """Return the coordinates of a projection.

    Args:
        projection: which.
        params: the selected parameters.
        dtype: of gradients.
        device: where they are.

    Raises:
        StageError: there are too few entries, or too few coordinates.
    """
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    if not all(map(math.prod, shapes.values())):
        raise StageError(f"projection: {next(n for n, s in shapes.items() if not math.prod(s))} has no entries at all")
    sizes, maps = projection.sizes(shapes), dict[str, Map]()
    for name, shape in shapes.items():
        key = _key(projection.seed, name)
        if projection.kind == "kronecker":
            sides = zip(as_matrix(shape), sizes[name], strict=True)
            left, right = (_side(*side, key + i, dtype, device) for i, side in enumerate(sides))
            maps[name] = Entries(shape) if left is None and right is None else Kronecker(shape, left, right)
        else:
            maps[name] = Random(shape, projection.dim, key, projection.kind == "sparse")
    return Coordinates(maps, projection.columns(shapes), projection.separate)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _side(full: int, kept: int, key: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return random orthogonal rows (kept, full), of length √(full / kept); None where all are kept.

    Such rows keep lengths better than independent entries the more of them are kept.
    """
    if kept == full:
        return None
    if full * kept > TILE and full >= 2 * kept:
        return _tall_side(full, kept, key, dtype).to(device)
    normal = np.random.Generator(np.random.Philox(key)).standard_normal((full, kept))
    basis, triangle = np.linalg.qr(normal)
    basis *= np.sign(np.diagonal(triangle)) * math.sqrt(full / kept)
    return torch.from_numpy(np.ascontiguousarray(basis.T)).to(device, dtype)


def _tall_side(full: int, kept: int, key: int, dtype: torch.dtype) -> Tensor:
    """Return the same rows, for the most part by a Cholesky factor, so that little is held beside them.

    That is as exact as a QR decomposition where the condition number is small, which is about 6 for random numbers
    twice as high as wide, and less for higher ones (Edelman, 1988).
    """

    def tiles() -> Iterator[tuple[slice, Tensor]]:
        generator = np.random.Generator(np.random.Philox(key))
        step = TILE // kept
        for start in range(0, full, step):
            part = slice(start, min(start + step, full))
            yield part, torch.from_numpy(generator.standard_normal((part.stop - start, kept)))

    products_cc = torch.zeros(kept, kept, dtype=torch.float64)
    for _, normal in tiles():
        products_cc.addmm_(normal.T, normal)
    factor = torch.linalg.cholesky(products_cc)
    found = torch.empty(kept, full, dtype=dtype)
    for part, normal in tiles():
        found[:, part] = torch.linalg.solve_triangular(factor, normal.T, upper=False).mul_(math.sqrt(full / kept))
    return found


def _lead(values: Tensor, shape: tuple[int, ...]) -> torch.Size:
    return values.shape[: values.ndim - len(shape)]
