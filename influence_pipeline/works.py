"""Works: every stage of an experiment, put together with where it is kept and what its blocks depend on."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Container, Iterable, Sequence
from typing import overload

import numpy as np
import torch

from influence_pipeline import combined, curvature_work, newton, plan, self_influence_work
from influence_pipeline.cache import Cache, Group, group_name
from influence_pipeline.cache.encoding import round_trip
from influence_pipeline.cache.record import digest
from influence_pipeline.context import SENTINELS, Context, check_fixed, sentinels
from influence_pipeline.errors import CacheDamaged, CacheMismatch, MissingStage, RequestError, WorkError
from influence_pipeline.evaluate.truth import measured_work, retrained_work
from influence_pipeline.influences import covering, read_by_scores
from influence_pipeline.location import ObjectPath
from influence_pipeline.place import Place
from influence_pipeline.plan import show_bytes
from influence_pipeline.samples import DataSet, changed_samples
from influence_pipeline.work import DIGESTS, Absent, Work, pending
from stages.device_batch import DeviceBatch
from stages.grad_z import ComputedRows, GradZ, PerSample
from stages.grad_z.choose import choosing_bytes
from stages.grad_z.fidelity import probe_bytes, probes_within
from stages.influence import AT_ONCE, Influence
from stages.s_test import STest
from stages.s_test.preparation import Preparation
from stages.s_test.prepare import Prepare, probe_losses, probes
from stages.s_test.solver import Solver
from stages.stage import Array, ArrayLike, Axis, Block, StageError

log = logging.getLogger(__name__)

SAME = 0.01
"""Largest relative difference between a cached gradient and the same one computed again, on another device perhaps."""


class Works:
    """The stages of one loaded experiment over one cache."""

    def __init__(self, context: Context, cache: Cache, *, keep_curvature: bool = False) -> None:
        """Put nothing together yet.

        Args:
            context: the loaded experiment.
            cache: where everything is kept.
            keep_curvature: take H and 1/N of the training set as it was when they were computed.
        """
        self.context, self.cache, self.keep_curvature = context, cache, keep_curvature
        self.settings = context.settings
        self._compared: set[int] = set()
        self._cut: dict[tuple[Solver, int, int], int] = {}

    def find(self, place: Place) -> Group | None:
        """Return the group of a stage, None where there is none."""
        return self.cache.find(place.stage, place.name)

    def band(self, place: Place, axis: str, otherwise: int) -> int:
        """Return the band of an axis: of the group where there is one, so that blocks stay what they are.

        Raises:
            CacheDamaged: the group has no such axis.
        """
        group = self.find(place)
        if group is None:
            return otherwise
        if axis not in group.attributes["bands"]:
            raise CacheDamaged(f"{group.path} has no axis {axis!r}; remove it and run again")
        return int(group.attributes["bands"][axis])

    @property
    def curvature_samples(self) -> int:
        """How many training samples H and 1/N are of: all, or those that a kept curvature was computed over.

        Raises:
            RequestError: a curvature is to be kept, and there is none.
        """
        count = len(self.context.train)
        if not self.keep_curvature:
            return count
        place = self.curvature_place()
        group = None if place is None else self.find(place)
        if group is None or DIGESTS not in group or not group.progress()[0]:
            what = f"solver {self.settings.s_test.solver!r} has none" if place is None else "none is cached"
            raise RequestError(f"no curvature can be kept: {what}. Leave --keep-curvature out")
        return min(count, int(group.array(DIGESTS).shape[0]))

    # ---- data ----------------------------------------------------------------------------------------------------

    def expect(self) -> None:
        """Have the training set refuse samples other than those of which something is cached."""
        train = self.context.train
        for place in (self.grad_z_place(), *self.curvature_places()):
            if not train.all_expected:
                expect_digests(self.find(place), train)

    def expect_tests(self, tests: str) -> None:
        """Have a test set refuse samples other than those of which something is cached, under whatever settings.

        Raises:
            CacheDamaged: a block of digests is; it is discarded.
        """
        data = self.context.test(tests)
        if data.all_expected:
            return
        for group in (self.find(self.s_test_place(tests)), *self.cache.groups("s_test")):
            if group is None or group.attributes["tests"] != tests or data.all_expected:
                continue
            try:
                expect_digests(group, data)
            except CacheDamaged as damage:
                if damage.path is not None:
                    raise
                log.warning("%s", damage)  # of other settings: it is mended when those are run

    def compare(self, data: DataSet) -> None:
        """Compare a few samples of a data set with what is cached of it, once.

        Raises:
            CacheMismatch: naming the samples that differ.
        """
        if id(data) in self._compared:
            return
        changed = data.changed(data.expected_among(sentinels))
        if changed:
            raise CacheMismatch(changed_samples(data.name, sorted(changed)))
        self._compared.add(id(data))

    def check_code(self, without: Container[int] = ()) -> None:
        """Compute something that is cached again, since the code of a task is not part of its identity.

        A gradient and its loss where there is one; otherwise losses that a solver prepared with, and measurements.

        Args:
            without: training samples that are not to be looked at.

        Raises:
            CacheMismatch: it is not the one that is cached.
        """
        group = self.find(self.grad_z_place())
        rows: Sequence[int] = [] if group is None else Committed(group)
        if without:
            rows = [row for row in rows if row not in without]
        if group is not None and rows:
            norm = group.array("norm")
            among = [rows[position] for position in sentinels(len(rows))]
            row = max(among, key=lambda i: float(norm[i]))
            self._refuse_code(group, "gradients", self.differs(self.grad_z_place(), [row]))
            return
        basis = self.context.basis()
        for stage in ("curvature", "s_test"):
            for other in self.cache.groups(stage):
                identity = other.attributes["identity"]
                if any(identity.get(name) != value for name, value in basis.items()):
                    continue
                if stage == "curvature":
                    self._refuse_code(other, "losses", self._losses_differ(other, without))
                elif other.attributes["tests"] in self.context.experiment.test_names and (
                    identity["measurement"] == self.context.experiment.task.measurement_identity()
                ):
                    tests = other.attributes["tests"]
                    self.expect_tests(tests)
                    found = self.measurements_differ(other, tests, Committed(other)[:1])
                    self._refuse_code(other, "solutions", found)

    def _refuse_code(self, group: Group, what: str, differs: list[str]) -> None:
        """Refuse code that gives something else than what is cached.

        Raises:
            CacheMismatch: it does.
        """
        if differs:
            raise CacheMismatch(
                f"the code of the task, or of the model, is not the one that the cached {what} are of: {differs[0]} "
                f"({group.path}). Undo the change, or raise `version` of the task"
            )

    def _losses_differ(self, group: Group, without: Container[int]) -> list[str]:
        """Compute losses again that a solver prepared with; return what is to be said of those that are others."""
        complete = group.records().there.all() and group.finished
        if not complete or "probe_loss" not in group:
            return []
        kept, count = group.array("probe_loss")[:], int(group.array(DIGESTS).shape[0])
        known = {i: cached for i, cached in zip(probes(count), kept.tolist(), strict=True) if i not in without}
        ids = [i for i in known if i < len(self.context.train)]
        if not ids:
            return []
        with self.context.evaluating():
            losses = probe_losses(self.context.function, self.context.train, ids)
        return [
            f"training sample {i} has a loss of {now:.5g}, cached {known[i]:.5g}"
            for i, now in zip(ids, losses.tolist(), strict=True)
            if abs(now - known[i]) > SAME * max(abs(now), abs(known[i]), 1e-3)
        ]

    def check_measurement(self, tests: str) -> None:
        """Compute one cached measurement again, for the same reason.

        Raises:
            CacheMismatch: it is not the one that is cached.
        """
        group = self.find(self.s_test_place(tests))
        if group is not None:
            self._refuse_code(group, "solutions", self.measurements_differ(group, tests, Committed(group)[:1]))

    def differs(self, place: Place, rows: Iterable[int]) -> list[str]:
        """Compute cached gradients again; return what is to be said of those that are others."""
        stage, group, found = self.work(place).stage, self.find(place), list[str]()
        assert group is not None
        with self.context.evaluating():
            for row in rows:
                values = stage.compute(Block((0,), {"sample": slice(row, row + 1)}))
                now, cached = values["gradients"][0], group.rows("gradients")[row : row + 1, :][0]
                size = max(float(np.linalg.norm(now)), float(np.linalg.norm(cached)))
                off = float(np.linalg.norm(now - cached)) / size if size else 0.0
                loss, kept = float(values["loss"][0]), float(group.array("loss")[row])
                if off > SAME or abs(loss - kept) > SAME * max(abs(loss), abs(kept), 1e-3):
                    found.append(
                        f"training sample {row} has a gradient {off:.1%} off the cached one "
                        f"(loss {loss:.5g}, cached {kept:.5g})"
                    )
        return found

    def tests_differ(self, tests: str, rows: Sequence[int]) -> list[str]:
        """Compute measurements of changed samples again; return what is to be said of those that are others."""
        group = self.find(self.s_test_place(tests))
        there = () if group is None else Committed(group)
        rows = sorted(row for row in set(rows) if row in there)
        if group is None or not rows:
            return ["no measurement of the changed samples is cached to compare with"]
        return self.measurements_differ(group, tests, rows)

    def measurements_differ(self, group: Group, tests: str, rows: Sequence[int]) -> list[str]:
        """Compute cached measurements again; return what is to be said of those that are others."""
        function, found = self.context.function, []
        per_sample = PerSample(function, function.measurements, self.context.test(tests), DeviceBatch(1))
        with self.context.evaluating():
            values = [float(found.values[0]) for found in per_sample.rows(rows)]
        for row, now in zip(rows, values, strict=True):
            cached = float(group.array("measurement")[row])
            if abs(now - cached) > SAME * max(abs(now), abs(cached), 1e-3):
                found.append(f"test sample {row} has a measurement of {now:.5g}, cached {cached:.5g}")
        return found

    # ---- places --------------------------------------------------------------------------------------------------

    def grad_z_place(self) -> Place:
        """Return where the training gradients are."""
        identity = self.context.grad_z_identity()
        return Place("grad_z", group_name(None, identity), identity)

    def gradients_place(self) -> Place:
        """Return where the gradients are that scores are made of: as they are, or corrected."""
        prepared = self.curvature_place()
        if self.settings.influence.correction is None or prepared is None:
            return self.grad_z_place()
        identity = self.context.newton_identity()
        return Place("newton", group_name(None, identity), identity, reads={"curvature": prepared.name})

    def curvature_places(self) -> list[Place]:
        """Return where the solver's preparation is, after what that reads; none where it prepares nothing."""
        return [place for solver in self.settings.s_test.chain() if (place := self.curvature_of(solver))]

    def curvature_place(self) -> Place | None:
        """Return where the solver's preparation is, None where it prepares nothing."""
        return self.curvature_of(self.settings.s_test.last())

    def curvature_of(self, solver: Solver) -> Place | None:
        """Return where the preparation of a solver is, the settings' own or one before that."""
        identity, first = self.context.curvature_identity(solver), solver.first()
        if identity is None:
            return None
        before = self.curvature_of(first) if first else None
        reads = {"curvature": before.name} if before else {}
        return Place("curvature", group_name(None, identity), identity, reads=reads | self._reads_gradients())

    def _reads_gradients(self) -> dict[str, str]:
        """Return the group of the gradients that the solver is made of, where it is."""
        return {"grad_z": self.grad_z_place().name} if self.settings.s_test.of_gradients else {}

    def s_test_place(self, tests: str) -> Place:
        """Return where a test set's solutions are."""
        self.context.test(tests)
        identity = self.context.s_test_identity(tests)
        prepared = self.curvature_place()
        reads = {"curvature": prepared.name} if prepared else {}
        return Place("s_test", group_name(tests, identity), identity, tests, reads | self._reads_gradients())

    def self_influence_place(self) -> Place:
        """Return where the self-influence of the training samples is."""
        identity, prepared = self.context.self_influence_identity(), self.curvature_place()
        reads = {"grad_z": self.grad_z_place().name, **({"curvature": prepared.name} if prepared else {})}
        return Place("self_influence", group_name(None, identity), identity, reads=reads)

    def influence_place(self, tests: str) -> Place:
        """Return where a test set's scores and rankings are."""
        reads = {place.stage: place.name for place in (self.gradients_place(), self.s_test_place(tests))}
        higher_is_better = self.context.experiment.task.higher_is_better
        settings = self.settings.influence.model_dump(mode="json", exclude_none=True)
        identity = {**reads, "higher_is_better": higher_is_better, **settings}
        return Place("influence", group_name(tests, identity), identity, tests, reads)

    def read_by_s_test(self) -> list[Place]:
        """Return where the stages are that a solver, and what it prepares, are made of.

        Raises:
            RequestError: these are gradients, and the settings say that none are kept.
        """
        solver = self.settings.s_test
        if solver.of_gradients and not self.settings.grad_z.store:
            raise RequestError(
                f'solver = "{solver.solver}" reads all training gradients several times, and grad_z.store = false '
                "keeps none: keep them (a projection or another encoding takes less), or use another solver"
            )
        return [self.grad_z_place()] if solver.of_gradients else []

    def read_by_influence(self, tests: Sequence[str]) -> list[Place]:
        """Return where the stages are that the scores of some test sets are computed of."""
        stored = [self.gradients_place()] if self.settings.grad_z.store else []
        return [*stored, *(self.s_test_place(name) for name in tests)]

    # ---- works ---------------------------------------------------------------------------------------------------

    def require(self, place: Place) -> None:
        """Refuse to go on from a stage that is not complete.

        Raises:
            MissingStage: blocks are missing; the message has the call that makes them.
        """
        work, group = self.work(place), self.find(place)
        missing = pending(work, group)
        if group is None or missing:
            of, tests = (f" of {place.tests}", place.tests) if place.tests else ("", None)
            step = "influence" if place.parts else place.stage
            command, call = step.replace("_", "-"), f"{step}({tests!r})" if tests else f"{step}()"
            command += f" --tests {tests}" if tests else ""
            raise MissingStage(
                f"{place.stage}{of} is not complete: {len(missing)} of {len(work.stage.grid)} blocks are missing. "
                f"First: pipeline.{call}, or `influence-pipeline {command} …`; `run` does all"
            )

    def work(self, place: Place, beside: Sequence[Place] = ()) -> Work:
        """Return the work of a stage; its inputs must be there to compute it, not to plan it.

        Args:
            place: which.
            beside: scores to compute with these; see :meth:`beside`.

        Raises:
            RequestError: it does not fit the memory, or a setting does not fit the data.
        """
        try:
            if place.stage == "grad_z":
                return self._grad_z()
            if place.stage == "curvature":
                return curvature_work.work(self, self._solver_of(place))
            if place.stage == "newton":
                return newton.work(self, place)
            if place.left_out is not None:
                return retrained_work(self, place) if place.stage == "retrained" else measured_work(self, place)
            if place.stage == "self_influence":
                return self_influence_work.work(self)
            if place.stage == "combined":
                return combined.work(self, place)
            assert place.tests is not None
            if place.stage == "s_test":
                return self._s_test(place.tests)
            work = self._influence(place.tests, beside)
            for other in beside:
                if (group := self.find(other)) is not None:
                    work.beside.append((self.work(other), group))
            return work
        except StageError as error:
            raise RequestError(f"{place.stage}: {error}") from error

    def undamaged(self, place: Place) -> Work:
        """Return the work of a stage as it would be were nothing cached: its layout follows from sizes alone."""
        return Works(self.context, Cache(self.cache.path / "nothing")).work(place)

    def _grad_z(self) -> Work:
        context, place = self.context, self.grad_z_place()
        dim, itemsize, encoding = context.dim, context.function.dtype.itemsize, self.settings.grad_z.encoding
        stage = self._grad_z_stage()
        rows = min(stage.grid.axes[0].band, len(context.train))

        def needed(memory: int) -> int:
            batch, kept = context.batch_within("gradients", memory), context.few.kept("gradients", context.device)
            gradients = plan.gradients_memory(dim, rows, batch, itemsize, encoding)
            if context.function.projected:
                gradients += probe_bytes(self._probes(memory), context.function.entries, itemsize)
                kept += 2 * context.few.formed * itemsize
            return max(gradients, choosing_bytes(context.function)) + min(batch, rows) * kept

        return Work(
            stage,
            "grad_z",
            context.train,
            before=lambda: self.begin(place, stage.per_sample.batch),
            computing=context.evaluating,
            memory=lambda: self.memory(needed, ["gradients"], f"grad_z: a block of gradients with {dim} coordinates"),
            passes="1 pass over the training set",
        )

    def _grad_z_stage(self) -> GradZ:
        context, encoding = self.context, self.settings.grad_z.encoding
        rows = self.band(self.grad_z_place(), "sample", plan.block_rows(context.dim))
        return GradZ(
            *(context.function, context.train, rows, encoding, self._batch(context.memory)),
            functools.partial(round_trip, encoding=encoding) if self.settings.grad_z.store else None,
            self._probes(context.memory),
        )

    def _probes(self, memory_bytes: int) -> int:
        """Return how many unprojected gradients are held while what projection loses is measured."""
        function = self.context.function
        if not (function.projected and self.settings.grad_z.store):
            return 0
        return probes_within(function.entries, function.dtype.itemsize, memory_bytes // 2)

    def _batch(self, memory_bytes: int) -> DeviceBatch:
        """Return the number of samples whose gradients are computed together, chosen when it is asked for."""
        return DeviceBatch(functools.partial(self.context.batch_within, "gradients", memory_bytes))

    def begin(self, place: Place, batch: DeviceBatch) -> None:
        """Check training set and code before gradients are computed; begin with the batch that cached ones had."""
        check_fixed(self.context.train)
        self.check_code()
        self.resume(place, gradients=batch)

    def resume(self, place: Place, **batches: DeviceBatch) -> None:
        """Begin with the numbers of samples that cached blocks were computed with, where they fit.

        Args:
            place: of the blocks.
            batches: by what is computed of them, in the order in which they are kept.
        """
        group = self.find(place)
        if group is None or self.settings.runtime.device_batch != "auto":
            return
        grid, records = group.layout.grid, group.records(whole=True)
        there = np.flatnonzero(records.table["rows"] == grid.rows)
        if not len(there):
            return
        stored = group.array("batch")
        few = dict.fromkeys(there[[*sentinels(len(there)), *range(-min(len(there), SENTINELS), 0)]].tolist())
        kept = np.stack([np.ravel(stored[grid.at(number).index[0]]) for number in few]).min(axis=0)
        for most, (kind, batch) in zip(kept.tolist(), batches.items(), strict=True):
            batch.size = self.context.batch_within(kind, self.context.memory, most)

    def _solver_of(self, place: Place) -> Solver:
        """Return the solver whose preparation is at a place."""
        return next(s for s in self.settings.s_test.chain() if self.curvature_of(s) == place)

    @property
    def gradient_rows(self) -> int:
        """Training samples whose gradients are in one block."""
        return self._grad_z_stage().grid.axes[0].band

    def parts(self, solver: Solver, length: int, summed: int) -> int:
        """Into how many parts a solver's preparation cuts what it sums over: as in its group, if that fits."""
        asked = solver, length, summed
        if asked not in self._cut:
            self._cut[asked] = curvature_work.parts_there(self, solver) or plan.parts(length, summed)
        return self._cut[asked]

    def _s_test(self, tests: str, stand_in: dict[str, ArrayLike] | None = None) -> Work:
        context, solver = self.context, self.settings.s_test
        rows = self.band(self.s_test_place(tests), "test", plan.block_rows(context.dim, plan.MOST_TESTS))
        data = context.test(tests)
        prepared, basis = self.prepared(solver.last()) if stand_in is None else (stand_in, digest([]))
        curvature = context.curvature(self.curvature_samples)

        def within(memory: int) -> STest:
            return STest(solver, curvature, prepared, data, rows, self._batch(memory), memory)

        stage = within(context.memory)

        def memory() -> int:
            what = f"s_test: solver {solver.solver!r}, for one test sample,"
            self.memory(lambda memory: within(memory).held_bytes(1), ["gradients", curvature.kind], what)
            return stage.held_bytes(min(stage.rows_at_once, rows, len(data)))

        def before() -> None:
            check_fixed(data)
            self.check_code()
            self.check_measurement(tests)
            batches = {"gradients": stage.per_sample.batch, curvature.kind: curvature.batch}
            self.resume(self.s_test_place(tests), **batches)

        blocks = len(stage.grid)
        return Work(
            stage,
            f"s_test {tests}",
            data,
            inputs=basis,
            before=before,
            holds=None if solver.preparation() is None or solver.of_gradients else context.train,
            computing=context.evaluating,
            memory=memory,
            passes=f"{solver.solver}, {blocks} block{'s' * (blocks > 1)}{solver.passes()}",
        )

    def prepared(self, solver: Solver) -> tuple[dict[str, ArrayLike], bytes]:
        """Return what a solver prepared, with what was prepared before that, and a digest of what it is of."""
        place, first = self.curvature_of(solver), solver.first()
        group = None if place is None else self.find(place)
        if group is None:
            return {}, digest([])
        work = curvature_work.work(self, solver)
        stage = work.stage
        assert isinstance(stage, Preparation)
        if solver.of_gradients and not group.fits(work.layout):
            return {}, digest([])  # of fewer samples, whose other side was the smaller one perhaps
        there: dict[str, ArrayLike] = self.prepared(first)[0] if first else {}
        there |= {**stage.read, **{name: group.array(name) for name in stage.needed}}
        return there, group.contents(work.stage.grid, lambda block: work.valid(group, block))

    def complete(self, *places: Place | None) -> bool:
        """Say whether nothing is missing of some stages."""
        found = [(self.work(place), self.find(place)) for place in places if place is not None]
        return all(group is not None and group.finished and not pending(work, group) for work, group in found)

    def s_test_by_part(self, tests: str) -> Work | None:
        """Return work like solving, of a curvature that is not complete: of the mean of those parts that are there.

        That is for measuring how long it takes. None where no part is there, or what is there is no such mean.
        """
        solver = self.settings.s_test
        place, last = self.curvature_of(solver), solver.last()
        group, work = None if place is None else self.find(place), curvature_work.work(self, solver)
        if not isinstance(work.stage, Prepare):
            return None
        there = [] if group is None else [block for block in work.stage.grid if work.valid(group, block)]
        if group is None or not there:
            return None
        means = {
            spec.name: np.mean([group.array(spec.name)[block.index[0]] for block in there], axis=0)
            for spec in work.stage.arrays
        }
        parts = {name: np.broadcast_to(mean, (len(work.stage.grid), *mean.shape)) for name, mean in means.items()}
        with self.context.evaluating():
            found = work.stage.finish(parts)
        stand_in = {**work.stage.prepared, **{name: found[name] for name in work.stage.needed}}
        return self._s_test(tests, {**stand_in, **(last.guess(stand_in) if last is not solver else {})})

    def influence_by_rows(self, place: Place, beside: Sequence[Place]) -> Work | None:
        """Return work like scoring, of random solutions and those first gradients that are there.

        That is for measuring how long it takes, in two blocks of as much work. None where no gradients are there.
        """
        stage = self._influence(str(place.tests), beside).stage
        assert isinstance(stage, Influence)
        tests = sum(len(self.context.test(str(each.tests))) for each in (place, *beside))
        tests, band = min(tests, stage.grid.axes[0].band), stage.grid.axes[1].band
        gradients = self.gradients_place()
        blocks = self.work(gradients).stage.grid
        if self.settings.grad_z.store:
            group = self.find(gradients)
            there = itertools.takewhile(lambda block: group is not None and group.whole(block), blocks)
            rows, repeats = min(band, sum(block.rows for block in there)), 2
        else:  # a block of gradients that was computed is remembered
            rows, repeats, band = int(blocks.rows[:2].sum()), 1, int(blocks.rows[0])
        if not rows:
            return None
        measured = Influence(
            _Random((tests * repeats, self.context.dim)),
            stage.gradients,
            stage.train_ids[:rows],
            np.arange(tests * repeats),
            bands=(tests, band),
            read_rows=stage.read_rows,
            read_columns=stage.read_columns,
            tile_columns=stage.tile_columns,
            rows_first=stage.rows_first,
            curvature_samples=stage.curvature_samples,
            top_k=min(stage.top_k, rows),
            store_scores=self.settings.influence.store_scores,
        )
        return Work(measured, f"influence {place.tests}", unit="scores", computing=self.context.evaluating)

    def beside(self, place: Place, others: Sequence[Place]) -> tuple[Place, ...]:
        """Return those of some scores that can be computed with others in one pass over the gradients.

        They share memory: as many as there is room for.
        """
        found: list[Place] = []
        for other in others:
            try:
                self._influence(str(place.tests), (*found, other))
            except RequestError:
                break
            found.append(other)
        return tuple(found)

    def _influence(self, tests: str, beside: Sequence[Place] = ()) -> Work:
        context, settings = self.context, self.settings.influence
        top_k = settings.top_k
        if top_k > len(context.train):
            if "top_k" in settings.model_fields_set:
                raise RequestError(f"influence.top_k = {top_k}, and there are {len(context.train)} training samples")
            top_k = len(context.train)
        rows = self.work(self.gradients_place()).stage.grid.axes[0].band
        place = self.influence_place(tests)
        bands = (
            self.band(place, "test", plan.MOST_SCORED_TESTS),
            self.band(place, "sample", plan.train_band(rows, settings.top_k)),
        )
        data, s_test, over = context.test(tests), self.s_test_place(tests), self.curvature_samples
        solved = self.find(s_test)
        vectors = Absent((len(data), context.dim)) if solved is None else solved.rows("vectors")
        gradients, of_band, computed = self.gradients(self.gradients_place())
        together = sum(len(context.test(str(other.tests))) for other in beside)
        if beside and len(data) + together > bands[0]:
            raise RequestError(f"{len(data) + together} test samples are too many for one pass")
        reads = plan.reads(
            *(len(data) + together, len(context.train), context.dim, rows, bands, context.memory),
            computed=computed,
            encoding=self.settings.grad_z.encoding,
            threads=torch.get_num_threads(),
            far=isinstance(self.cache.path, ObjectPath),
        )
        train_ids, test_ids = context.experiment.train_ids(), context.experiment.test_ids(tests)
        stage = Influence(
            vectors,
            gradients,
            train_ids,
            test_ids,
            bands=bands,
            read_rows=reads.rows,
            read_columns=reads.columns,
            tile_columns=reads.tile_columns,
            rows_first=computed,
            curvature_samples=over,
            top_k=top_k,
            store_scores=settings.store_scores,
            ahead_bytes=reads.ahead_bytes,
        )
        solving = self._s_test(tests)

        @functools.cache
        def of_tests(start: int, stop: int) -> bytes:
            if solved is None:
                return digest([])
            covered = covering(solving.stage.grid, slice(start, stop))
            return solved.contents(covered, lambda one: solving.valid(solved, one))

        @functools.cache
        def of_samples(start: int, stop: int) -> bytes:
            return of_band(slice(start, stop))

        def inputs(block: Block) -> bytes:
            tests, samples = block.bounds["test"], block.bounds["sample"]
            read = of_tests(tests.start, tests.stop), of_samples(samples.start, samples.stop)
            return read_by_scores(block, *read, over, train_ids, test_ids)

        def before() -> None:
            for read in self.read_by_influence([tests, *(str(other.tests) for other in beside)]):
                self.require(read)
            if computed:
                check_fixed(context.train)

        of = "the training set, computing gradients" if computed else "grad_z"
        return Work(
            stage,
            f"influence {tests}",
            unit="scores",
            inputs=inputs,
            before=before,
            computing=context.evaluating,
            memory=lambda: reads.memory_bytes,
            passes=f"{reads.passes} pass{'es' * (reads.passes > 1)} over {of}",
        )

    def gradients(self, place: Place) -> tuple[ArrayLike, Callable[[slice], bytes], bool]:
        """Return the gradients of a place, a digest of what a band of them is of, and whether they are computed now."""
        context, encoding = self.context, self.settings.grad_z.encoding
        if not self.settings.grad_z.store:
            stage = self._grad_z_stage()

            def rows(block: Block) -> Array:
                found, done = np.empty((block.rows, context.dim), np.float32), 0
                for part in stage.parts(block):  # none of which is held longer
                    if (gradients := part.get("gradients")) is not None:
                        found[done : done + len(gradients)] = round_trip(gradients, encoding)
                        done += len(gradients)
                return found

            def of_band(band: slice) -> bytes:
                return digest([context.train.digests(range(band.start, band.stop))])

            return ComputedRows(stage, rows), of_band, True
        group, grid = self.find(place), self.work(place).stage.grid
        if group is None:
            return Absent((len(context.train), context.dim)), lambda band: digest([]), False
        records, each = functools.cache(group.records), grid.axes[0].band
        return (
            group.rows("gradients"),
            lambda part: records().contents(part.start // each, -(-part.stop // each)),
            False,
        )

    def memory(self, needed: Callable[[int], int], kinds: Sequence[str], what: str | None) -> int:
        """Return what is held at once; refuse what does not fit the memory.

        Args:
            needed: says what is needed where there is so much.
            kinds: of what is computed on the device.
            what: is refused, for people; None where less memory takes longer.

        Raises:
            RequestError: with bytes that are enough.
            WorkError: some samples do not fit while they are looked at.
        """
        try:
            for kind in kinds:
                self.context.check_device_memory(kind)
            enough = plan.enough(needed, self.context.memory)
            held = needed(self.context.memory)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise WorkError(f"out of memory: {error}") from error
        except StageError as error:
            raise RequestError(str(error)) from error
        if what is not None and enough > self.context.memory:
            raise RequestError(
                f"{what} needs {show_bytes(enough, up=True)}; runtime.memory is {show_bytes(self.context.memory)}: "
                "raise it, or choose fewer parameters ([grad_z] parameters)"
            )
        return held


class _Random:
    """A matrix of random numbers, of which a few columns are in memory: any others that are asked for are the same."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._first = np.random.default_rng(0).standard_normal((shape[0], min(AT_ONCE, shape[1])), dtype=np.float32)

    def __getitem__(self, index: tuple[slice, slice]) -> Array:
        rows, columns = index
        return self._first[rows, : columns.stop - columns.start].copy()


class Committed(Sequence[int]):
    """The entries along a group's only axis that were computed and can be read, of which none are in memory."""

    def __init__(self, group: Group) -> None:
        """Look at what there is."""
        rows, self._band = group.records(whole=True).table["rows"], group.layout.grid.axes[0].band
        self._blocks = np.flatnonzero(rows)
        self._ends = rows[self._blocks].cumsum()

    def __len__(self) -> int:
        """Count them."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, part: int) -> int: ...
    @overload
    def __getitem__(self, part: slice) -> list[int]: ...
    def __getitem__(self, part: int | slice) -> int | list[int]:
        """Return one, or some."""
        if isinstance(part, slice):
            return [self[i] for i in range(*part.indices(len(self)))]
        number = range(len(self))[part]
        place = int(np.searchsorted(self._ends, number, "right"))
        before = int(self._ends[place - 1]) if place else 0
        return int(self._blocks[place]) * self._band + number - before

    def __contains__(self, row: object) -> bool:
        """Say whether an entry is among them."""
        assert isinstance(row, int)
        place = int(np.searchsorted(self._blocks, row // self._band))
        if place == len(self._blocks) or self._blocks[place] != row // self._band:
            return False
        before = int(self._ends[place - 1]) if place else 0
        return row % self._band < int(self._ends[place]) - before


def expect_digests(group: Group | None, data: DataSet) -> None:
    """Have a data set refuse samples other than those of which a group is."""
    if group is None or DIGESTS not in group:
        return
    stored = group.array(DIGESTS)
    if any(spec.name == DIGESTS for spec in group.layout.merged):
        parts = [slice(0, stored.shape[0])] if group.finished else []
    else:
        grid = group.layout.grid
        parts = _runs(np.flatnonzero(group.records(whole=True).table["rows"] == grid.rows), grid.axes[0])
    for part in parts:
        data.expect(stored, part)


def _runs(bands: Array, axis: Axis) -> list[slice]:
    """Return the entries of some bands, ascending, in as few slices as can be: these are read many times faster."""
    ends = np.flatnonzero(np.diff(bands) > 1)
    firsts, lasts = bands[[0, *(ends + 1)]] if len(bands) else bands, bands[[*ends, -1]] if len(bands) else bands
    return [
        slice(axis.bounds(first).start, axis.bounds(last).stop)
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]
