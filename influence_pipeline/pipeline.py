"""Pipeline: the stages of one experiment, over one cache."""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from influence_pipeline import checks, engines, inventory, report, room, runner
from influence_pipeline.cache import Cache, Group, key_of, nearest
from influence_pipeline.cache.store import files_at
from influence_pipeline.checks import Verification
from influence_pipeline.combined import Part, combined_place, named, part
from influence_pipeline.context import Context
from influence_pipeline.errors import CacheDamaged, CacheMismatch, MissingStage, RequestError, WorkError
from influence_pipeline.evaluate import Evaluation, evaluate
from influence_pipeline.evaluate.left_out import listed
from influence_pipeline.evaluate.truth import Measured, Truth
from influence_pipeline.experiment import Experiment, absolute, forget_files, load, weights_hash
from influence_pipeline.influences import Influences
from influence_pipeline.location import Location, ObjectPath
from influence_pipeline.logs import logging_to
from influence_pipeline.place import Place, read_paths
from influence_pipeline.plan import LARGE_BYTES, Plan, StagePlan, Suggestion, Timing, show_bytes
from influence_pipeline.runner import Outcome
from influence_pipeline.self_influences import SelfInfluence
from influence_pipeline.settings import Settings
from influence_pipeline.shard import Shard
from influence_pipeline.work import DIGESTS, Work, pending
from influence_pipeline.works import Works
from stages.stage import Array

log = logging.getLogger(__name__)

Source = Experiment | Callable[[], Experiment] | str
Result = TypeVar("Result")
MOST_FINISHING = 60.0
"""Seconds that a plan may take to complete what was measured, where other stages need it."""
MOST_MENDS = 8
"""Times that a stage goes on after something in the cache was found damaged."""


