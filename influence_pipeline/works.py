"""Works: every stage of an experiment, put together with where it is kept and what its blocks depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_pipeline import plan
from influence_pipeline.cache import Cache, Group, group_name
from influence_pipeline.cache.encoding import round_trip
from influence_pipeline.cache.record import digest
from influence_pipeline.context import Context, sentinels
from influence_pipeline.errors import MissingStage, RequestError
from influence_pipeline.plan import show_bytes
from influence_pipeline.runner import Work
from influence_pipeline.samples import DataSet
from stages.grad_z import ComputedRows, GradZ
from stages.influence import Influence
from stages.s_test import STest
from stages.s_test.prepare import Prepare
from stages.stage import Array, ArrayLike, Block, Grid, StageError


@dataclass(frozen=True)
class Place:
    """Where a stage's arrays are: the stage, its group's name, its identity, and the test set that it is of."""

    stage: str
    name: str
    identity: dict[str, Any]
    tests: str | None = None
    reads: dict[str, str] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the group says of itself: ``reads`` names the groups that it was made of."""
        return {"stage": self.stage, "tests": self.tests, "reads": self.reads, "identity": self.identity}


class Works:
    """The stages of one loaded experiment over one cache."""

    def __init__(self, context: Context, cache: Cache) -> None:
        """Put nothing together yet."""
        self.context, self.cache = context, cache
        self.settings = context.settings

    def find(self, place: Place) -> Group | None:
        """Return the group of a stage, None where there is none."""
        return self.cache.find(place.stage, place.name)

    # ---- places --------------------------------------------------------------------------------------------------

    def grad_z_place(self) -> Place:
        """Return where the training gradients are."""
        identity = self.context.grad_z_identity()
        return Place("grad_z", group_name(None, identity), identity)

    def curvature_place(self) -> Place | None:
        """Return where the solver's preparation is, None where it prepares nothing."""
        identity = self.context.curvature_identity()
        return None if identity is None else Place("curvature", group_name(None, identity), identity)

    def s_test_place(self, tests: str) -> Place:
        """Return where a test set's solutions are."""
        self.context.test(tests)
        identity = self.context.s_test_identity(tests)
        prepared = self.curvature_place()
        return Place(
            "s_test", group_name(tests, identity), identity, tests, {"curvature": prepared.name} if prepared else {}
        )

    def influence_place(self, tests: str) -> Place:
        """Return where a test set's scores and rankings are."""
        reads = {"grad_z": self.grad_z_place().name, "s_test": self.s_test_place(tests).name}
        higher_is_better = self.context.experiment.task.higher_is_better
        identity = {**reads, "higher_is_better": higher_is_better, **self.settings.influence.model_dump(mode="json")}
        return Place("influence", group_name(tests, identity), identity, tests, reads)

    # ---- works ---------------------------------------------------------------------------------------------------

    def work(self, place: Place) -> Work:
        """Return the work of a stage; its inputs must be there to compute it, not to plan it.

        Raises:
            RequestError: it does not fit the memory, or a setting does not fit the data.
        """
        try:
            if place.stage == "grad_z":
                return self._grad_z()
            if place.stage == "curvature":
                return self._curvature()
            assert place.tests is not None
            return self._s_test(place.tests) if place.stage == "s_test" else self._influence(place.tests)
        except StageError as error:
            raise RequestError(f"{place.stage}: {error}") from error

    def _grad_z(self) -> Work:
        context = self.context
        dim, batch = context.dim, context.gradient_batch
        needed = plan.gradients_memory(dim, len(context.train), batch, context.function.dtype.itemsize)
        self._refuse(needed, f"grad_z: a block of gradients with {dim} coordinates")
        return Work(
            self._grad_z_stage(),
            "grad_z",
            context.train,
            before=lambda: _check_fixed(context.train),
            computing=context.evaluating,
            memory_bytes=needed,
            passes="1 pass over the training set",
        )

    def _grad_z_stage(self) -> GradZ:
        context, encoding = self.context, self.settings.grad_z.encoding
        return GradZ(context.function, context.train, plan.block_rows(context.dim), encoding, context.gradient_batch)

    def _curvature(self) -> Work:
        context, solver = self.context, self.settings.s_test
        solver.check_size(context.dim, context.memory)
        stage = Prepare(solver, context.curvature, plan.block_rows(context.dim, plan.MOST_TESTS))
        vectors = stage.grid.axes[0].band if solver.dense else plan.PROBE_VECTORS
        return Work(
            stage,
            "curvature",
            unit="rows of H" if solver.dense else "parts",
            inputs=lambda block: context.train_fingerprint,
            before=context.train.keep,
            computing=context.evaluating,
            memory_bytes=3 * context.dim * context.function.dtype.itemsize * vectors,
            passes=f"{context.dim if solver.dense else plan.PROBE_VECTORS} products with H",
        )

    def _s_test(self, tests: str) -> Work:
        context, solver = self.context, self.settings.s_test
        for_one = solver.state_vectors * context.dim * context.function.dtype.itemsize
        self._refuse(for_one, f"s_test: solver {solver.solver!r}, for one test sample,")
        rows = plan.block_rows(context.dim, plan.MOST_TESTS)
        data = context.test(tests)
        prepared, basis = self._prepared()
        stage = STest(solver, context.curvature, prepared, data, rows, context.gradient_batch, context.memory)

        def before() -> None:
            _check_fixed(data)
            if solver.preparation() is not None:
                context.train.keep()

        at_once = min(stage.rows_at_once, rows, len(data))
        blocks = len(stage.grid)
        return Work(
            stage,
            f"s_test {tests}",
            data,
            inputs=lambda block: basis,
            before=before,
            computing=context.evaluating,
            memory_bytes=for_one * at_once + (3 * 8 * context.dim**2 if solver.dense else 0),
            passes=f"{solver.solver}, {blocks} block{'s' * (blocks > 1)}{solver.passes()}",
        )

    def _prepared(self) -> tuple[dict[str, ArrayLike], bytes]:
        """Return what the solver prepared, and a digest of what that is of."""
        place, solver = self.curvature_place(), self.settings.s_test
        group = None if place is None else self.find(place)
        if group is None:
            return {}, digest([])
        names = (*solver.summary_names(), *(("matrix",) if solver.dense else ()))
        grid = self._curvature().stage.grid
        basis = digest([self.context.train_fingerprint, group.fingerprint(grid)])
        return {name: group.array(name) for name in names}, basis

    def _influence(self, tests: str) -> Work:
        context, settings = self.context, self.settings.influence
        top_k = settings.top_k
        if top_k > len(context.train):
            if "top_k" in settings.model_fields_set:
                raise RequestError(f"influence.top_k = {top_k}, and there are {len(context.train)} training samples")
            top_k = len(context.train)
        rows = plan.block_rows(context.dim)
        bands = plan.MOST_SCORED_TESTS, plan.train_band(rows, settings.top_k)
        data, s_test = context.test(tests), self.s_test_place(tests)
        solved = self.find(s_test)
        vectors = _Absent((len(data), context.dim)) if solved is None else solved.rows("vectors")
        gradients, of_band, computed = self._gradients()
        reads = plan.reads(len(data), len(context.train), context.dim, rows, bands, context.memory, computed=computed)
        train_ids, test_ids = context.experiment.train_ids(), context.experiment.test_ids(tests)
        stage = Influence(
            vectors,
            gradients,
            train_ids,
            test_ids,
            bands=bands,
            read_rows=reads.rows,
            read_columns=reads.columns,
            rows_first=computed,
            top_k=top_k,
            store_scores=settings.store_scores,
        )
        s_grid = self._s_test(tests).stage.grid

        def inputs(block: Block) -> bytes:
            if solved is None:
                return digest([])
            solutions = solved.fingerprint(_covering(s_grid, block.bounds["test"]))
            ids = train_ids[block.bounds["sample"]], test_ids[block.bounds["test"]]
            count = len(context.train).to_bytes(8, "little")  # scores are divided by N
            return digest([solutions, of_band(block.bounds["sample"]), count, *ids])

        of = "the training set, computing gradients" if computed else "grad_z"
        return Work(
            stage,
            f"influence {tests}",
            unit="scores",
            inputs=inputs,
            before=lambda: _check_fixed(context.train) if computed else None,
            computing=context.evaluating,
            memory_bytes=reads.memory_bytes,
            passes=f"{reads.passes} pass{'es' * (reads.passes > 1)} over {of}",
        )

    def _gradients(self) -> tuple[ArrayLike, Callable[[slice], bytes], bool]:
        """Return the gradients, a digest of what a band of them is of, and whether they are computed when read."""
        context, encoding = self.context, self.settings.grad_z.encoding
        stage = self._grad_z_stage()
        if not self.settings.grad_z.store:

            def rows(block: Block) -> Array:
                return round_trip(stage.compute(block)["gradients"], encoding)

            return ComputedRows(stage, rows), lambda band: context.train_fingerprint, True
        group = self.find(self.grad_z_place())
        if group is None:
            return _Absent((len(context.train), context.dim)), lambda band: digest([]), False
        return group.rows("gradients"), lambda band: group.fingerprint(_covering(stage.grid, band)), False

    def _refuse(self, needed: int, what: str) -> None:
        """Refuse what does not fit the memory.

        Raises:
            RequestError: with the bytes needed.
        """
        if needed > self.context.memory:
            raise RequestError(
                f"{what} needs {show_bytes(needed)}; runtime.memory is {show_bytes(self.context.memory)}: "
                "raise it, or choose fewer parameters ([grad_z] parameters)"
            )


class _Absent:
    """An input that is not there yet: it has a shape, for planning."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> Any:
        raise MissingStage("an input of this stage is not there yet")


def _covering(grid: Grid, part: slice) -> Sequence[Block]:
    """Return the blocks of a one-dimensional grid that cover a part of it."""
    band = grid.axes[0].band
    return [grid.block((i,)) for i in range(part.start // band, -(-part.stop // band))]


def _check_fixed(data: DataSet) -> None:
    """Refuse a data set that gives other samples when asked twice."""
    data.check_fixed(sentinels(len(data))[::4])
