"""Pipeline: the stages of one experiment, over one cache."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from influence_pipeline import runner
from influence_pipeline.cache import Cache, Group, Layout, nearest
from influence_pipeline.context import Context, sentinels
from influence_pipeline.errors import CacheDamaged, CacheMismatch, MissingStage, RequestError
from influence_pipeline.experiment import Experiment, load
from influence_pipeline.influences import Influences
from influence_pipeline.plan import Plan, StagePlan, show_bytes
from influence_pipeline.runner import DIGESTS, Outcome, Work
from influence_pipeline.samples import DataSet
from influence_pipeline.settings import Settings
from influence_pipeline.works import Place, Works

Source = Experiment | Callable[[], Experiment] | str


class Pipeline:
    """The stages ``grad_z``, ``s_test`` and ``influence`` of one experiment, resuming from whatever is cached."""

    def __init__(self, experiment: Source, cache: Path | str | None = None, settings: Settings | None = None) -> None:
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
        if settings.experiment is None or settings.cache is None:
            raise RequestError(f"{path}: {'cache' if settings.experiment else 'experiment'} is missing")
        return cls(settings.experiment, settings.cache, settings)

    @functools.cached_property
    def _works(self) -> Works:
        """The loaded experiment's stages."""
        return Works(Context(_experiment(self._source), self.settings), self.cache)

    @property
    def experiment(self) -> Experiment:
        """The experiment, loaded, with the test sets that the settings add."""
        return self._works.context.experiment

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test sets."""
        return self.experiment.test_names

    # ---- the stages ----------------------------------------------------------------------------------------------

    def grad_z(self, *, new: bool = False) -> Outcome:
        """Compute the training gradients that are missing.

        Args:
            new: start a new set of gradients beside others of the same training set.

        Returns:
            What was done.

        Raises:
            RequestError: the settings say that gradients are not stored.
            CacheMismatch: gradients of this training set are there under another identity (unless ``new``), or
                the training set has changed.
        """
        if not self.settings.grad_z.store:
            raise RequestError("grad_z.store = false: gradients are computed when influence asks for them")
        place = self._works.grad_z_place()
        if not new and self._works.find(place) is None:
            self._refuse_second(place)
        return self._run(place)

    def s_test(self, tests: str) -> Outcome:
        """Solve for the test samples that are missing, after what the solver prepares for all test sets.

        Raises:
            CacheMismatch: the test set has changed.
        """
        place = self._works.s_test_place(tests)
        self._refuse_renamed(tests)
        prepared = self._works.curvature_place()
        seconds = self._run(prepared).seconds if prepared else 0.0
        outcome = self._run(place)
        self._seconds[tests] = self._seconds.get(tests, 0.0) + seconds + outcome.seconds
        return outcome

    def influence(self, tests: str) -> Influences:
        """Compute the scores and rankings that are missing.

        Raises:
            MissingStage: gradients or solutions are not complete; the message has the call that makes them.
        """
        place = self._works.influence_place(tests)
        if self.settings.grad_z.store:
            self._require(self._works.grad_z_place(), "grad_z()", "grad-z")
        self._require(self._works.s_test_place(tests), f"s_test({tests!r})", f"s-test --tests {tests}")
        outcome = self._run(place)
        self._seconds[tests] = self._seconds.get(tests, 0.0) + outcome.seconds
        group = self._works.find(place)
        assert group is not None
        return Influences(self.cache, group, self._seconds[tests])

    def run(self, *tests: str, new: bool = False) -> dict[str, Influences]:
        """Do all that is missing, for some test sets or all of them.

        Args:
            tests: names of test sets; all where none is given.
            new: as for :meth:`grad_z`.

        Returns:
            The results by test set.

        Raises:
            RequestError: there is no test set, or none of that name.
        """
        names = self._named(tests)
        if self.settings.grad_z.store:
            self.grad_z(new=new)
        found = {}
        for name in names:
            self.s_test(name)
            found[name] = self.influence(name)
        return found

    def plan(self, *tests: str) -> Plan:
        """Say what is there and what a run would take, for some test sets or all; nothing is computed."""
        names, works, context = self._named(tests), self._works, self._works.context
        places = [works.grad_z_place()] if self.settings.grad_z.store else []
        if prepared := works.curvature_place():
            places.append(prepared)
        for name in names:
            places += [works.s_test_place(name), works.influence_place(name)]
        title = (
            f"{len(context.train)} training samples × {context.dim} coordinates, "
            f"tests: {', '.join(f'{name} ({len(context.test(name))})' for name in names)}, "
            f"device {context.device}, cache {self.cache.path}"
        )
        return Plan(title, tuple(self._plan(place) for place in places))

    # ---- running -------------------------------------------------------------------------------------------------

    def _named(self, tests: Sequence[str]) -> Sequence[str]:
        for name in tests:
            self.experiment.test(name)
        if not (tests or self.tests):
            raise RequestError("the experiment has no test set")
        return tests or self.tests

    def _run(self, place: Place) -> Outcome:
        runtime = self.settings.runtime
        with runner.logging_to(runtime.log_file):
            work = self._works.work(place)
            group = self._open(place, work)
            with self._sent() as source:
                rebuild = functools.partial(
                    _rebuild, source, self.settings, str(self.cache.path), place, self._works.context.weights
                )
                return runner.run(work, group, runtime, rebuild, f"{self._token} {place.stage} {place.name}")

    @contextmanager
    def _sent(self) -> Iterator[str | Path]:
        """Give what worker processes load the experiment from."""
        if isinstance(self._source, str):
            yield self._source
        elif self.settings.runtime.workers == 1:
            yield ""
        else:
            with runner.shared(self._source) as path:
                yield path

    def _open(self, place: Place, work: Work) -> Group:
        """Return the group of a stage, of the size that the work has now.

        Raises:
            CacheMismatch: the cache holds more samples than there are.
        """
        layout = work.layout
        group = self._works.find(place)
        if group is not None and not group.fits(layout):
            if work.data is not None:
                raise CacheMismatch(
                    f"{group.path} holds {group.array(DIGESTS).shape[0]} samples of {work.data.name!r}, which has "
                    f"{len(work.data)} now. Is it another set? Choose another name {_other_name(place)}, "
                    "or another cache"
                )
            with group.lock():
                self.cache.remove(group)
        group = self.cache.create(place.stage, place.name, layout, place.attributes)
        with group.lock():
            group.resize(layout)
        if work.data is not None:
            _compare(group, work.data, place, _committed(group, layout))
        return group

    # ---- refusing ------------------------------------------------------------------------------------------------

    def _require(self, place: Place, call: str, command: str) -> None:
        """Refuse to go on from a stage that is not complete, or whose samples have changed.

        Raises:
            MissingStage: blocks are missing.
        """
        work, group = self._works.work(place), self._works.find(place)
        missing = runner.pending(work, group)
        if group is None or missing:
            raise MissingStage(
                f"{place.stage}{f' of {place.tests}' if place.tests else ''} is not complete: {len(missing)} of "
                f"{len(work.stage.grid)} blocks are missing. First: pipeline.{call}, or "
                f"`influence-pipeline {command} …`; `run` does all"
            )
        assert work.data is not None
        _compare(group, work.data, place, range(len(work.data)))

    def _refuse_second(self, place: Place) -> None:
        """Refuse to start gradients of a training set that has some, under another identity.

        Raises:
            CacheMismatch: naming the entries that differ, and the cost.
        """
        train = self.experiment.train_name
        others = [
            group.attributes["identity"]
            for group in self.cache.groups("grad_z")
            if group.attributes["identity"]["train"] == train and group.progress()[0]
        ]
        if others:
            wanted = self._plan(place)
            raise CacheMismatch(
                f"training gradients of {train!r} are cached, of something else. Cached ≠ now:\n  "
                + "\n  ".join(wanted.differs)
                + f"\nStarting again computes {wanted.rows} gradients and takes up to "
                f"{show_bytes(wanted.bytes_bound)}. If that is wanted: --new, or grad_z(new=True)"
            )

    def _refuse_renamed(self, tests: str) -> None:
        """Refuse a test set whose name stands for other data in the cache, under whatever settings."""
        data = self._works.context.test(tests)
        for group in self.cache.groups("s_test"):
            if group.attributes["tests"] == tests:
                count = min(len(data), group.array(DIGESTS).shape[0])
                # What cannot be read is found, and made anew, when that group is asked for.
                with contextlib.suppress(CacheDamaged):
                    _compare(group, data, Place("s_test", group.path.name, {}, tests), range(count))

    def _plan(self, place: Place) -> StagePlan:
        work, group = self._works.work(place), self._works.find(place)
        missing = runner.pending(work, group)
        cached = [g.attributes for g in self.cache.groups(place.stage)]
        others = [attributes["identity"] for attributes in cached if attributes["tests"] == place.tests]
        to_merge = group is not None and not missing and not group.finished(work.layout)
        return StagePlan(
            place.stage,
            place.name,
            done=len(work.stage.grid) - len(missing) - to_merge,
            total=len(work.stage.grid),
            rows=work.stage.grid.axes[0].length,
            bytes_on_disk=group.bytes_on_disk() if group else 0,
            bytes_bound=work.layout.bytes_bound(),
            memory_bytes=work.memory_bytes,
            passes=work.passes,
            differs=nearest(place.identity, others) if group is None else (),
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


def _other_name(place: Place) -> str:
    return "for this test set" if place.tests else "(train_name)"


def _committed(group: Group, layout: Layout) -> Sequence[int]:
    """Return the samples of all blocks that are there."""
    axis = layout.grid.axes[0]
    return [i for block in layout.grid if group.valid(layout, block) for i in block.ids(axis.name)]


def _compare(group: Group, data: DataSet, place: Place, among: Sequence[int]) -> None:
    """Refuse a data set that is not the one of which something is cached, by a few samples.

    Args:
        group: where digests of what was read are.
        data: the data set now.
        place: what is cached.
        among: the samples that may be looked at.

    Raises:
        CacheMismatch: naming the samples that differ.
    """
    stored = group.array(DIGESTS)
    kept = {i: stored[i] for i in (among[position] for position in sentinels(len(among)))}
    changed = [i for i, digest in kept.items() if digest.any() and not np.array_equal(data.digests([i])[0], digest)]
    if changed:
        raise CacheMismatch(
            f"{'test' if place.tests else 'training'} set {data.name!r} is not the one in the cache: "
            f"sample{'s' * (len(changed) > 1)} {', '.join(map(str, changed[:10]))} "
            f"differ{'s' * (len(changed) == 1)} ({group.path}). "
            f"Choose another name {_other_name(place)}, or another cache"
        )


def _rebuild(source: str | Path, settings: Settings, cache: str, place: Place, weights: str) -> tuple[Work, Group]:
    """Make the work of a stage in a worker process."""
    experiment = _experiment(runner.take_shared(source) if isinstance(source, Path) else source)
    works = Works(Context(experiment, settings, weights), Cache(cache))
    group = works.find(place)
    assert group is not None
    return works.work(place), group
