"""An experiment: a trained model, its task, its training set and its test sets; and how it is loaded.

Experiments load; they do not train. Worker processes load the same experiment again, by reference where there is
one ("file.py:function"), otherwise from a pickle made for that run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from influence_pipeline.checkpoints import Checkpoint, State, checked, loaded
from influence_pipeline.errors import InfluenceError, RequestError
from influence_pipeline.samples import PerClass, check_dataset
from influence_pipeline.settings import check_name
from influence_pipeline.task import Task
from stages.grad_z.choose import describe
from stages.stage import Array, Ids, Positions

Data = Dataset[Any] | Callable[[], Dataset[Any]]
Show = Callable[[Any], Any]
"""Given one sample, returns an image (of PIL, an array or a tensor), a text, or a mapping of names to values."""
Retrain = Callable[..., nn.Module]
"""``retrain(dataset, seed)``, or ``retrain(dataset, seed, weights)`` where samples can have weights."""


class Experiment:
    """Everything that belongs to one trained model.

    Attributes:
        task: what is learnt and measured.
        train_name: name of the training set in the cache.
        collate: as for a DataLoader; PyTorch's default where None.
        loader_workers: processes that read samples, 0 for none.
        retrain: trains the model anew, None where the experiment does not say how.
        weighted: whether it takes weights of samples.
        mislabelled: ids of training samples that are known to have wrong labels, None where nothing is known.
        show: says what people see of a sample, None where its shape and type do.
        label_names: of labels by their numbers, None where numbers do.
        checkpoints: sets of weights by name, whose scores are combined; empty where the model's own count.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        task: Task,
        train: Data,
        tests: Mapping[str, Data],
        *,
        train_name: str = "train",
        collate: Callable[[list[Any]], Any] | None = None,
        loader_workers: int = 0,
        train_ids: Sequence[int] | None = None,
        retrain: Retrain | None = None,
        mislabelled: Sequence[int] | None = None,
        show: Show | None = None,
        label_names: Sequence[str] | Mapping[int, str] | None = None,
        checkpoints: Mapping[str, State | str | Path | Callable[[], State] | Checkpoint] | None = None,
    ) -> None:
        """Describe an experiment; a model or a data set may be a function that makes it, called when needed.

        Args:
            model: the trained model, in any mode and on any device; it stays as it is.
            task: what is learnt and measured.
            train: the training set, a map-style data set.
            tests: test sets by name.
            train_name: name of the training set in the cache.
            collate: makes a batch of a list of samples; PyTorch's default where None.
            loader_workers: processes that read samples, for data sets that are slow to read.
            train_ids: the ids by which training samples are named in results; by default their positions.
            retrain: trains a model anew, for evaluation alone: ``retrain(dataset, seed)`` minimises the mean loss over
                the data set, a subset of the training set. ``retrain(dataset, seed, weights)`` is given the whole of
                it with a weight for each sample, (N,), 1 or 0, and minimises their sum of weighted losses over N.
            mislabelled: ids of training samples that are known to have wrong labels, for evaluation alone.
            show: says what people are to see of one sample, given as the data set yields it: an image (of PIL, an array
                or a tensor), a text, or a mapping of names to values. By default what its shape and type suggest.
            label_names: what labels are called, by their numbers.
            checkpoints: weights by name, from other seeds or saved along one training, in the place of the model's
                own: a state dict, the path of one, a function that returns one, or a Checkpoint with a weight. Each is
                scored by itself; the scores are averaged, or summed by these weights.

        Raises:
            RequestError: something is not of the kind that is needed.
        """
        if not isinstance(task, Task):
            raise RequestError(f"task must be an ip.Task, for example ip.Classification(), got {type(task).__name__}")
        if not isinstance(tests, Mapping):
            raise RequestError(
                f'tests must be data sets by name, for example {{"holdout": test_set}}, got {type(tests).__name__}'
            )
        if not _whole(loader_workers) or loader_workers < 0:
            raise RequestError(f"loader_workers must be a whole number, 0 or more, got {loader_workers!r}")
        if isinstance(task.keep, str) or not isinstance(task.keep, Iterable):
            raise RequestError(f'task.keep must be names of entries, for example ("mask",), got {task.keep!r}')
        self.task = task
        self.train_name = check_name(train_name, "train_name")
        self.collate = collate
        self.loader_workers = loader_workers
        self._model = model
        self._train = train
        self._tests = {check_name(name, "tests"): data for name, data in tests.items()}
        self._train_ids = None if train_ids is None else _array(train_ids)
        if retrain is not None and not callable(retrain):
            raise RequestError(f"retrain must be a function of (dataset, seed), got {type(retrain).__name__}")
        self.retrain = retrain
        self.weighted = retrain is not None and "weights" in inspect.signature(retrain).parameters
        self.mislabelled = None if mislabelled is None else _array(mislabelled)
        if show is not None and not callable(show):
            raise RequestError(f"show must be a function of one sample, got {type(show).__name__}")
        self.show = show
        self.label_names = None if label_names is None else _names(label_names)
        self.checkpoints = {} if checkpoints is None else checked(checkpoints)

    @property
    def model(self) -> nn.Module:
        """The trained model.

        Raises:
            RequestError: it is no module.
        """
        if not isinstance(self._model, nn.Module):
            made = _call(self._model, "model") if callable(self._model) else self._model
            if not isinstance(made, nn.Module):
                raise RequestError(
                    f"model must be a torch.nn.Module or a function that makes one, got {type(made).__name__}"
                )
            self._model = made
        self._model = _unwrapped(self._model)
        return self._model

    @property
    def train(self) -> Dataset[Any]:
        """The training set."""
        made = self._train = _made(self._train, self.train_name)
        return made

    @property
    def test_names(self) -> tuple[str, ...]:
        """The names of the test sets."""
        return tuple(self._tests)

    def test(self, name: str) -> Dataset[Any]:
        """Return a test set.

        Raises:
            RequestError: there is none of this name.
        """
        if name not in self._tests:
            known = ", ".join(self._tests) or "none"
            raise RequestError(f"no test set {name!r}; the experiment has: {known}")
        made = self._tests[name] = _made(self._tests[name], name)
        return made

    def with_tests(self, tests: Mapping[str, Dataset[Any]]) -> Experiment:
        """Return this experiment with further test sets.

        Raises:
            RequestError: a name is taken.
        """
        for name in tests:
            if name in self._tests:
                raise RequestError(f"tests.{name}: the experiment has a test set of this name; choose another name")
        other = Experiment.__new__(Experiment)
        other.__dict__.update(self.__dict__)
        other._tests = {**self._tests, **tests}
        return other

    def member(self, checkpoint: str) -> Experiment:
        """Return the experiment of one checkpoint: its weights are the model's, its data sets the same objects.

        Raises:
            RequestError: there is none of this name, or it does not fit the model.
        """
        if checkpoint not in self.checkpoints:
            known = ", ".join(self.checkpoints) or "none"
            raise RequestError(f"no checkpoint {checkpoint!r}; the experiment has: {known}")
        other = Experiment.__new__(Experiment)
        other.__dict__.update({**self.__dict__, "_train": self.train})
        other._model, other.checkpoints = loaded(self.model, checkpoint, self.checkpoints[checkpoint]), {}
        return other

    def train_ids(self) -> Ids:
        """Return the ids by which training samples are named, (N,) int64.

        Raises:
            RequestError: they are not as many different whole numbers as there are samples.
        """
        count = check_dataset(self.train, self.train_name)
        if self._train_ids is None:
            return Positions(count)
        ids, most = self._train_ids, np.iinfo(np.int64).max
        whole = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
        if not whole or len(ids) != count or len(np.unique(ids)) != count or ids.min() < 0 or ids.max() > most:
            raise RequestError(
                f"train_ids must be {count} different whole numbers of at least 0, one for each sample, below 2**63"
            )
        return ids.astype(np.int64)

    def retrained(self, left_out: Sequence[int], seed: int) -> nn.Module:
        """Train a model anew without the training samples at some positions.

        Raises:
            RequestError: there is no ``retrain``, or it raises, or gives something else than a model.
        """
        if self.retrain is None:
            raise RequestError("retraining needs a function that does so: Experiment(…, retrain=function)")
        count = check_dataset(self.train, self.train_name)
        kept = torch.ones(count)
        kept[list(left_out)] = 0.0
        if self.weighted:
            model = _call(lambda: cast("Retrain", self.retrain)(self.train, seed, weights=kept), "retrained")
        else:
            subset = Subset(self.train, kept.nonzero().flatten().tolist())
            model = _call(lambda: cast("Retrain", self.retrain)(subset, seed), "retrained")
        if not isinstance(model, nn.Module):
            raise RequestError(f"retrain must return a torch.nn.Module, got {type(model).__name__}")
        return _unwrapped(model)

    def test_ids(self, name: str) -> Array:
        """Return the positions of a test set's samples, (T,) int64; in the set it was cut out of by ``per_class``."""
        data = self.test(name)
        if isinstance(data, PerClass):
            return np.asarray(data.indices, dtype=np.int64)
        return np.arange(check_dataset(data, name), dtype=np.int64)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile`` and data parallel training wrap around one."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _whole(value: Any) -> bool:
    return isinstance(value, Integral)