class Pipeline:
    """The stages ``grad_z``, ``s_test`` and ``influence`` of one experiment, resuming from whatever is cached."""

    def __init__(
        self,
        experiment: Source,
        cache: Location | str | None = None,
        settings: Settings | None = None,
        *,
        keep_curvature: bool = False,
        shard: str | None = None,
    ) -> None:
        """Name the work; nothing is loaded or computed.

        Args:
            experiment: an experiment, a function that makes one, or a reference "file.py:function".
            cache: the cache's folder; by default the one that the settings name.
            settings: the defaults where None.
            keep_curvature: where the training set got longer, keep H and 1/N of what it was, and so all solutions;
                only the scores of the new samples are computed.
            shard: compute a fixed share of every stage's blocks, "0/8" for the first of eight; the others are other
                processes' work. Without it, processes over one cache share the blocks by claiming them. A call waits
                for what it needs of the other shares; what ends with ``grad_z``, ``newton`` or ``s_test`` leaves the
                rest to them, and whoever is last merges.

        Raises:
            RequestError: there is no experiment or no cache, the folder holds something else, or there is no such
                shard.
        """
        self.settings = settings or Settings()
        folder = cache or self.settings.cache
        if folder is None:
            raise RequestError("no cache: give Pipeline a folder, or settings that name one (cache = …)")
        if not isinstance(experiment, (Experiment, str)) and not callable(experiment):
            raise RequestError(f"experiment must be an ip.Experiment or a reference, got {type(experiment).__name__}")
        if self.settings.runtime.on_cluster and not isinstance(experiment, str):
            raise RequestError(
                f"workers of {self.settings.runtime.backend!r} load the experiment from a file: name it as "
                '"/path/file.py:function"'
            )
        self.cache = Cache(folder)
        one_process = isinstance(self.cache.path, ObjectPath) and self.cache.path.of_one_process
        if one_process and (self.settings.runtime.processes > 1 or self.settings.runtime.on_cluster):
            raise RequestError(f"cache {folder} is of this process alone: set runtime.workers = 1, or name another")
        self._source, self._keep_curvature = experiment, keep_curvature
        self._shard = None if shard is None else Shard.parse(shard)
        self._token = uuid.uuid4().hex
        self._seconds: dict[str, float] = {}
        self._hinted = False
        self._member_of: tuple[Pipeline, str] | None = None

    @classmethod
    def from_toml(cls, path: Path | str, *, keep_curvature: bool = False, shard: str | None = None) -> Pipeline:
        """Make a pipeline of a settings file that names its experiment and its cache.

        Args:
            path: the settings file.
            keep_curvature: see :class:`Pipeline`.
            shard: see :class:`Pipeline`.

        Raises:
            RequestError: the file has neither, or something in it is wrong.
        """
        settings = Settings.from_toml(path)
        if settings.experiment is None or settings.cache is None:
            raise RequestError(f"{path}: {'cache' if settings.experiment else 'experiment'} is missing")
        return cls(settings.experiment, settings.cache, settings, keep_curvature=keep_curvature, shard=shard)

    @functools.cached_property
    def _works(self) -> Works:
        """The loaded experiment's stages."""
        if self._member_of is None:
            context = Context(_experiment(self._source), self.settings)
        else:
            whole, checkpoint = self._member_of
            context = whole._works.context.member(checkpoint)
        return Works(context, self.cache, keep_curvature=self._keep_curvature)

    @property
    def experiment(self) -> Experiment:
        """The experiment, loaded, with the test sets that the settings add."""
        return self._works.context.experiment

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test sets."""
        return self.experiment.test_names

    @functools.cached_property
    def members(self) -> Mapping[str, Pipeline]:
        """A pipeline over the same cache for each checkpoint of the experiment; none where it has no checkpoints.

        What is called for all of them goes from one to the next, and holds the model of one at a time.

        Raises:
            RequestError: a checkpoint does not fit the model, or two are the same.
        """
        found, known = dict[str, Pipeline](), dict[str, str]()
        for name in self.experiment.checkpoints:
            weights = weights_hash(self.experiment.member(name).model)
            if weights in known:
                raise RequestError(
                    f"checkpoints {known[weights]!r} and {name!r} are the same weights: name them once (in a sum, with "
                    "the sum of their weights)"
                )
            known[weights] = name
            member = Pipeline(self._source, self.cache.path, self.settings, keep_curvature=self._keep_curvature)
            member._member_of, member._token, member._shard = (self, name), self._token, self._shard
            found[name] = member
        return found

    # ---- the stages ----------------------------------------------------------------------------------------------

    def grad_z(self, *, new: bool = False, wait: bool = False) -> Outcome:
        """Compute the training gradients that are missing.

        Args:
            new: start a new set of gradients beside others of the same training set.
            wait: where this is one of several shards, for the others, too.

        Returns:
            What was done.

        Raises:
            RequestError: the settings say that gradients are not stored.
            CacheMismatch: gradients of this training set are there under another identity (unless ``new``), or
                the training set has changed.
        """
        if not self.settings.grad_z.store:
            raise RequestError("grad_z.store = false: gradients are computed when influence asks for them")
        if self.members:
            return _together(self._each(lambda member: member.grad_z(new=new, wait=wait)))
        place = self._works.grad_z_place()
        self._mend(place, *self._works.curvature_places())
        if not new and not self._exists(place):
            self._refuse_second(place)
        return self._run(place, wait=wait)

    def newton(self, *, wait: bool = False) -> Outcome:
        """Compute the corrected training gradients that are missing, after what the solver prepares.

        Args:
            wait: where this is one of several shards, for the others, too.

        Raises:
            RequestError: the settings ask for no correction, or one sample's outputs × D exceed the memory.
        """
        if self.members:
            return _together(self._each(lambda member: member.newton(wait=wait)))
        place, prepared = self._works.gradients_place(), self._works.curvature_places()
        if place.stage != "newton":
            raise RequestError('no correction is asked for: set [influence] correction = "newton"')
        self._mend(*prepared, place)
        self._hint_at_others()
        work = self._works.work(place)
        if pending(work, self._works.find(place)):
            work.memory()
        for each in prepared:
            self._run(each)
        return self._run(place, wait=wait)

    def s_test(self, tests: str, *, wait: bool = False) -> Outcome:
        """Solve for the test samples that are missing, after what the solver prepares for all test sets.

        Args:
            tests: the name of the test set.
            wait: where this is one of several shards, for the others, too.

        Raises:
            MissingStage: the solver is made of the gradients, and these are not complete.
            CacheMismatch: the test set has changed.
        """
        if self.members:
            return _together(self._each(lambda member: member.s_test(tests, wait=wait)))
        place, prepared = self._works.s_test_place(tests), self._works.curvature_places()
        self._mend(self._works.grad_z_place(), *prepared, place)
        for read in self._works.read_by_s_test():
            self._check_data(read)
            self._works.require(read)
        self._hint_at_others()
        seconds = sum(self._run(each).seconds for each in prepared)
        outcome = self._run(place, wait=wait)
        self._seconds[tests] = self._seconds.get(tests, 0.0) + seconds + outcome.seconds
        return outcome

    def self_influence(self) -> SelfInfluence:
        """Compute the missing self-influence of training samples, after what the solver prepares.

        These are as many solutions as there are training samples: little for ``exact``, and for an iterative solver
        as much for each as for a test sample. ``plan(self_influence=True)`` counts them.

        Raises:
            RequestError: the experiment has several checkpoints.
            MissingStage: gradients are not complete; the message has the call that makes them.
            CacheDamaged: what was written is damaged again and again.
        """
        self._refuse_several("self_influence")
        works = self._works
        place, gradients, prepared = works.self_influence_place(), works.grad_z_place(), works.curvature_places()
        self._mend(gradients, *prepared)
        if self.settings.grad_z.store:
            self._check_data(gradients)
            works.require(gradients)
        for each in prepared:
            self._run(each)
        return self._result(place, lambda group, seconds: SelfInfluence.read(self.cache, group))

    def influence(self, tests: str) -> Influences:
        """Compute the scores and rankings that are missing.

        Raises:
            MissingStage: gradients or solutions are not complete; the message has the call that makes them.
            CacheDamaged: what was written is damaged again and again.
        """
        return self.influences(tests)[tests]

    def influences(self, *tests: str) -> dict[str, Influences]:
        """Compute the missing scores and rankings of several test sets, or all, in one pass over the gradients.

        Raises:
            MissingStage: gradients or solutions are not complete; the message has the call that makes them.
            CacheDamaged: what was written is damaged again and again.
        """
        names = self._named(tests)
        if self.members:
            return self._combined(names, lambda member: member.influences(*names))
        self._mend(*self._places(names), self._works.grad_z_place())
        for place in self._works.read_by_influence(names):
            self._check_data(place)
            self._works.require(place)
        return self._influences(names)

    def _influences(self, tests: Sequence[str]) -> dict[str, Influences]:
        """Compute scores and rankings; what they are made of is looked at where some are missing, and not before.

        Raises:
            MissingStage: it is not complete.
        """
        found: dict[str, Influences] = {}
        while left := [name for name in dict.fromkeys(tests) if name not in found]:
            place, *others = map(self._works.influence_place, left)
            # The first of those that fit into one pass has the others computed with it.
            beside = self._works.beside(place, others)
            for each, with_it in ((place, beside), *((other, ()) for other in beside)):
                found[str(each.tests)] = self._influence(each, with_it)
        return found

    def _influence(self, place: Place, beside: Sequence[Place]) -> Influences:
        def read(group: Group, seconds: float) -> Influences:
            tests = str(place.tests)
            self._seconds[tests] = self._seconds.get(tests, 0.0) + seconds
            return Influences(self.cache, group, self._seconds[tests])

        return self._result(place, read, beside)

    def _result(self, place: Place, read: Callable[[Group, float], Result], beside: Sequence[Place] = ()) -> Result:
        """Compute what is missing of a stage and read it; what is found damaged then is computed anew.

        Args:
            place: of the stage.
            read: reads it, given the seconds that computing took.
            beside: scores to compute with these.

        Raises:
            CacheDamaged: it is damaged again and again.
        """
        self._mend(place)
        for _ in range(MOST_MENDS):
            seconds = self._run(place, beside).seconds
            group = self._works.find(place)
            assert group is not None
            try:
                return read(group, seconds)
            except CacheDamaged as damage:
                if damage.path is None:
                    raise
                log.warning("%s", damage)
                self._again(damage.path)
        raise CacheDamaged(f"{place.stage}/{place.name} was damaged {MOST_MENDS} times: look at the disk")

    def evaluate(self, *tests: str, told: Callable[[str], None] = lambda line: None) -> dict[str, Evaluation]:
        """Train the model again without some samples, as ``[evaluate]`` says, and compare that with the scores.

        All that is missing is run first. Each retrained model is cached, and used for every solver and test set.

        Args:
            tests: names of test sets; all where none is given.
            told: hears how many models are to be trained, and how long that takes, after the first of them.

        Returns:
            What was found, by test set.

        Raises:
            RequestError: the experiment has no ``retrain``, or scores are not stored.
        """
        found, truth, settings, own = self.run(*tests), self._truth, self.settings.evaluate, None
        if settings.self_influence and self.experiment.mislabelled is not None:
            own = self._own_influence()
        return {name: evaluate(truth, influences, settings, told, own) for name, influences in found.items()}

    def _own_influence(self) -> Array:
        """Return the self-influence of all training samples, (N,); of several checkpoints combined as scores are."""
        if self.members:
            found = self._each(lambda member: (member._weight, member._own_influence())).values()
            factors = [1 / len(found) if weight is None else weight for weight, _ in found]
            return np.asarray(np.einsum("m,mn->n", factors, [values for _, values in found]))
        if self.settings.grad_z.store:
            self.grad_z()
        return self.self_influence().values

    def retrained(self, tests: str, left_out: Sequence[Sequence[int]], seeds: int = 1) -> Measured:
        """Train models without some training samples, if they are not cached, and measure them at a test set.

        Args:
            tests: the test set.
            left_out: positions of the training samples that each model does without; none for a model of all.
            seeds: each is trained with the seeds 0, 1, …

        Raises:
            RequestError: the experiment has no ``retrain``.
        """
        return self._truth.measured(tests, listed(left_out), seeds)

    def report(self, tests: str, path: Path | str = "report.html", k: int | None = None) -> Path:
        """Write results as a page: one HTML file that opens from disk, with what each sample looks like.

        What samples look like is said by the experiment's ``show``, or by their shape and type. Nothing is computed but
        the model's outputs for the samples that are shown; of several checkpoints those of the first.

        Args:
            tests: the test set.
            path: the file.
            k: helpful and harmful training samples of each test; by default ten, or as many as there are.

        Returns:
            The file.

        Raises:
            MissingStage: scores are not complete; the message has the call that makes them.
            RequestError: the extra ``report`` is not installed, there is no place for the file, or k is too large.
        """
        path = Path(path)
        report.check(path)
        place = self._scores_place(tests)
        self._mend(place)
        self._check_data(place)
        self._works.require(place)
        influences = Influences.open(self.cache.path, tests, place.name.removeprefix(f"{tests}-"))
        first = next(iter(self.members.values()), self)
        report.write(influences, first._works.context, path, k)
        return path

    @property
    def _truth(self) -> Truth:
        return Truth(self._works, self._run)

    # ---- what is there -------------------------------------------------------------------------------------------

    def verify(self, *tests: str, sample: int = 0) -> Verification:
        """Read all that is cached and compare it with its checksums, and all samples with those that it is of.

        Damaged blocks are discarded, so that the next run computes them anew.

        Args:
            tests: the test sets whose samples are read again; all where none is given.
            sample: how many random training gradients to compute again, of each checkpoint where there are several.
        """
        names = tests or self.tests
        # What is damaged stands in what is returned, so that it is not said at once, too.
        return checks.verify(
            self._works, names, sample, lambda: self._mend_known(logging.INFO), lambda: self._each_works()
        )

    def refresh(self, *tests: str) -> dict[str, list[int]]:
        """Read all samples again, and discard what is cached of those that changed, for the next run to compute.

        Returns:
            The positions of changed samples by data set.
        """
        self._token = uuid.uuid4().hex  # so that workers load the data anew
        names = tests or self.tests
        if self.members:
            return self._united(lambda member: member.refresh(*names))
        return checks.refresh(self._works, names)

    def accept_data(self, *tests: str) -> dict[str, list[int]]:
        """Read all samples again, and let what is cached stand for those that changed, if the model sees no change.

        Returns:
            The positions of changed samples by data set.

        Raises:
            CacheMismatch: the model gives other gradients for some of them.
        """
        self._token = uuid.uuid4().hex  # so that workers load the data anew
        names = tests or self.tests
        if self.members:
            return self._united(lambda member: member.accept_data(*names))
        return checks.accept(self._works, names)

    def run(self, *tests: str, new: bool = False) -> dict[str, Influences]:
        """Do all that is missing, for some test sets or all of them.

        Args:
            tests: names of test sets; all where none is given.
            new: as for :meth:`grad_z`.

        Returns:
            The results by test set.

        Raises:
            RequestError: there is no test set, or none of that name.
            WorkError: something was removed meanwhile.
        """
        names = self._named(tests)
        if self.members:
            return self._combined(names, lambda member: member.run(*names, new=new))
        if self.settings.influence.correction:
            self.newton(wait=True)
        elif self.settings.grad_z.store:
            self.grad_z(new=new, wait=True)
        for name in names:
            self.s_test(name, wait=True)
        try:
            return self._influences(names)
        except MissingStage as missing:
            raise WorkError(f"something that this run computed was removed meanwhile: run again ({missing})") from None

    def plan(self, *tests: str, measure: bool = False, self_influence: bool = False) -> Plan:
        """Say what is there and what a run would take, for some test sets or all.

        Args:
            tests: names of test sets; all where none is given.
            measure: compute a block of each stage, or two where one is short, keep them, and say what the others take
                by that; otherwise nothing is computed.
            self_influence: also what :meth:`self_influence` would take, which is no part of a run and not measured.
        """
        names, context = self._named(tests), self._works.context
        if self_influence:
            self._refuse_several("self_influence")
        title = (
            f"{len(context.train)} training samples × {context.dim} coordinates, "
            f"tests: {', '.join(f'{name} ({len(context.test(name))})' for name in names)}, "
            f"device {context.device}, cache {self.cache.path}"
        )
        stages = self._stages(names, measure=measure, self_influence=self_influence)
        over, count = 0 if self.members else self._works.curvature_samples, len(context.train)
        if over not in (0, count):
            title += f"\nH and 1/N are of the first {over} of {count} training samples (kept)"
        found = Plan(title, stages, room.free_bytes(self.cache.path), room.SPARE)
        return replace(found, suggestions=tuple(self._smaller(found)))

    def _stages(self, tests: Sequence[str], *, measure: bool, self_influence: bool) -> tuple[StagePlan, ...]:
        """Plan all stages; of several checkpoints one after the other, and what combines their scores last."""
        if self.members:
            self._refuse_not_stored()
            found = self._each(
                lambda member: (
                    member._stages(tests, measure=measure, self_influence=False),
                    {name: part(member._works, name, member._weight) for name in tests},
                )
            )
            own = (replace(stage, member=name) for name, (stages, _) in found.items() for stage in stages)
            parts = [by_tests for _, by_tests in found.values()]
            places = [combined_place(self._works, name, [one[name] for one in parts]) for name in tests]
            return (*own, *map(self._plan, places))
        places = self._places(tests)
        if self_influence:
            places.append(self._works.self_influence_place())
        for place in places:
            self._check_data(place)
        timings = self._measure(tests) if measure else {}
        return tuple(self._plan(place, timings.get(place.name)) for place in places)

    def _smaller(self, plan: Plan) -> list[Suggestion]:
        """Suggest smaller gradients where what is to be written may not fit, or is very much."""
        gradients, *others = plan.stages
        if gradients.stage != "grad_z" or gradients.complete:
            return []
        if plan.fits and gradients.bytes_expected <= LARGE_BYTES:
            return []
        context = self._works.context

        def available(dim: int) -> int:
            free = plan.free - plan.spare
            for other in others:
                if not other.complete:
                    needed = other.bytes_expected - other.bytes_on_disk
                    # Other stages' arrays have a column for each coordinate, scores have not.
                    free -= needed if other.stage in ("influence", "combined") else needed * dim // context.dim
            return free

        return room.advice(context, self._works.work(self._works.grad_z_place()), available)

    def _measure(self, names: Sequence[str]) -> dict[str, Timing]:
        """Time blocks of each stage; return what they took by the stage's key.

        Blocks of stages whose inputs are complete are kept. A curvature is computed to its end where that takes no
        more than ``MOST_FINISHING`` seconds, since all else depends on it.
        """
        works, found = self._works, dict[str, Timing | None]()
        gradients, prepared = works.gradients_place(), works.curvature_places()
        self._mend(*self._places(names))
        if self.settings.grad_z.store and gradients.stage == "grad_z":
            if not self._exists(gradients):
                self._refuse_second(gradients)
            found[gradients.name] = self._run(gradients, measure=True).timing
        for number, each in enumerate(prepared):
            if works.complete(*works.read_by_s_test(), *prepared[:number]):
                found[each.name] = timing = self._run(each, measure=True).timing
                if timing is not None and self._plan(each, timing).seconds <= MOST_FINISHING:
                    found[each.name] = replace(timing, rest=timing.rest + self._run(each).seconds)
        if gradients.stage == "newton" and works.complete(*prepared):
            found[gradients.name] = self._run(gradients, measure=True).timing
        for name in names:
            place = works.s_test_place(name)
            if works.complete(*prepared):
                found[place.name] = self._run(place, measure=True).timing
            else:
                found[place.name] = self._aside(place, works.s_test_by_part(name), "a curvature of some parts")
        left = [works.influence_place(name) for name in names]
        whole = works.complete(*works.read_by_influence(names))
        while left:
            place, *others = left
            beside = works.beside(place, others)
            if whole:
                timing = self._beside(place, beside)
            else:
                timing = self._aside(place, works.influence_by_rows(place, beside), "random vectors")
            # By entries, so that what test sets share is shared between them.
            found |= {each.name: timing for each in (place, *beside)}
            left = [other for other in others if other not in beside]
        return {key: timing for key, timing in found.items() if timing is not None}

    def _beside(self, place: Place, beside: Sequence[Place]) -> Timing | None:
        """Time blocks of scores with those that are computed beside them."""
        works, test = self._works, self._works.context.test
        timing = self._run(place, beside, measure=True).timing
        for other in beside:
            if not pending(works.work(other), works.find(other)):
                self._run(other)
        together, own = sum(len(test(str(each.tests))) for each in (place, *beside)), len(test(str(place.tests)))
        if timing is None:
            return None
        return replace(timing, blocks=tuple((rows * together // own, seconds) for rows, seconds in timing.blocks))

    def _aside(self, place: Place, work: Work | None, stand_in: str) -> Timing | None:
        """Time blocks that are not to be kept; None where there is nothing to make them of, or nothing missing."""
        if work is None or not pending(self._works.work(place), self._works.find(place)):
            return None
        with tempfile.TemporaryDirectory(prefix="influence_pipeline_") as folder:
            group = Group.create(Path(folder) / place.stage / place.name, work.layout, place.attributes)
            timing = runner.measure(work, group, self.settings.runtime, lambda missing: missing).timing
            return None if timing is None else replace(timing, stand_in=stand_in, shares=room.shares(group))

    def garbage(self) -> list[Location]:
        """Return the folders of what is cached and belongs to no complete result, nor to this experiment as it is."""
        return inventory.garbage(self.cache, [self.cache.path / place.stage / place.name for place in self._known()])

    def _known(self) -> list[Place]:
        """Return where all is that may be computed of this experiment as it is."""
        if self.members:
            return [*itertools.chain(*self._each(Pipeline._known).values()), *self._combined_places()]
        return [*self._places(self.tests), self._works.self_influence_place()]

    def _places(self, tests: Sequence[str]) -> list[Place]:
        """Return where all stages are, in the order in which they are run."""
        works = self._works
        gradients, prepared = [works.gradients_place()] if self.settings.grad_z.store else [], works.curvature_places()
        places = [*prepared, *gradients] if self.settings.influence.correction else [*gradients, *prepared]
        for name in tests:
            places += [works.s_test_place(name), works.influence_place(name)]
        return places

    # ---- several checkpoints -------------------------------------------------------------------------------------

    @contextmanager
    def _at_hand(self) -> Iterator[Pipeline]:
        """Give this pipeline, and let its model go afterwards: another checkpoint's takes its place."""
        try:
            yield self
        finally:
            if (works := self.__dict__.pop("_works", None)) is not None:
                works.context.close()

    def _each(self, do: Callable[[Pipeline], Result]) -> dict[str, Result]:
        """Do something with the pipeline of each checkpoint, one after the other."""
        found = {}
        for name, member in self.members.items():
            with member._at_hand():
                found[name] = do(member)
        return found

    def _united(self, found: Callable[[Pipeline], Mapping[str, list[int]]]) -> dict[str, list[int]]:
        """Return positions by data set that any checkpoint finds; each looks at what is cached of it alone."""
        united: dict[str, set[int]] = {}
        for member in self.members.values():
            self._works.context.forget()
            with member._at_hand():
                for name, positions in found(member).items():
                    united.setdefault(name, set()).update(positions)
        return {name: sorted(positions) for name, positions in united.items()}

    def _each_works(self) -> Iterator[Works]:
        """Yield the stages of each checkpoint, one after the other; of the experiment where it has none."""
        if not self.members:
            yield self._works
        for member in self.members.values():
            with member._at_hand():
                yield member._works

    @property
    def _weight(self) -> float | None:
        """What the scores of this checkpoint are multiplied by; None where it has no weight."""
        assert self._member_of is not None
        whole, checkpoint = self._member_of
        return whole.experiment.checkpoints[checkpoint].weight

    def _combined_places(self) -> list[Place]:
        """Return where the combined scores of all test sets are."""
        if not self.settings.influence.store_scores:
            return []
        found = self._each(lambda one: [named(one._works, name, one._weight) for name in self.tests]).values()
        return [combined_place(self._works, *args) for args in zip(self.tests, zip(*found, strict=True), strict=True)]

    def _scores_place(self, tests: str) -> Place:
        """Return where the scores of a test set are: of one model, or the combined ones of several as they are now."""
        if not self.members:
            return self._works.influence_place(tests)
        self._refuse_not_stored()

        def looked_at(member: Pipeline) -> Part:
            member._check_data(member._works.s_test_place(tests))
            return part(member._works, tests, member._weight)

        return combined_place(self._works, tests, list(self._each(looked_at).values()))

    def _combined(
        self, tests: Sequence[str], scored: Callable[[Pipeline], Mapping[str, Influences]]
    ) -> dict[str, Influences]:
        """Have the scores of all checkpoints computed, and combine them.

        Args:
            tests: names of test sets.
            scored: computes the scores of one checkpoint.
        """
        self._refuse_not_stored()

        def parts_of(member: Pipeline) -> tuple[Mapping[str, Influences], list[Part]]:
            results = scored(member)  # first, so that these are there
            return results, [part(member._works, name, member._weight) for name in tests]

        found = self._each(parts_of).values()
        combined = {}
        for number, name in enumerate(tests):
            place = combined_place(self._works, name, [parts[number] for _, parts in found])
            combined[name] = self._influence(place, ())
            combined[name].seconds += sum(results[name].seconds for results, _ in found)
        return combined

    def _refuse_several(self, what: str) -> None:
        """Refuse what there is of one model alone.

        Raises:
            RequestError: the experiment has several.
        """
        if self.members:
            raise RequestError(
                f"{what} is of one model, and the experiment has {len(self.members)} checkpoints: ask one of them, "
                f"pipeline.members[{next(iter(self.members))!r}].{what}()"
            )

    def _refuse_not_stored(self) -> None:
        """Refuse to combine scores that are not kept.

        Raises:
            RequestError: the settings say so.
        """
        if not self.settings.influence.store_scores:
            raise RequestError(
                "influence.store_scores = false, and the scores of checkpoints are combined of those that are stored: "
                "store them, or ask the checkpoints one by one, pipeline.members[…].run()"
            )

    # ---- running -------------------------------------------------------------------------------------------------

    def _named(self, tests: Sequence[str]) -> Sequence[str]:
        for name in tests:
            self.experiment.test(name)
        if not (tests or self.tests):
            raise RequestError("the experiment has no test set")
        return tests or self.tests

    def _run(self, place: Place, beside: Sequence[Place] = (), *, measure: bool = False, wait: bool = True) -> Outcome:
        """Run a stage; what it finds damaged in the cache is computed anew first.

        Args:
            place: of the stage.
            beside: scores to compute with these.
            measure: compute blocks to be timed only.
            wait: for the blocks of other shards.

        Raises:
            CacheDamaged: something is, and no block can be computed anew for it.
        """
        with logging_to(self.settings.runtime.log_file):
            last = ""
            for _ in range(MOST_MENDS):
                try:
                    return self._run_once(place, beside, self._shard, measure=measure, wait=wait)
                except CacheDamaged as damage:
                    if str(damage) == last:
                        raise
                    last = str(damage)
                    log.warning("%s", damage)
                    if damage.path is None:
                        self._mend_known()
                    else:
                        self._again(damage.path, place.models)
            return self._run_once(place, beside, self._shard, measure=measure, wait=wait)

    def _refuse_gone(self, place: Place, damage: CacheDamaged) -> None:
        """Refuse to begin again where a stage's arrays, or what it reads, went away under it.

        Raises:
            WorkError: they did.
        """
        read = read_paths(self.cache.path, place.reads)
        needed = [path for path in read if path.parent.name != "grad_z" or self.settings.grad_z.store]
        for folder in (self.cache.path / place.stage / place.name, *needed):
            if not files_at(folder).there:
                raise WorkError(
                    f"{folder} is gone: it was removed, or its disk taken away, while {place.stage} was computed. "
                    "The next run makes it anew"
                ) from damage

    def _run_once(
        self,
        place: Place,
        beside: Sequence[Place] = (),
        shard: Shard | None = None,
        *,
        measure: bool = False,
        wait: bool = True,
    ) -> Outcome:
        runtime = self.settings.runtime
        if place.parts:  # reads more than it computes
            runtime = runtime.model_copy(update={"workers": 1, "backend": "loky", "address": None})
        for other in beside:
            self._open(other)
        group = self._open(place)
        try:
            work = self._works.work(place, beside)
            fits = functools.partial(room.refuse, place, work, group, self._works.context)
            if measure:
                return runner.measure(work, group, runtime, fits)
            with self._sent() as source:
                rebuild = functools.partial(
                    _rebuild,
                    *(self._token, source, self.settings, str(self.cache.path.absolute()), place),
                    # Where there are checkpoints, the model's own weights count for nothing.
                    None if self.members else self._works.context.weights,
                    keep_curvature=self._keep_curvature,
                    beside=beside,
                    checkpoint=self._member_of[1] if self._member_of else None,
                )
                token = f"{self._token} {place.stage} {place.name}"
                return runner.run(work, group, runtime, rebuild, token, fits, shard, wait=wait)
        except CacheDamaged as damage:
            self._refuse_gone(place, damage)
            raise

    def _again(self, path: Location, models: Place | None = None) -> None:
        """Compute what was discarded of another stage's arrays, or of retrained models."""
        works = self._works
        solved = (works.s_test_place(name) for name in self.tests)
        places = [works.gradients_place(), works.grad_z_place(), *works.curvature_places(), *solved, models]
        for place in places:
            if place is not None and self.cache.path / place.stage / place.name == path:
                self._run_once(place)
        for member in self.members.values() if path.parent.name == "influence" else ():
            with member._at_hand():
                for name in self.tests:
                    if member._works.influence_place(name).name == path.name:
                        member.influences(name)

    @contextmanager
    def _sent(self) -> Iterator[str | Path]:
        """Give what worker processes load the experiment from."""
        if isinstance(self._source, str):
            yield absolute(self._source)
        elif self.settings.runtime.processes == 1:
            yield ""
        else:
            with runner.shared(self._source) as path:
                yield path

    def _exists(self, place: Place) -> bool:
        return files_at(self.cache.path / place.stage / place.name).there

    def _mend(self, *places: Place | None, said: int = logging.WARNING) -> None:
        """Mend damaged descriptions, which follow from the identity and from sizes; ``said`` is at which level."""
        for place in places:
            if place is not None and self._exists(place):
                try:
                    Group(self.cache.path / place.stage / place.name).layout  # noqa: B018 - reads them all
                except CacheDamaged as damage:
                    log.log(said, "%s", damage)
                    self.cache.create(place.stage, place.name, self._works.undamaged(place).layout, place.attributes)

    def _mend_known(self, said: int = logging.WARNING) -> None:
        """Mend the damaged descriptions of all that may be computed of this experiment as it is."""
        if self.members:
            self._each(lambda member: member._mend_known(said))
            self._mend(*self._combined_places(), said=said)
        else:
            self._mend(*self._known(), said=said)

    def _open(self, place: Place) -> Group:
        """Return the group of a stage, of the size that the work has now.

        Raises:
            CacheMismatch: the cache holds more samples than there are, or other samples.
        """
        works = self._works
        self._check_data(place)
        group, work = works.find(place), works.work(place)
        if group is not None and not group.fits(work.layout):
            if work.data is not None:
                raise CacheMismatch(
                    f"{group.path} holds {group.array(DIGESTS).shape[0]} samples of {work.data.name!r}, which has "
                    f"{len(work.data)} now. Is it another set? Choose another name {_other_name(place)}, "
                    f"or another cache; `rm {place.name}` removes what is there"
                )
            self.cache.remove(group.path, unless=lambda group: group.fits(work.layout))
            group = None
        if group is None or not self.cache.exists:
            work.memory()
            group = self.cache.create(place.stage, place.name, work.layout, place.attributes)
        self.cache.tidy()
        group.clear()
        shapes = {spec.name: spec.shape for spec in group.layout.all}
        if any(shapes[spec.name] != spec.shape for spec in work.layout.all):
            self.cache.resize(group, work.layout)
        return group

    def _check_data(self, place: Place) -> None:
        """Refuse samples that are not those in the cache.

        Raises:
            CacheMismatch: naming the samples that differ.
            CacheDamaged: a description is damaged.
        """
        works = self._works
        for left in reversed(range(MOST_MENDS)):
            try:
                works.expect()
                works.compare(works.context.train)
                if place.tests is not None:
                    works.expect_tests(place.tests)
                    works.compare(works.context.test(place.tests))
            except CacheDamaged as damage:
                # Its record is removed, so that next time it is not there.
                if damage.path is None or not left:
                    raise
                log.warning("%s", damage)
            else:
                return

    # ---- refusing ------------------------------------------------------------------------------------------------

    def _refuse_second(self, place: Place) -> None:
        """Refuse to start gradients of a training set that has some, under another identity.

        Raises:
            CacheMismatch: naming the entries that differ, and the cost.
        """
        if self._cached_gradients():
            wanted = self._plan(place)
            raise CacheMismatch(
                f"training gradients of {self.experiment.train_name!r} are cached, of something else. Cached ≠ now:\n  "
                + "\n  ".join(wanted.differs)
                + f"\nStarting again computes {wanted.rows} gradients and takes up to "
                f"{show_bytes(wanted.bytes_expected)}. If that is wanted: --new, or grad_z(new=True)"
            )

    def _hint_at_others(self) -> None:
        """Say, once, that solutions are not for the training gradients that are cached: those cannot be used then."""
        if self._hinted or self._exists(self._works.grad_z_place()):
            return
        basis = self._works.context.basis()
        differs = nearest(basis, ({name: of[name] for name in basis} for of in self._cached_gradients()))
        if differs:
            log.warning(
                "no training gradients of %r are cached of what s_test is computed of now; nearest cached ≠ now: %s",
                self.experiment.train_name,
                ", ".join(differs),
            )
        self._hinted = True

    def _cached_gradients(self) -> list[dict[str, Any]]:
        """Return the identities of all gradients of the training set of which something is cached.

        For one of several checkpoints none, where the same is cached of others: another is what was asked for.
        """
        found: list[dict[str, Any]] = [
            group.attributes["identity"]
            for group in self.cache.groups("grad_z")
            if group.attributes["identity"]["train"] == self.experiment.train_name and group.progress()[0]
        ]
        own = self._works.context.grad_z_identity()
        same = any(key_of({**other, "weights": own["weights"]}) == key_of(own) for other in found)
        return [] if self._member_of and same else found

    def _grown(self, place: Place, group: Group) -> tuple[str, ...]:
        """Say where a stage is computed anew because the training set got longer."""
        count = len(self._works.context.train)
        if place.stage != "curvature" or self._keep_curvature or group.array(DIGESTS).shape[0] == count:
            return ()
        was = group.array(DIGESTS).shape[0]
        return (f"training samples: {was} ≠ {count}; H, S and 1/N are computed anew (--keep-curvature keeps them)",)

    def _plan(self, place: Place, timing: Timing | None = None) -> StagePlan:
        work, group = self._works.work(place), self._works.find(place)
        missing = pending(work, group)
        cached = [g.attributes for g in self.cache.groups(place.stage)]
        others = [attributes["identity"] for attributes in cached if attributes["tests"] == place.tests]
        size, files, _ = group.size() if group else (0, 0, 0.0)
        expected, measured = room.expected_bytes(work, group, timing.shares if timing else {})
        seconds = 0.0
        if timing is not None:
            seconds = timing.left(missing.rows, len(missing), engines.count(self.settings.runtime))
        to_merge = group is not None and not missing and not group.finished
        return StagePlan(
            place.stage,
            place.name,
            done=len(work.stage.grid) - len(missing) - to_merge,
            total=len(work.stage.grid),
            rows=work.stage.grid.axes[0].length,
            files=files,
            files_expected=work.layout.file_count,
            bytes_on_disk=size,
            bytes_expected=expected,
            measured=measured,
            memory_bytes=work.memory() if missing else 0,
            passes=work.passes,
            differs=nearest(place.identity, others) if group is None else self._grown(place, group),
            timing=timing,
            seconds=seconds,
        )


