"""The work of ``curvature``: what a solver prepares, put together with what it may be made of."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from influence_pipeline import plan
from influence_pipeline.cache.record import NOTHING
from influence_pipeline.work import DIGESTS, Work
from stages.gradients import TILE_ENTRIES, Gradients
from stages.s_test.preparation import Sources
from stages.s_test.solver import Solver
from stages.stage import ArrayLike

if TYPE_CHECKING:
    from influence_pipeline.works import Works


def work(works: Works, solver: Solver) -> Work:
    """Return the work of what a solver prepares; its inputs must be there to compute it, not to plan it.

    Raises:
        StageError: it does not fit the memory, or the model.
    """
    context, count, first = works.context, works.curvature_samples, solver.first()
    works.settings.s_test.check_size(context.function, context.memory)
    prepared, basis = works.prepared(first) if first else ({}, NOTHING)
    place = works.curvature_of(solver)
    group = None if place is None else works.find(place)
    bands = {} if group is None else group.attributes["bands"]
    rows: ArrayLike | None = None
    if solver.of_gradients:
        works.read_by_s_test()
        rows, of_band, _ = works.gradients(works.grad_z_place())
        block_rows = works.gradient_rows
        # A last block that is not full changes where the training set grows; its samples are compared all the same.
        basis = of_band(slice(0, count - count % block_rows))

    def gradients(whole_rows: bool) -> Gradients:
        assert rows is not None
        tile = plan.tile_shape((block_rows, context.dim))
        if whole_rows:
            tile = max(1, min(tile[0], TILE_ENTRIES // context.dim)), context.dim
        return Gradients(rows, count, (tile[0], tile[1]), context.function.device)

    sources = Sources(
        context.curvature(count),
        prepared,
        gradients,
        parts=functools.partial(works.parts, solver),
        band=lambda axis, most: int(bands.get(axis, min(most, plan.MOST_ROWS))),
    )
    stage = solver.preparing(sources, context.memory)
    found = Work(
        stage,
        "curvature",
        unit=stage.unit,
        whole=(context.train, count),
        inputs=basis,
        memory=lambda: works.memory(lambda memory: stage.held_bytes, [], None),
        passes=stage.passes,
    )
    if not solver.of_gradients:
        found.before, found.holds, found.computing = works.check_code, context.train, context.evaluating
        found.memory = lambda: works.memory(lambda memory: stage.held_bytes, [sources.curvature.kind], None)
    return found


def parts_there(works: Works, solver: Solver) -> int | None:
    """Return into how many parts the group of what a solver prepares is cut, if that is of as many samples."""
    place, count = works.curvature_of(solver), works.curvature_samples
    group = None if place is None else works.find(place)
    if group is not None and (count,) in {spec.shape[:1] for spec in group.layout.merged if spec.name == DIGESTS}:
        axis = group.layout.grid.axis("part")
        return None if axis is None else axis.length
    return None
