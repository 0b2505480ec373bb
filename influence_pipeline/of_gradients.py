"""Solvers that are made of the cached gradients: how these are read, and the work of what is prepared of them."""

from __future__ import annotations

from collections.abc import Mapping

from influence_pipeline import plan
from influence_pipeline.context import Context
from influence_pipeline.work import Work
from stages.gradients import TILE_ENTRIES, Gradients, runs
from stages.s_test.fisher import Fisher
from stages.s_test.prepare_fisher import OfCoordinates, OfGradients, OfRank, OfSamples
from stages.stage import ArrayLike

PASSES = {
    "coordinates": "1 pass over grad_z, a matrix of {dim} coordinates",
    "samples": "products of {count} gradients with one another",
    "rank": "4 passes over grad_z, of rank {rank}",
}


def read(solver: Fisher, context: Context, rows: ArrayLike, block_rows: int, count: int) -> Gradients:
    """Return the first ``count`` gradients, to be read by their tiles; or by whole rows, as a dense matrix needs them.

    Args:
        solver: what reads them.
        context: of the experiment.
        rows: all of them.
        block_rows: of a block of theirs.
        count: N.
    """
    tile = plan.tile_shape((block_rows, context.dim))
    if solver.form(count, context.dim) == "coordinates":
        tile = max(1, min(tile[0], TILE_ENTRIES // context.dim)), context.dim
    return Gradients(rows, count, (tile[0], tile[1]), context.function.device)


def prepared(solver: Fisher, context: Context, gradients: Gradients, contents: bytes, bands: Mapping[str, int]) -> Work:
    """Return the work of what a solver prepares.

    Args:
        solver: which.
        context: of the experiment.
        gradients: of the training set.
        contents: a digest of what these are.
        bands: of its group, where there is one.

    Raises:
        StageError: it does not fit the memory.
    """
    (count, dim), l2 = gradients.shape, context.function.l2()
    penalties = len(runs(l2)[0])
    solver.check(count, dim, penalties, context.memory)
    stage: OfGradients
    match solver.form(count, dim):
        case "coordinates":
            stage = OfCoordinates(gradients, l2, plan.parts(count, dim**2))
        case "samples":
            stage = OfSamples(gradients, l2, bands.get("row", plan.MOST_ROWS))
        case "rank":
            rank = int(solver.rank)
            most = min(plan.MOST_PARTS, plan.SUMS_BYTES // (8 * penalties * rank**2))
            stage = OfRank(gradients, l2, max(1, most), rank, solver.seed)
    return Work(
        stage,
        "curvature",
        unit="samples" if isinstance(stage, OfSamples) else "parts",
        whole=(context.train, count),
        inputs=lambda block: contents,
        memory=lambda: solver.preparing_bytes(count, dim, penalties),
        passes=PASSES[solver.form(count, dim)].format(count=count, dim=dim, rank=solver.rank),
    )