def _array(ids: Any) -> Array:
    """Return ids as an array, whatever they are.

    Raises:
        RequestError: there is no such array.
    """
    try:
        return np.asarray(ids)
    except Exception as error:
        raise RequestError(f"train_ids must be whole numbers, one for each sample: {error}") from error


def _names(given: Any) -> dict[int, str]:
    """Return names of labels by their numbers.

    Raises:
        RequestError: they are no such names.
    """
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    pairs = list(enumerate(given)) if listed else list(given.items()) if isinstance(given, Mapping) else []
    if not pairs or not all(_whole(number) and isinstance(name, str) for number, name in pairs):
        raise RequestError(
            'label_names must be texts in the order of the labels, for example ["cat", "dog"], or by their numbers: '
            '{3: "cat", 5: "dog"}'
        )
    return {int(number): name for number, name in pairs}


def _call(make: Callable[[], Any], what: str) -> Any:
    """Call a user's function that makes a model or a data set.

    Raises:
        InfluenceError: what it raised of that kind.
        RequestError: it raised anything else; shown with its lines.
    """
    try:
        return make()
    except InfluenceError:
        raise
    except Exception as error:
        raise RequestError(f"the function that makes {what!r} raised {describe(error)}") from error


def _made(data: Data, name: str) -> Dataset[Any]:
    """Return a data set, calling the function that makes it where it is one."""
    made: Any = _call(data, name) if callable(data) and not hasattr(data, "__getitem__") else data
    check_dataset(made, name)
    return cast("Dataset[Any]", made)


