"""The work of the stage ``newton``: corrected gradients, of which scores are made in the place of ``grad_z``'s."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from influence_pipeline import plan
from influence_pipeline.cache.encoding import round_trip
from influence_pipeline.work import Work
from stages.device_batch import DeviceBatch
from stages.grad_z.choose import choosing_bytes
from stages.newton import Newton
from stages.s_test.solver import SPARE

if TYPE_CHECKING:
    from influence_pipeline.place import Place
    from influence_pipeline.works import Works


def work(works: Works, place: Place) -> Work:
    """Put together how gradients are corrected.

    Raises:
        StageError: the solver cannot hold the problem.
    """
    context, solver, encoding = works.context, works.settings.s_test, works.settings.grad_z.encoding
    dim, itemsize = context.dim, context.function.dtype.itemsize
    solver.check_size(context.function, context.memory)
    prepared, basis = works.prepared(solver.last())
    rows = works.band(place, "sample", plan.block_rows(dim))
    together = min(rows, len(context.train))

    def held(batch: int) -> int:
        """Return what is held at once where so many samples are computed together."""
        gradients = plan.gradients_memory(dim, together, batch, itemsize, encoding)
        kept = context.few.kept("gradients", context.device)
        return max(gradients, choosing_bytes(context.function)) + batch * kept + stage.held_bytes(batch)

    def within(memory: int) -> int:
        """Return how many samples are computed together, were there so much memory."""
        most = min(plan.gradient_batch(dim, itemsize), together)
        while most > 1 and held(most) > memory - memory // SPARE:
            most //= 2
        return context.batch_within("gradients", memory, most)

    batch = DeviceBatch(lambda: within(context.memory))
    stage = Newton(
        *(solver, context.curvature(works.curvature_samples), prepared, context.train, rows, encoding, batch),
        functools.partial(round_trip, encoding=encoding),
    )

    def before() -> None:
        works.begin(place, batch)
        batch.size = min(batch.size, within(context.memory))

    def memory() -> int:
        outputs = max(1, context.few.outputs)
        what = f"newton: correcting one training sample, of {outputs} outputs × {dim} coordinates,"
        return works.memory(lambda available: held(within(available)), ["gradients"], what)

    return Work(
        stage,
        "newton",
        context.train,
        inputs=basis,
        before=before,
        holds=context.train,
        computing=context.evaluating,
        memory=memory,
        passes=f"1 pass over the training set, {solver.solver} for each output of each sample{solver.passes()}",
    )
