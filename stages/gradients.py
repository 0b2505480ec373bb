"""The matrix G of gradients that are kept, read tile by tile, and its products in double precision.

G is never held: a tile is multiplied while the next ones are read.
Shapes: ``N`` training samples, ``D`` coordinates, ``T`` vectors, ``n`` samples and ``c`` coordinates of a tile.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.stage import Array, ArrayLike, FactoredRows, Progress, Report, silent
from stages.threads import one_core_threads, own_memory

Place = tuple[slice, slice]
"""Samples and coordinates."""
AHEAD = 2
"""Tiles that are read ahead of the one that is multiplied."""
TILE_ENTRIES = 2**21
"""Entries of a tile, at most."""
ENTRY_BYTES = 8 * (AHEAD + 1) + 2 * (4 + 4)
"""For each entry of a tile: those that wait, the one that is multiplied, and what two threads that read have."""


@dataclass(frozen=True)
class Gradients:
    """The first N rows of what is kept, and how they are read.

    Attributes:
        rows: what is kept; slices are float32, or of another type.
        count: N.
        tile: n and c that are read at once.
        device: where products are computed.
    """

    rows: ArrayLike
    count: int
    tile: tuple[int, int]
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.count, self.dim

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    def __getitem__(self, index: Any) -> Array:
        """Read a part as it is kept."""
        return self.rows[index]

    def samples(self, within: slice | None = None) -> list[slice]:
        """Cut all samples, or some, into those that are read at once; never across what is kept together."""
        return _cut(within or slice(0, self.count), self.tile[0])

    def coordinates(self, within: slice | None = None) -> list[slice]:
        """Cut all coordinates, or some, into those that are read at once."""
        return _cut(within or slice(0, self.dim), self.tile[1])

    def read(self, places: Iterable[Place]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield tiles (n, c) in double precision, after where they are, in the order that is asked for.

        A tile is in memory that another one takes when the next is asked for; until then it is the caller's.
        """
        threads, waiting = one_core_threads(), deque[tuple[Place, Tensor, Future[Tensor]]]()
        shape = min(self.tile[0], self.count), min(self.tile[1], self.dim)
        free = [torch.empty(shape, dtype=torch.float64, device=self.device) for _ in range(AHEAD + 1)]
        try:
            for place in places:
                memory = free.pop()
                waiting.append((place, memory, threads.submit(self._tile, place, memory)))
                if not free:
                    (samples, coordinates), memory, future = waiting.popleft()
                    yield samples, coordinates, future.result()
                    free.append(memory)
            while waiting:
                (samples, coordinates), _, future = waiting.popleft()
                yield samples, coordinates, future.result()
        finally:
            for _, _, future in waiting:
                future.cancel()
            wait([future for _, _, future in waiting])

    def _tile(self, place: Place, memory: Tensor) -> Tensor:
        """Read a tile into memory that has room for it."""
        shape = place[0].stop - place[0].start, place[1].stop - place[1].start
        tile_nc, rows = memory.resize_(shape), self.rows
        if not isinstance(rows, FactoredRows):
            return tile_nc.copy_(torch.from_numpy(np.asarray(rows[place])))
        read = own_memory("gradients", shape, np.dtype(np.float32))
        rows.read_into(place, read)
        tile_nc.copy_(torch.from_numpy(read))
        if rows.factors is not None:
            tile_nc.mul_(torch.from_numpy(rows.factors[place[0]]).to(self.device))
        return tile_nc

    def products(self, vectors_TD: Tensor, factors_D: Tensor | None = None, report: Report = silent) -> Tensor:
        """Return G diag(factors) v for each vector, (N, T) in double precision."""
        found_NT = torch.zeros(self.count, len(vectors_TD), dtype=torch.float64, device=self.device)
        for part, tiles in self._by_coordinates(report):
            part_cT = vectors_TD[:, part].T.double()
            if factors_D is not None:
                part_cT = part_cT * factors_D[part, None]
            for samples, tile_nc in tiles:
                found_NT[samples].addmm_(tile_nc, part_cT)
        return found_NT

    def combined(self, weights_NT: Tensor, report: Report = silent) -> Iterator[tuple[slice, Tensor]]:
        """Yield Σ_i w_i g_i for each column of weights, (T, c), after which coordinates, one part after the other."""
        for part, tiles in self._by_coordinates(report):
            shape = weights_NT.shape[1], part.stop - part.start
            found_Tc = torch.zeros(shape, dtype=torch.float64, device=self.device)
            for samples, tile_nc in tiles:
                found_Tc.addmm_(weights_NT[samples].T, tile_nc)
            yield part, found_Tc

    def _by_coordinates(self, report: Report) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
        """Yield parts of the coordinates, each with its tiles of all samples, which are read in one go."""
        parts, samples = self.coordinates(), self.samples()
        tiles = self.read((some, part) for part in parts for some in samples)
        for done, part in enumerate(parts, 1):
            yield part, ((some, tile_nc) for some, _, tile_nc in itertools.islice(tiles, len(samples)))
            report(Progress(done, len(parts), "products with gradients"))


def widest(dim: int) -> int:
    """Return how many coordinates a tile has at most: more, the fewer samples are kept together."""
    return min(dim, max(8192, dim // 16))


def tile_entries(count: int, dim: int) -> int:
    """Return the entries of a tile of a matrix, at most."""
    return min(TILE_ENTRIES, count * dim)


def reading_bytes(count: int, dim: int) -> int:
    """Return what reading tiles of a matrix holds at once, at most."""
    return ENTRY_BYTES * tile_entries(count, dim)


def runs(values_D: Tensor) -> tuple[list[float], list[tuple[int, slice]]]:
    """Return the values that coordinates have, in ascending order, and runs of the same one, by its number."""
    values, numbers = torch.unique(values_D, return_inverse=True)
    found, lengths = torch.unique_consecutive(numbers, return_counts=True)
    stops = lengths.cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    pieces = [(n, slice(start, stop)) for n, start, stop in zip(found.tolist(), starts, stops, strict=True)]
    return values.double().tolist(), pieces


def within(pieces: Sequence[tuple[int, slice]], part: slice) -> list[tuple[int, slice]]:
    """Return the runs that a part of the coordinates has, counted from its first."""
    clipped = ((n, slice(max(run.start, part.start), min(run.stop, part.stop))) for n, run in pieces)
    return [(n, slice(run.start - part.start, run.stop - part.start)) for n, run in clipped if run.start < run.stop]


def _cut(whole: slice, step: int) -> list[slice]:
    return [slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step)]
