"""The work of ``self_influence``: its stage, put together with the gradients that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from influence_pipeline import plan
from influence_pipeline.context import check_fixed
from influence_pipeline.influences import read_by_self_influence
from influence_pipeline.work import Work
from stages.self_influence import SelfInfluence
from stages.stage import Block

if TYPE_CHECKING:
    from influence_pipeline.works import Works


def work(works: Works) -> Work:
    """Return the work over the training set; gradients must be there to compute it, not to plan it."""
    context, place, solver = works.context, works.self_influence_place(), works.settings.s_test
    grad_z, over = works.settings.grad_z, works.curvature_samples
    gradients, of_band, computed = works.gradients(works.grad_z_place())
    band = works.band(place, "sample", works.work(works.grad_z_place()).stage.grid.axes[0].band)
    rows = min(band, len(context.train))
    prepared, basis = works.prepared(solver.last())
    curvature, train_ids = context.curvature(over), context.experiment.train_ids()
    kept_bytes, reading_bytes = plan.rows_memory(context.dim, rows, computed=computed, encoding=grad_z.encoding)

    def within(memory: int) -> SelfInfluence:
        return SelfInfluence(
            *(solver, curvature, prepared, gradients, train_ids, band, memory),
            kept_bytes=kept_bytes,
            reading_bytes=reading_bytes,
        )

    stage = within(context.memory)

    def inputs(block: Block) -> bytes:
        return read_by_self_influence(block, of_band(block.bounds["sample"]), basis, over, train_ids)

    def before() -> None:
        if computed:
            check_fixed(context.train)
        else:
            works.require(works.grad_z_place())
        works.check_code()
        works.resume(place, **{curvature.kind: curvature.batch})

    def memory() -> int:
        what = f"self_influence: solver {solver.solver!r}, for one training sample,"
        kinds = [curvature.kind, *(["gradients"] if computed else [])]
        works.memory(lambda memory: within(memory).held_bytes(1), kinds, what)
        return stage.held_bytes(min(stage.rows_at_once, rows))

    blocks = len(stage.grid)
    return Work(
        stage,
        "self_influence",
        inputs=inputs,
        before=before,
        holds=None if solver.preparation() is None else context.train,
        computing=context.evaluating,
        memory=memory,
        passes=f"{solver.solver}, {len(train_ids)} solutions in {blocks} block{'s' * (blocks > 1)}{solver.passes()}",
    )
