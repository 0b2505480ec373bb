"""Pipeline: the stages of one experiment, over one cache."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence_pipeline import plan, runner
from influence_pipeline.cache import Cache, Group, group_name, nearest
from influence_pipeline.cache.encoding import round_trip
from influence_pipeline.cache.record import digest
from influence_pipeline.context import Context, sentinels
from influence_pipeline.errors import CacheMismatch, MissingStage, RequestError
from influence_pipeline.experiment import Experiment, load
from influence_pipeline.influences import Influences
from influence_pipeline.plan import Plan, StagePlan, show_bytes
from influence_pipeline.runner import Work
from influence_pipeline.samples import DataSet
from influence_pipeline.settings import Settings
from stages.grad_z import ComputedRows, GradZ
from stages.influence import Influence
from stages.s_test import STest
from stages.s_test.prepare import Prepare
from stages.stage import ArrayLike, Block, Stage, StageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a stage's arrays are: the stage, its group's name, its identity, and the test set it is of."""

    stage: str
    name: str
    identity: dict[str, Any]
    tests: str | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What the group says of itself."""
        return {"stage": self.stage, "tests": self.tests, "identity": self.identity}


class Pipeline:
    """The stages ``grad_z``, ``s_test`` and ``influence`` of one experiment, resuming from whatever is cached."""

    def __init__(
        self,
        experiment: Experiment | Callable[[], Experiment] | str,
        cache: Path | str | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Name the work; nothing is loaded or computed.

        Args:
            experiment: an experiment, a function that makes one, or a reference "file.py:function".
            cache: the cache's folder; by default the one that the settings name.
            settings: the defaults where None.

        Raises:
            RequestError: there is no experiment or no cache, or the folder holds something else.
        """
        self.settings = settings or Settings()
        folder = cache or self.settings.cache
        if folder is None:
            raise RequestError("no cache: give Pipeline a folder, or settings that name one (cache = …)")
        if not isinstance(experiment, (Experiment, str)) and not callable(experiment):
            raise RequestError(f"experiment must be an ip.Experiment or a reference, got {type(experiment).__name__}")
        self.cache = Cache(folder)
        self._source = experiment
        self._token = uuid.uuid4().hex
        self._seconds: dict[str, float] = {}

    @classmethod
    def from_toml(cls, path: Path | str) -> Pipeline:
        """Make a pipeline of a settings file that names its experiment and its cache.

        Raises:
            RequestError: the file has neither, or something in it is wrong.
        """
        settings = Settings.from_toml(path)
        for name in ("experiment", "cache"):
            if getattr(settings, name) is None:
                raise RequestError(f"{path}: {name} is missing")
        assert settings.experiment is not None
        return cls(settings.experiment, settings.cache, settings)

    @functools.cached_property
    def context(self) -> Context:
        """The loaded experiment."""
        source = self._source
        if isinstance(source, str):
            source = load(source)
        elif not isinstance(source, Experiment):
            source = source()
            if not isinstance(source, Experiment):
                raise RequestError(f"the function must return an ip.Experiment, got {type(source).__name__}")
        return Context(source, self.settings)

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test sets."""
        return self.context.experiment.test_names

    # ---- the stages ----------------------------------------------------------------------------------------------

    def grad_z(self, *, new: bool = False) -> runner.Outcome:
        """Compute the training gradients that are missing.

        Args:
            new: start a new set of gradients beside others of the same training set.

        Raises:
            CacheMismatch: gradients of this training set are there under another identity (unless ``new``), or
                the training set has changed.
        """
        if not self.settings.grad_z.store:
            raise RequestError("grad_z.store = false: gradients are computed when influence asks for them")
        place = self._grad_z_place()
        if not new and self.cache.find(*_at(place)) is None:
            self._refuse_second(place)
        return self._run(place)

    def s_test(self, tests: str) -> runner.Outcome:
        """Solve for the test samples that are missing, after what the solver prepares for all test sets.

        Raises:
            CacheMismatch: the test set has changed.
        """
        self._refuse_renamed(tests)
        seconds = 0.0
        prepared = self._curvature_place()
        if prepared is not None:
            seconds = self._run(prepared).seconds
        outcome = self._run(self._s_test_place(tests))
        self._seconds[tests] = self._seconds.get(tests, 0.0) + seconds + outcome.seconds
        return outcome

    def influence(self, tests: str) -> Influences:
        """Compute the scores and rankings that are missing.

        Raises:
            MissingStage: gradients or solutions are not complete; the message has the call that makes them.
        """
        if self.settings.grad_z.store:
            self._require(self._grad_z_place(), "grad_z()", "grad-z")
        self._require(self._s_test_place(tests), f"s_test({tests!r})", f"s-test --tests {tests}")
        place = self._influence_place(tests)
        outcome = self._run(place)
        self._seconds[tests] = self._seconds.get(tests, 0.0) + outcome.seconds
        group = self.cache.find(*_at(place))
        assert group is not None
        return Influences(self.cache, group, self._seconds[tests])

    def run(self, *tests: str, new: bool = False) -> dict[str, Influences]:
        """Do all that is missing, for some test sets or all of them.

        Args:
            tests: names of test sets; all where none is given.
            new: as for :meth:`grad_z`.

        Returns:
            The results by test set.
        """
        for name in tests:
            self.context.test(name)
        if not (tests or self.tests):
            raise RequestError("the experiment has no test set")
        if self.settings.grad_z.store:
            self.grad_z(new=new)
        found = {}
        for name in tests or self.tests:
            self.s_test(name)
            found[name] = self.influence(name)
        return found

    def plan(self, *tests: str) -> Plan:
        """Say what is there and what a run would take; nothing is computed."""
        stages = []
        if self.settings.grad_z.store:
            stages.append(self._plan(self._grad_z_place()))
        for name in tests or self.tests:
            prepared = self._curvature_place()
            if prepared is not None and not any(p.stage == "curvature" for p in stages):
                stages.append(self._plan(prepared))
            stages.append(self._plan(self._s_test_place(name)))
            stages.append(self._plan(self._influence_place(name)))
        context = self.context
        title = (
            f"{len(context.train)} training samples × {context.dim} coordinates, "
            f"tests: {', '.join(f'{n} ({len(context.test(n))})' for n in tests or self.tests)}, "
            f"device {context.device}, cache {self.cache.path}"
        )
        return Plan(title, tuple(stages))

    # ---- places --------------------------------------------------------------------------------------------------

    def _grad_z_place(self) -> Place:
        identity = self.context.grad_z_identity()
        return Place("grad_z", group_name(None, identity), identity)

    def _curvature_place(self) -> Place | None:
        identity = self.context.curvature_identity()
        return None if identity is None else Place("curvature", group_name(None, identity), identity)

    def _s_test_place(self, tests: str) -> Place:
        self.context.test(tests)
        identity = self.context.s_test_identity(tests)
        return Place("s_test", group_name(tests, identity), identity, tests)

    def _influence_place(self, tests: str) -> Place:
        identity = {
            "grad_z": self._grad_z_place().name,
            "s_test": self._s_test_place(tests).name,
            "higher_is_better": self.context.experiment.task.higher_is_better,
            **self.settings.influence.model_dump(mode="json"),
        }
        return Place("influence", group_name(tests, identity), identity, tests)

    # ---- work ----------------------------------------------------------------------------------------------------

    def _work(self, place: Place) -> Work:
        """Return the work of a stage; its inputs must be there to compute it, not to plan it."""
        try:
            if place.stage == "grad_z":
                return self._grad_z_work()
            if place.stage == "curvature":
                return self._curvature_work()
            assert place.tests is not None
            return self._s_test_work(place.tests) if place.stage == "s_test" else self._influence_work(place.tests)
        except StageError as error:
            raise RequestError(f"{place.stage}: {error}") from error

    def _grad_z_work(self) -> Work:
        context = self.context
        stage = self._grad_z_stage()
        needed = self._memory("grad_z", stage)
        if needed > context.memory:
            raise RequestError(
                f"grad_z: a block of gradients with {context.dim} coordinates needs {show_bytes(needed)}; "
                f"runtime.memory is {show_bytes(context.memory)}: raise it, or choose fewer parameters"
            )
        return Work(stage, "grad_z", context.train, before=lambda: _check_fixed(context.train))

    def _grad_z_stage(self) -> GradZ:
        context, encoding = self.context, self.settings.grad_z.encoding
        return GradZ(context.function, context.train, plan.block_rows(context.dim), encoding, context.gradient_batch)

    def _curvature_work(self) -> Work:
        context = self.context
        solver = self.settings.s_test
        solver.check_size(context.dim, context.memory)
        stage = Prepare(solver, context.curvature, plan.block_rows(context.dim, plan.MOST_TESTS))
        return Work(
            stage, "curvature", inputs=lambda block: context.train_fingerprint, before=lambda: context.train.keep()
        )

    def _s_test_work(self, tests: str) -> Work:
        context, solver = self.context, self.settings.s_test
        least = solver.state_vectors * context.dim * context.function.dtype.itemsize
        if least > context.memory:
            raise RequestError(
                f"s_test: solver {solver.solver!r} holds {show_bytes(least)} for one test sample; "
                f"runtime.memory is {show_bytes(context.memory)}: raise it, or choose fewer parameters"
            )
        place = self._curvature_place()
        group = None if place is None else self.cache.find(*_at(place))
        prepared = {} if group is None else {name: group.array(name) for name in self._prepared_names()}
        basis = b"" if group is None else group.fingerprint(self._curvature_work().stage.grid)
        rows = plan.block_rows(context.dim, plan.MOST_TESTS)
        data = context.test(tests)
        stage = STest(solver, context.curvature, prepared, data, rows, context.gradient_batch, context.memory)

        def before() -> None:
            _check_fixed(data)
            if solver.preparation() is not None:
                context.train.keep()

        return Work(stage, f"s_test {tests}", data, inputs=lambda block: digest([basis]), before=before)

    def _prepared_names(self) -> Sequence[str]:
        solver = self.settings.s_test
        return (*solver.summary_names(), *(("matrix",) if solver.dense else ()))

    def _influence_work(self, tests: str) -> Work:
        context, settings = self.context, self.settings.influence
        top_k = settings.top_k
        if top_k > len(context.train):
            if "top_k" in settings.model_fields_set:
                raise RequestError(f"influence.top_k = {top_k}, and there are {len(context.train)} training samples")
            top_k = len(context.train)
        rows = plan.block_rows(context.dim)
        bands = plan.MOST_SCORED_TESTS, plan.train_band(rows, settings.top_k)
        gradients, train_inputs, computed = self._gradients()
        s_group = self.cache.find(*_at(self._s_test_place(tests)))
        data = context.test(tests)
        vectors: ArrayLike = _Absent((len(data), context.dim)) if s_group is None else s_group.rows("vectors")
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
        s_grid = self._s_test_work(tests).stage.grid

        def inputs(block: Block) -> bytes:
            if s_group is None:
                return b""
            solved = s_group.fingerprint(_covering(s_grid, block.bounds["test"]))
            ids = train_ids[block.bounds["sample"]], test_ids[block.bounds["test"]]
            return digest([solved, train_inputs(block.bounds["sample"]), *ids])

        return Work(stage, f"influence {tests}", inputs=inputs)

    def _gradients(self) -> tuple[ArrayLike, Callable[[slice], bytes], bool]:
        """Return the gradients, a digest of what a band of them is of, and whether they are computed when read."""
        context = self.context
        stage = self._grad_z_stage()
        group = self.cache.find(*_at(self._grad_z_place()))
        if self.settings.grad_z.store:
            if group is None:
                return _Absent((len(context.train), context.dim)), lambda band: b"", False
            return group.rows("gradients"), lambda band: group.fingerprint(_covering(stage.grid, band)), False

        def rows(block: Block) -> Any:
            return round_trip(stage.compute(block)["gradients"], self.settings.grad_z.encoding)

        return ComputedRows(stage, rows), lambda band: context.train_fingerprint, True

    def _memory(self, stage: str, of: Stage) -> int:
        """Return the bytes that one process holds at once for a stage, beside model and data."""
        context = self.context
        itemsize = context.function.dtype.itemsize
        if stage == "grad_z":
            return plan.gradients_memory(context.dim, len(context.train), context.gradient_batch, itemsize)
        if stage == "s_test":
            solver = self.settings.s_test
            assert isinstance(of, STest)
            rows = min(of.rows_at_once, of.grid.axes[0].band, of.grid.axes[0].length)
            dense = 3 * 8 * context.dim**2 if solver.dense else 0
            return solver.state_vectors * context.dim * itemsize * rows + dense
        if stage == "curvature":
            return 3 * context.dim * itemsize * (32 if not self.settings.s_test.dense else of.grid.axes[0].band)
        assert isinstance(of, Influence)
        rows = plan.block_rows(context.dim)
        tests, samples = (axis.length for axis in of.grid.axes)
        bands = of.grid.axes[0].band, of.grid.axes[1].band
        computed = not self.settings.grad_z.store
        return plan.reads(tests, samples, context.dim, rows, bands, context.memory, computed=computed).memory_bytes

    # ---- running -------------------------------------------------------------------------------------------------

    def _run(self, place: Place) -> runner.Outcome:
        runtime = self.settings.runtime
        with runner.logging_to(runtime.log_file), self.context.evaluating():
            work = self._work(place)
            group = self._open(place, work)
            with self._sent() as source:
                rebuild = functools.partial(
                    _rebuild, source, self.settings, str(self.cache.path), place, self.context.weights
                )
                return runner.run(work, group, runtime, rebuild, f"{self._token} {place.stage} {place.name}")

    @contextmanager
    def _sent(self) -> Iterator[str | Path]:
        """Give what worker processes load the experiment from."""
        if isinstance(self._source, str) or self.settings.runtime.workers == 1:
            yield self._source if isinstance(self._source, str) else ""
            return
        with runner.shared(self._source) as path:
            yield path

    def _open(self, place: Place, work: Work) -> Group:
        """Return the group of a stage, of the size that the work has now."""
        layout = work.layout
        group = self.cache.create(*_at(place), layout, place.attributes)
        with group.lock():
            if not group.fits(layout):
                if work.data is not None:
                    found = group.array("digests").shape[0]
                    raise CacheMismatch(
                        f"{group.path} holds {found} samples of {work.data.name!r}, which has {len(work.data)} now. "
                        "Is it another set? Choose another name "
                        + ("(train_name)" if place.tests is None else "for this test set")
                    )
                self.cache.remove(group)
        if not (group.path / "zarr.json").exists():
            group = self.cache.create(*_at(place), layout, place.attributes)
        with group.lock():
            group.resize(layout)
        if work.data is not None:
            _check_data(group, work, work.data, place)
        return group

    def _require(self, place: Place, call: str, command: str) -> None:
        group = self.cache.find(*_at(place))
        work = self._work(place)
        missing = runner.pending(work, group)
        if group is None or missing:
            raise MissingStage(
                f"{place.stage}{f' of {place.tests}' if place.tests else ''} is not complete: {len(missing)} of "
                f"{len(work.stage.grid)} blocks are missing. First: pipeline.{call}, or "
                f"`influence-pipeline {command} …`; `run` does all"
            )
        if work.data is not None:
            _check_data(group, work, work.data, place)

    def _refuse_second(self, place: Place) -> None:
        """Refuse to start gradients of a training set that has some, under another identity."""
        others = [
            group
            for group in self.cache.groups("grad_z")
            if group.attributes["identity"]["train"] == self.context.experiment.train_name
            and any(group.record(block) for block in self._grad_z_stage().grid if _inside(group, block))
        ]
        if others:
            differs = nearest(place.identity, [group.attributes["identity"] for group in others])
            wanted = self._plan(place)
            raise CacheMismatch(
                f"training gradients of {self.context.experiment.train_name!r} are cached for something else. "
                "Cached ≠ now:\n  " + "\n  ".join(differs) + f"\nStarting again computes {wanted.rows} gradients and "
                f"takes up to {show_bytes(wanted.bytes_bound)}. If that is wanted: --new, or grad_z(new=True)"
            )

    def _refuse_renamed(self, tests: str) -> None:
        """Refuse a test set whose name stands for other data in the cache, under whatever settings."""
        data = self.context.test(tests)
        for group in self.cache.groups("s_test"):
            if group.attributes["tests"] == tests:
                _compare(group, data, min(len(data), group.array("digests").shape[0]), Place("s_test", "", {}, tests))

    def _plan(self, place: Place) -> StagePlan:
        work = self._work(place)
        group = self.cache.find(*_at(place))
        missing = runner.pending(work, group)
        total = len(work.stage.grid)
        done = total - len(missing)
        others = [
            g.attributes["identity"] for g in self.cache.groups(place.stage) if g.attributes["tests"] == place.tests
        ]
        differs = nearest(place.identity, others) if group is None else ()
        unfinished = group is not None and not missing and not group.finished(work.layout)
        return StagePlan(
            place.stage,
            place.name,
            done - unfinished,
            total,
            work.stage.grid.axes[0].length,
            group.bytes_on_disk() if group else 0,
            _bound(work),
            self._memory(place.stage, work.stage),
            self._passes(place, work.stage),
            differs,
        )

    def _passes(self, place: Place, stage: Stage) -> str:
        """Say what a stage reads how often."""
        if place.stage == "grad_z":
            return "1 pass over the training set"
        if place.stage == "curvature":
            rows = self.context.dim if self.settings.s_test.dense else 0
            return f"{rows} products with H" if rows else "a few passes over the training set"
        if place.stage == "influence":
            passes = stage.grid.shape[0]
            of = "grad_z" if self.settings.grad_z.store else "the training set, computing gradients"
            return f"{passes} pass{'es' * (passes > 1)} over {of}"
        solver = self.settings.s_test
        most = getattr(solver, "max_iterations", None)
        return f"≤ {most} passes over the training set for each block" if most else f"solver {solver.solver}"


class _Absent:
    """An input that is not there yet: it has a shape, for planning."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> Any:
        raise MissingStage("an input of this stage is not there yet")