def weights_hash(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers: names, types, shapes, bytes.

    Raises:
        RequestError: one of them has no values yet, or is no dense tensor.
    """
    state = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        try:
            value = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
            state.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            state.update(value.flatten().view(torch.uint8).numpy().tobytes())
        except Exception as error:
            raise RequestError(
                f"model: {name} cannot be read ({type(error).__name__}: {error}): it must be a dense tensor that has "
                "values. Load the weights; run a model with lazy layers once"
            ) from error
    return state.hexdigest()[:16]


def absolute(reference: str) -> str:
    """Return a reference that means the same in any folder."""
    place, _, name = reference.partition(":")
    return f"{Path(place).absolute()}:{name}" if place.endswith(".py") else reference


def load(reference: str) -> Experiment:
    """Call the function that a reference names, "file.py:function" or "package.module:function".

    Raises:
        InfluenceError: what the function itself raised of that kind.
        RequestError: the file or function is missing, raises, or does not return an Experiment; an error inside
            the file is shown with its own file and line.
    """
    place, _, name = reference.partition(":")
    if not place or not name:
        raise RequestError(f'experiment = {reference!r} must be "file.py:function" or "package.module:function"')
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, name, None)
        if not callable(function):
            found = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "nothing"
            raise RequestError(f"{place} has no function {name!r}; it has {found}")
        experiment = function()
    except InfluenceError:
        raise
    except Exception as error:
        raise RequestError(_own_lines(error, place, reference)) from error
    if not isinstance(experiment, Experiment):
        raise RequestError(f"{reference} must return an ip.Experiment, got {type(experiment).__name__}")
    return experiment


_files: dict[str, set[str]] = {}
"""Folders of the files that were loaded here, with the names of the modules that were there before."""


def forget_files() -> None:
    """Have files, and what they import of their folders, loaded anew: a worker of a cluster outlives their edits."""
    for folder, before in _files.items():
        for name in sys.modules.keys() - before:
            place = Path(getattr(sys.modules[name], "__file__", None) or "/")
            if place.is_relative_to(folder) and "site-packages" not in place.parts:
                del sys.modules[name]
        if folder in sys.path:
            sys.path.remove(folder)
    _files.clear()
    importlib.invalidate_caches()


def _load_file(path: Path) -> ModuleType:
    """Import a file by its path, with its folder on the path so that it can import its neighbours.

    Raises:
        RequestError: there is no such file.
    """
    path = path.resolve()
    if not path.is_file():
        raise RequestError(f"experiment: {path}: no such file")
    # By content, too: a file that was edited since it was last loaded here is another module.
    name = f"influence_experiment_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    _files.setdefault(str(path.parent), set(sys.modules) - {name})
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _own_lines(error: Exception, place: str, reference: str) -> str:
    """Describe an error in the user's file by its own lines, without the frames that led there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{reference}: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).name == Path(place).name] or frames[-1:]
    lines = "".join(f"\n  {frame.filename}, line {frame.lineno}: {frame.line}" for frame in own)
    return f"{reference} raised {type(error).__name__}: {error}{lines}"
