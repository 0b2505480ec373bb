"""Scores relative to norms: what a training sample does to a test, against what it does to everything.

With s the solution of a test, g the gradient of a training sample and H + λI the curvature:

- ``"cosine"``: sᵀg / (|s| |g|), the cosine of the two;
- ``"l-relatif"``: sᵀg / √(gᵀ(H + λI)⁻¹g), against how much losses change;
- ``"theta-relatif"``: sᵀg / |(H + λI)⁻¹g|, against how much the parameters change.

The latter two are ℓ-RelatIF and θ-RelatIF of Barshan, Brunet & Dziugaite (2020), "RelatIF: Identifying Explanatory
Training Examples via Relative Influence", AISTATS, with the sign of this package. Where a norm is 0, as of a sample
whose gradient is, the score is 0 too, and so is what comes of it here.

Shapes: ``T`` test samples, ``N`` training samples, ``k`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from stages.stage import Array, ArrayLike

Relative = Literal["cosine", "l-relatif", "theta-relatif"]
KINDS: tuple[str, ...] = get_args(Relative)
Pick = Callable[[Array, Array, int], tuple[Array, Array]]
"""``top_k`` or ``bottom_k``."""


@dataclass(frozen=True)
class Scaled:
    """Scores times a factor of each test and of each training sample, (T, N) float32, computed as they are read.

    Attributes:
        scores: (T, N).
        of_tests: (T,) float64.
        of_samples: (N,) float64.
    """

    scores: ArrayLike
    of_tests: Array
    of_samples: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N)."""
        return self.scores.shape

    def __getitem__(self, index: tuple[slice, slice]) -> Array:
        """Return some columns of some rows."""
        rows, columns = index
        found = self.scores[rows, columns].astype(np.float64)
        found *= self.of_tests[rows, None]
        found *= self.of_samples[None, columns]
        return found.astype(np.float32)


def inverse(norms: Array) -> Array:
    """Return 1 / norm in float64, 0 where there is none."""
    norms = norms.astype(np.float64)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def row_norms(vectors: ArrayLike, tile: tuple[int, int]) -> Array:
    """Return the Euclidean norm of each row in float64, read a tile at a time."""
    squares = np.zeros(vectors.shape[0])
    for rows in _steps(vectors.shape[0], tile[0]):
        for columns in _steps(vectors.shape[1], tile[1]):
            squares[rows] += np.square(vectors[rows, columns], dtype=np.float64).sum(axis=1)
    return np.sqrt(squares)


def ranked(values: ArrayLike, ids: Array, k: int, pick: Pick, tile: tuple[int, int]) -> tuple[Array, Array]:
    """Return ids and values (T, k) of the first k of each row, read a tile at a time.

    Args:
        values: (T, N).
        ids: (N,) of the columns.
        k: at most N.
        pick: which come first.
        tile: rows and columns that are read at once.
    """
    found = []
    for rows in _steps(values.shape[0], tile[0]):
        first_ids = np.empty((rows.stop - rows.start, 0), np.int64)
        first = np.empty(first_ids.shape, np.float32)
        for columns in _steps(values.shape[1], tile[1]):
            more_ids, more = pick(values[rows, columns], ids[columns], min(k, columns.stop - columns.start))
            both_ids, both = np.hstack([first_ids, more_ids]), np.hstack([first, more])
            first_ids, first = pick(both, both_ids, min(k, both.shape[1]))
        found.append((first_ids, first))
    return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])


def read_rows(values: ArrayLike, positions: Array, tile: tuple[int, int]) -> Array:
    """Return some rows, (t, N) float32, read a tile at a time, or a row of it where they are not side by side."""
    found = np.empty((len(positions), values.shape[1]), np.float32)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        for part in _steps(len(run), tile[0]):
            first, stop = int(positions[run[part][0]]), int(positions[run[part][-1]]) + 1
            for columns in _steps(values.shape[1], tile[1]):
                found[run[part], columns] = values[first:stop, columns]
    return found


def _steps(length: int, step: int) -> Iterator[slice]:
    """Yield slices of so many entries, of which the last may have fewer."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