def _at(place: Place) -> tuple[str, str]:
    return place.stage, place.name


def _inside(group: Group, block: Block) -> bool:
    return all(i < n for i, n in zip(block.index, group.array("blocks").shape, strict=False))


def _covering(grid: Any, part: slice) -> list[Block]:
    """Return the blocks of a one-dimensional grid that cover a part of it."""
    band = grid.axes[0].band
    return [grid.block((i,)) for i in range(part.start // band, -(-part.stop // band))]


def _bound(work: Work) -> int:
    """Return the bytes of all arrays, uncompressed, and of what describes them."""
    layout = work.layout
    halves = {spec.name for spec in layout.arrays if spec.encoding == "float16"}
    described = 4096 * (len(layout.stored) + len(layout.merged) + 2)
    return described + sum(
        int(np.prod(spec.shape)) * (2 if spec.name in halves else np.dtype(spec.dtype).itemsize)
        for spec in (*layout.stored, *layout.merged)
    )


def _check_fixed(data: DataSet) -> None:
    """Refuse a data set that gives other samples when asked twice."""
    data.check_fixed(sentinels(len(data))[::4])


def _check_data(group: Group, work: Work, data: DataSet, place: Place) -> None:
    """Refuse a data set that is not the one of which committed blocks are, by a few samples of these."""
    layout = work.layout
    committed = [
        i for block in work.stage.grid if group.valid(layout, block) for i in block.ids(layout.grid.axes[0].name)
    ]
    if committed:
        _compare(group, data, len(committed), place, committed)


def _compare(group: Group, data: DataSet, count: int, place: Place, among: Sequence[int] | None = None) -> None:
    ids = [among[i] if among is not None else i for i in sentinels(count)]
    kept = group.array("digests")[:]
    known = [i for i in ids if kept[i].any()]
    changed = [i for i, same in zip(known, (data.digests(known) == kept[known]).all(axis=1), strict=True) if not same]
    if changed:
        kind = "test set" if place.tests else "training set"
        raise CacheMismatch(
            f"{kind} {data.name!r} is not the one in the cache: sample{'s' * (len(changed) > 1)} "
            f"{', '.join(map(str, changed[:10]))} differ{'s' * (len(changed) == 1)} ({group.path}). "
            f"Choose another name {'for it' if place.tests else '(train_name)'}, or another cache"
        )


def _rebuild(source: str | Path, settings: Settings, cache: str, place: Place, weights: str) -> tuple[Work, Group]:
    """Make the work of a stage in a worker process."""
    experiment = runner.take_shared(source) if isinstance(source, Path) else source
    pipeline = Pipeline(experiment, cache, settings)
    if not isinstance(pipeline._source, Experiment):
        pipeline._source = load(source) if isinstance(source, str) else pipeline._source()  # type: ignore[operator]
    pipeline.context = Context(pipeline._source, settings, weights)
    pipeline.context.experiment.model.eval()
    group = pipeline.cache.find(*_at(place))
    assert group is not None
    return pipeline._work(place), group