def _experiment(source: Source) -> Experiment:
    """Return the experiment that a source stands for.

    Raises:
        RequestError: it makes something else.
    """
    if isinstance(source, Experiment):
        return source
    made = load(source) if isinstance(source, str) else source()
    if not isinstance(made, Experiment):
        raise RequestError(f"the function must return an ip.Experiment, got {type(made).__name__}")
    return made


def _together(outcomes: Mapping[str, Outcome]) -> Outcome:
    """Return what was done of a stage for several checkpoints."""
    found = outcomes.values()
    computed, total = sum(one.computed for one in found), sum(one.total for one in found)
    return Outcome(computed, total, sum(one.seconds for one in found), sum(one.left for one in found))


def _other_name(place: Place) -> str:
    return "for this test set" if place.tests else "(train_name)"


_loaded: dict[tuple[str, str], Context] = {}
"""Contexts by their pipeline's token and the checkpoint, "" for the experiment's own model."""


def _rebuild(
    token: str,
    source: str | Path,
    settings: Settings,
    cache: str,
    place: Place,
    weights: str | None,
    *,
    keep_curvature: bool,
    beside: Sequence[Place] = (),
    checkpoint: str | None = None,
) -> tuple[Work, Group]:
    """Make the work of a stage in a worker process, which keeps model and data for the pipeline's next stage.

    Raises:
        WorkError: the stage's arrays are gone.
    """
    if (token, "") not in _loaded:
        _loaded.clear()
        if settings.runtime.on_cluster:
            forget_files()
        experiment = _experiment(runner.take_shared(source) if isinstance(source, Path) else source)
        _loaded[token, ""] = Context(experiment, settings, None if checkpoint else weights)
    if (token, checkpoint or "") not in _loaded:
        for other in [key for key in _loaded if key[1]]:  # one checkpoint's model at a time
            del _loaded[other]
        _loaded[token, str(checkpoint)] = _loaded[token, ""].member(str(checkpoint), weights)
    works = Works(_loaded[token, checkpoint or ""], Cache(cache), keep_curvature=keep_curvature)
    works.expect()
    for each in (place, *beside):
        if each.tests is not None:
            works.expect_tests(each.tests)
    group = works.find(place)
    if group is None:
        raise WorkError(f"{works.cache.path / place.stage / place.name} is gone: it was removed meanwhile. Run again")
    return works.work(place, beside), group
