"""What a pipeline needs of a loaded experiment: the model on its device, the data sets, the identities."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from influence_pipeline import plan
from influence_pipeline.cache import FORMAT
from influence_pipeline.errors import CacheMismatch, RequestError
from influence_pipeline.experiment import Experiment, weights_hash
from influence_pipeline.plan import show_bytes
from influence_pipeline.samples import DataSet, First, PerClass, per_class
from influence_pipeline.settings import Settings
from influence_pipeline.task import plain
from stages.curvature import Curvature
from stages.device_batch import DeviceBatch
from stages.parameters import ModelFunction, evaluating
from stages.s_test.solver import CurvatureSolver, Solver
from stages.stage import StageError
from stages.work import Work

SENTINELS = 32
"""Samples of a data set that are read to see whether it is still the same."""


class Context:
    """A loaded experiment under some settings.

    Attributes:
        experiment: with the test sets that the settings add.
        settings: all of them.
        device: where the model is computed.
        function: the model as a function of its selected parameters.
        weights: hash of the model's parameters and buffers.
    """

    def __init__(
        self, experiment: Experiment, settings: Settings, weights: str | None = None, whole: Context | None = None
    ) -> None:
        """Load the model and take its hash.

        Args:
            experiment: what to load.
            settings: all settings.
            weights: the hash that the model must have, in a worker process.
            whole: of which this is a member, with the test sets that the settings add: its data sets are shared.

        Raises:
            RequestError: a setting does not fit the experiment.
            CacheMismatch: the model is not the one that the parent process has.
        """
        self.settings = settings
        if settings.tests and whole is None:
            experiment = experiment.with_tests(_selected(experiment, settings))
        self.experiment = experiment
        self._data_sets: dict[tuple[str, ...], DataSet] = {} if whole is None else whole._data_sets
        self._curvatures: dict[int, Curvature] = {}
        self.device = _device(settings.runtime.device)
        self.weights = weights_hash(experiment.model)
        if weights not in (None, self.weights):
            raise CacheMismatch(
                f"a worker process loaded other weights ({self.weights}) than its parent has ({weights}): the "
                "experiment must load the same weights every time, from a file, and not train"
            )
        try:
            chosen, projection = settings.grad_z.parameters, settings.grad_z.projection
            self.function = ModelFunction(experiment.model, experiment.task, chosen, self.device, projection)
            self.function.l2()
        except StageError as error:
            raise RequestError(str(error)) from error

    def member(self, checkpoint: str, weights: str | None = None) -> Context:
        """Return the context of one checkpoint, which shares the data sets of this."""
        return Context(self.experiment.member(checkpoint), self.settings, weights, self)

    def forget(self) -> None:
        """Expect nothing of any sample."""
        for data in self._data_sets.values():
            data.forget()

    def close(self) -> None:
        """Let the model go at once: what was made of it refers back to this."""
        self._curvatures.clear()

    @property
    def dim(self) -> int:
        """D."""
        return self.function.size

    @property
    def memory(self) -> int:
        """Bytes that one process may hold at once."""
        return self.settings.runtime.memory

    @property
    def train(self) -> DataSet:
        """The training set."""
        if () not in self._data_sets:
            self._data_sets[()] = self._data(self.experiment.train, self.experiment.train_name)
        return self._data_sets[()]

    def test(self, name: str) -> DataSet:
        """Return a test set."""
        if (name,) not in self._data_sets:
            self._data_sets[name,] = self._data(self.experiment.test(name), name)
        return self._data_sets[name,]

    def _data(self, data: Any, name: str) -> DataSet:
        return DataSet(
            data,
            name,
            collate=self.experiment.collate,
            device=self.device,
            keep_entries=self.experiment.task.keep,
            workers=self.experiment.loader_workers,
            keep_bytes=self.memory // 2,
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into ``eval()`` mode, and back afterwards."""
        with evaluating(self.experiment.model):
            yield

    @property
    def few(self) -> Work:
        """The work of a few training samples, with what the model keeps of each."""
        return self.curvature(len(self.train)).few

    def batch_within(self, kind: str, memory_bytes: int, most: int | None = None) -> int:
        """Return how many samples would be on the device at once, were there so much memory.

        Args:
            kind: "gradients", "ggn" or "hessian", what is computed of them.
            memory_bytes: what one process may hold.
            most: at most so many; by default as many as are computed fastest.
        """
        chosen, itemsize = self.settings.runtime.device_batch, self.function.dtype.itemsize
        if chosen != "auto":
            return chosen
        bounds = [(self.few.on_device(kind, itemsize), self._device_bytes(memory_bytes))]
        if kind == "gradients":
            bounds.append((8 * self.dim * itemsize, memory_bytes))
        best = plan.gradient_batch(self.dim, itemsize) if kind == "gradients" else plan.MOST_BATCH
        return plan.fitting(most or best, *bounds)

    def _device_bytes(self, memory_bytes: int) -> int:
        """Return what a batch may hold on the device, were there so much memory."""
        given = self.settings.runtime.device_memory
        if self.device.type == "cpu":
            return memory_bytes // 4 if given == "auto" else min(given, memory_bytes // 4)
        return self._free if given == "auto" else given

    @functools.cached_property
    def _free(self) -> int:
        """Half of what the device has free in the beginning: vectors have the other."""
        return int(torch.accelerator.get_memory_info(self.device)[0]) // 2

    def check_device_memory(self, kind: str) -> None:
        """Refuse a device that has not the memory for one sample.

        Raises:
            RequestError: with the bytes.
        """
        given = self.settings.runtime.device_memory
        one = self.few.on_device(kind, self.function.dtype.itemsize)
        if given != "auto" and one > given:
            raise RequestError(
                f"one sample takes up to {show_bytes(one, up=True)} on the device; runtime.device_memory is "
                f"{show_bytes(given)}: raise it, or choose fewer parameters ([grad_z] parameters)"
            )

    def curvature(self, count: int) -> Curvature:
        """Return the curvature that the solver asks for, over the first ``count`` training samples."""
        if count not in self._curvatures:
            solver = self.settings.s_test
            kind = solver.curvature if isinstance(solver, CurvatureSolver) else "ggn"
            batch = DeviceBatch(functools.partial(self.batch_within, kind, self.memory))
            self._curvatures[count] = Curvature(self.function, First(self.train, count), kind, batch, self.memory)
        return self._curvatures[count]

    # ---- identities: what changes an array, and nothing else ------------------------------------------------------

    def basis(self) -> dict[str, Any]:
        """Return what everything depends on that is computed of the model and the training set."""
        projection = self.settings.grad_z.projection
        return {
            "format": FORMAT,
            "weights": self.weights,
            "parameters": {name: list(p.shape) for name, p in self.function.params.items()},
            "projection": None if projection is None else projection.model_dump(mode="json"),
            "task": self.experiment.task.identity(),
            "train": self.experiment.train_name,
        }

    def grad_z_identity(self) -> dict[str, Any]:
        """Return what the training gradients depend on."""
        return {**self.basis(), "encoding": self.settings.grad_z.encoding}

    def newton_identity(self) -> dict[str, Any]:
        """Return what the corrected training gradients depend on."""
        return {**self.grad_z_identity(), **self._solved()}

    def curvature_identity(self, solver: Solver) -> dict[str, Any] | None:
        """Return what a solver's preparation depends on, None where it prepares nothing."""
        prepares = solver.preparation()
        if prepares is None:
            return None
        return {**self.basis(), "l2": plain(self.experiment.task.l2), **self._made_of(), **prepares}

    def self_influence_identity(self) -> dict[str, Any]:
        """Return what the self-influence of the training samples depends on."""
        return {**self.grad_z_identity(), **self._solved()}

    def s_test_identity(self, tests: str) -> dict[str, Any]:
        """Return what the solutions for a test set depend on."""
        return {
            **self.basis(),
            "measurement": self.experiment.task.measurement_identity(),
            "tests": tests,
            **self._solved(),
        }

    def _solved(self) -> dict[str, Any]:
        """Return what solutions depend on beside what is solved for."""
        solver = self.settings.s_test.model_dump(mode="json")
        return {"l2": plain(self.experiment.task.l2), "s_test": solver, **self._made_of()}

    def _made_of(self) -> dict[str, Any]:
        """Return what else the solver is made of: targets that are drawn, gradients as they are kept."""
        solver, found = self.settings.s_test, dict[str, Any]()
        if solver.draws:
            found["sample"] = self.experiment.task.sampling_identity()
        if solver.of_gradients:
            found["encoding"] = self.settings.grad_z.encoding
        return found


def sentinels(count: int) -> list[int]:
    """Return at most ``SENTINELS`` positions, spread evenly over ``count``."""
    return sorted({i * count // SENTINELS for i in range(SENTINELS)}) if count > SENTINELS else list(range(count))


def check_fixed(data: DataSet) -> None:
    """Refuse a data set that gives other samples when asked twice."""
    data.check_fixed(sentinels(len(data))[::4])


def _selected(experiment: Experiment, settings: Settings) -> dict[str, PerClass]:
    """Cut out the test sets that the settings ask for.

    Raises:
        RequestError: a selection fits no test set.
    """
    found = {}
    for name, selection in settings.tests.items():
        of = selection.of
        if of is None:
            if len(experiment.test_names) != 1:
                raise RequestError(f"tests.{name}: say `of` which test set: {', '.join(experiment.test_names)}")
            of = experiment.test_names[0]
        found[name] = per_class(experiment.test(of), selection.per_class, selection.start)
    return found


def _device(name: str) -> torch.device:
    """Return the device of this name, "auto" for a GPU where there is one.

    Raises:
        RequestError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta" cannot
    except Exception as error:
        raise RequestError(f"runtime.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
