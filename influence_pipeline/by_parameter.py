"""Scores by parameter: how much of S Gᵀ / N comes through the coordinates of each. Reads the cache, needs no model.

Shapes: ``t`` tests and ``n`` training samples that were asked for, ``D`` coordinates, ``w`` of these at once.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from influence_pipeline.cache import Group
from influence_pipeline.errors import RequestError
from stages.projection import Projection, consecutive
from stages.stage import Array, ArrayLike, StageError

ENTRIES = 2**22
"""Of solutions, and of gradients, that are held at once: so many, or one row of a tile."""


def columns_by_parameter(identity: Mapping[str, Any]) -> dict[str, slice]:
    """Return each parameter's coordinates, from the identity of gradients.

    Raises:
        RequestError: parameters share their coordinates.
    """
    shapes = {name: tuple(shape) for name, shape in identity["parameters"].items()}
    if identity["projection"] is None:
        return consecutive({name: math.prod(shape) for name, shape in shapes.items()})
    projection = Projection.model_validate(identity["projection"])
    if not projection.separate:
        raise RequestError(
            f"no scores by parameter: a {projection.kind} projection mixes all parameters in each of its coordinates, "
            'so that what is stored cannot be told apart. Use projection = { kind = "kronecker", … }, which projects '
            "each parameter by itself, or none"
        )
    try:
        return projection.columns(shapes)
    except StageError as error:
        raise RequestError(str(error)) from error


def grouped(names: Sequence[str], globs: Sequence[str]) -> dict[str, list[str]]:
    """Put each parameter to the first glob that its name matches, or to its own name where none does.

    Raises:
        RequestError: a glob matches no parameter.
    """
    found: dict[str, list[str]] = {glob: [] for glob in globs}
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise RequestError(f"layers: {glob!r} matches no parameter; there are {', '.join(names)}")
    for name in names:
        found.setdefault(next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), name), []).append(name)
    return found


def products(
    solved: Group, trained: Group, tests: Array, samples: Array, columns: Mapping[str, slice]
) -> dict[str, Array]:
    """Return S Gᵀ over each parameter's columns, (t, n) float64.

    Tiles that hold nothing of the tests and samples asked for are not read, others once for each ``ENTRIES`` of
    solutions.

    Args:
        solved: has the solutions S (T, D).
        trained: has the gradients G (N, D).
        tests: (t,) rows of S, in any order.
        samples: (n,) rows of G, likewise.
        columns: of each parameter.
    """
    vectors, gradients = solved.rows("vectors"), trained.rows("gradients")
    solved_rows = solved.kept("vectors").chunks[0]
    tile_rows, width = trained.kept("gradients").chunks
    totals = {name: np.zeros((len(tests), len(samples))) for name in columns}
    of_samples = list(_together(samples, tile_rows, max(1, ENTRIES // width)))
    of_tests = list(_together(tests, solved_rows, max(1, ENTRIES // width)))
    for start in range(0, gradients.shape[1], width):
        band = slice(start, min(start + width, gradients.shape[1]))
        inside = [(name, _overlap(own, band)) for name, own in columns.items()]
        for some_tests in of_tests:
            solutions_tw = _rows(vectors, tests[some_tests], band)
            for some_samples in of_samples:
                gradients_nw = _rows(gradients, samples[some_samples], band)
                for name, part in inside:
                    if part.start < part.stop:
                        found_tn = solutions_tw[:, part] @ gradients_nw[:, part].T
                        totals[name][np.ix_(some_tests, some_samples)] += found_tn
    return totals


def _together(rows: Array, tile_rows: int, most: int) -> Iterator[Array]:
    """Yield which rows to read together, as positions in ``rows``: those of one band of tiles, so many at most."""
    order = np.argsort(rows, kind="stable")
    for _, positions in itertools.groupby(order.tolist(), key=lambda position: rows[position] // tile_rows):
        found = np.array(list(positions))
        for start in range(0, len(found), most):
            yield found[start : start + most]


def _rows(values: ArrayLike, rows: Array, columns: slice) -> Array:
    """Read some rows, in ascending order and of one band of tiles."""
    first, stop = int(rows[0]), int(rows[-1]) + 1
    if stop - first == len(rows) or (stop - first) * (columns.stop - columns.start) <= ENTRIES:
        found: Array = values[first:stop, columns][rows - first]
        return found
    return np.concatenate([values[int(row) : int(row) + 1, columns] for row in rows])


def _overlap(own: slice, band: slice) -> slice:
    """Return which columns of a band belong to a parameter."""
    return slice(max(own.start, band.start) - band.start, min(own.stop, band.stop) - band.start)
