"""The functions of ``pytorch_influence_functions``, on this pipeline.

With ``import influence_pipeline.compat as ptif`` a script written for that package runs. Arguments, config keys,
results and file names are those of that package, and this module alone speaks its sign:

    influence = −S Gᵀ / N,

how the loss of a test sample changes when a training sample weighs more: the negative of ``Influences.scores``.
Positive is **harmful**; ``harmful`` begins with the largest, ``helpful`` with the smallest.

The loss is the cross-entropy of logits, over all trainable parameters, with the Gauss-Newton matrix in the place of
the Hessian and solver ``lissa``. Of the loaders ``dataset`` and ``collate_fn`` are used, and the training loader's
``batch_size`` for LiSSA's minibatches; every sample of a data set counts, whatever a loader's sampler would draw.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.utils.data import DataLoader, default_collate, default_convert

from influence_pipeline.errors import CacheMismatch, RequestError
from influence_pipeline.experiment import Experiment
from influence_pipeline.influences import Influences
from influence_pipeline.pipeline import Pipeline
from influence_pipeline.samples import PerClass, check_dataset, fetch, per_class
from influence_pipeline.settings import Settings
from influence_pipeline.task import Classification, targets_of

log = logging.getLogger(__name__)

RANKS = 500
"""Ids at most in the ``harmful`` and ``helpful`` of one test sample."""

ALIASES = {"r_averaging": "r", "test_sample_start_per_class": "test_start_index"}
"""Further names of keys."""

Results = tuple[dict[str, dict[str, Any]], list[int], list[int]]
Count = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """The config, checked. None, False and a key left out stand for this package's defaults.

    Attributes:
        outdir: folder of the JSON files; "outdir" by default.
        save_pth: folder of the cache; the folder "cache" in ``outdir`` by default.
        log_filename: a file that gets the log, too.
        dataset: a name, kept with the results.
        calc_method: kept with the results; the function that is called decides.
        seed: of the choice of LiSSA's minibatches.
        gpu: −1 for the CPU, n for GPU n, or the CPU where there is no CUDA; by default a GPU where there is one.
        recursion_depth: steps at most; "auto", the default, goes on until the estimate has settled.
        r: recursions that are averaged; "auto" until their standard error is small.
        damp: the damping is λ = damp · scale, so it needs a number for ``scale``, unless it is 0. By default λ is
            0.1 times the mean eigenvalue.
        scale: the step size is 1 / scale; "auto" from the largest eigenvalue of some minibatches.
        test_sample_num: test samples of each class; the whole test set by default.
        test_start_index: how many samples of each class to pass over; only with ``test_sample_num``.
        num_classes: the classes are 0 … num_classes − 1; by default those that the test set has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    outdir: Path = Path("outdir")
    save_pth: Path | None = None
    log_filename: Path | None = None
    dataset: Any = None
    calc_method: Literal["img_wise", "all_grad_then_test"] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    gpu: Annotated[int, Field(ge=-1)] | None = None
    recursion_depth: Literal["auto"] | Count | None = None
    r: Literal["auto"] | Count | None = None
    damp: Annotated[float, Field(ge=0)] | None = None
    scale: Literal["auto"] | Annotated[float, Field(gt=0)] | None = None
    test_sample_num: Count | None = None
    test_start_index: Annotated[int, Field(ge=0)] = 0
    num_classes: Count | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Config:
        """Check a config.

        Raises:
            RequestError: a key is unknown, out of its range, contradicted by another, or needs another.
        """
        unknown = [str(key) for key in config if key not in cls.model_fields and key not in ALIASES]
        if unknown:
            known = ", ".join((*cls.model_fields, *ALIASES))
            raise RequestError(f"config: unknown key {', '.join(unknown)}; known are {known}")
        given: dict[str, Any] = {}
        for key, value in config.items():
            name = ALIASES.get(key, key)
            if value is not None and value is not False and given.setdefault(name, value) != value:
                raise RequestError(f"config: {name} is given twice, once as {key}: {given[name]!r} and {value!r}")
        try:
            checked = cls(**given)
        except ValidationError as error:
            lines = [f"  {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}" for problem in error.errors()]
            raise RequestError("config:\n" + "\n".join(lines)) from None
        if checked.damp and not isinstance(checked.scale, float):
            raise RequestError(
                f"config: damp = {checked.damp:g} needs a number for scale, since the damping is λ = damp · scale "
                "(that package's scale was 25). Or leave damp out: λ is 0.1 times the mean eigenvalue then"
            )
        if checked.test_start_index and checked.test_sample_num is None:
            raise RequestError(f"config: test_start_index = {checked.test_start_index} needs test_sample_num, too")
        return checked

    def settings(self, batch_size: int | None, *, store: bool) -> Settings:
        """Say the same in this package's settings."""
        scale = self.scale if isinstance(self.scale, float) else 0.0  # damp is None or 0 then: another was refused
        scaled = None if self.damp is None else self.damp * scale
        solver = {
            "recursion_depth": self.recursion_depth,
            "repeats": self.r,
            "damping": {"relative": 0.1} if scaled is None else scaled,
            "scale": self.scale,
            "seed": self.seed,
            "batch_size": batch_size,
        }
        return Settings(
            grad_z={"store": store, "encoding": "float32"},
            s_test={"solver": "lissa", **{name: value for name, value in solver.items() if value is not None}},
            runtime={"device": _device(self.gpu), "log_file": _log_file(self.log_filename)},
        )


def init_logging(filename: str | Path | None = None) -> None:
    """Log to the standard output and, where one is given, to a file."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if filename:
        handlers.append(logging.FileHandler(filename, encoding="utf-8"))
    logging.basicConfig(handlers=handlers, level=logging.INFO, format="%(asctime)s: %(message)s")


def get_default_config() -> dict[str, Any]:
    """Return a config: one test sample of each class, all else found from model and data.

    ``recursion_depth`` is 5000 at most, as that package's documentation has it (its code had 1, far from any answer).
    "auto" goes on until estimates have settled. ``gpu`` is 0 where there is CUDA.
    """
    return {
        **dict.fromkeys(("save_pth", "log_filename", "dataset", "num_classes", "r_averaging", "damp", "scale")),
        "outdir": "outdir",
        "seed": 42,
        "gpu": 0 if torch.cuda.is_available() else -1,
        "calc_method": "img_wise",
        "test_sample_num": 1,
        "test_start_index": False,
        "recursion_depth": 5000,
    }


def calc_img_wise(
    config: Mapping[str, Any], model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
) -> Results:
    """Compute influences and keep no training gradients; solutions and scores are kept and found again.

    Args:
        config: see :class:`Config`.
        model: the trained model, in any mode and on any device; it stays as it is.
        train_loader: its ``dataset`` is the training set.
        test_loader: its ``dataset`` is what test samples are chosen from.

    Returns:
        ``influences, harmful, helpful``: for each test sample, by its position in the test set as a string, a dict of
        ``label``, ``num_in_dataset`` (that position), ``time_calc_influence_s`` (0 where all was cached),
        ``influence`` (N,), and ``harmful`` and ``helpful``, at most 500 ids each; then all training ids, most harmful
        first and most helpful first, by their average over the test samples. All of it is in ``outdir``, too.

    Raises:
        RequestError: something in the config, the model or the data is wrong.
        CacheMismatch: the cache is of other data.
    """
    return _calculate(config, model, train_loader, test_loader, store=False)


def calc_all_grad_then_test(
    config: Mapping[str, Any], model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
) -> Results:
    """Compute the same as :func:`calc_img_wise`, and keep the training gradients for other test samples or settings.

    Interrupted, the same call goes on where it was.

    Raises:
        RequestError: something in the config, the model or the data is wrong.
        CacheMismatch: the cache is of another model or other data.
    """
    return _calculate(config, model, train_loader, test_loader, store=True)


def _calculate(given: Mapping[str, Any], model: nn.Module, train: Any, test: Any, *, store: bool) -> Results:
    config = Config.read(given)
    for name, loader in (("train_loader", train), ("test_loader", test)):
        check_dataset(getattr(loader, "dataset", None), f"{name}.dataset")
    name, chosen = _selection(config, test.dataset)
    experiment = Experiment(model, Classification(), train.dataset, {name: chosen}, collate=_collate(train, test))
    settings = config.settings(getattr(train, "batch_size", None), store=store)
    try:
        found = Pipeline(experiment, config.save_pth or config.outdir / "cache", settings).run(name)[name]
    except CacheMismatch as error:
        raise CacheMismatch(f"{error}\nIn this module: another save_pth, or outdir, is another cache") from error
    influences, harmful, helpful = _results(found)
    evidence = {"lambda": found.damping, "residual": found.residual, "harmful": harmful, "helpful": helpful}
    start, num = config.test_start_index, config.test_sample_num or "all"
    meta = {**given, "test_sample_index_list": found.test_ids, **evidence}
    _write(config.outdir / f"influences_results_meta_{start}-{num}.json", meta)
    _write(config.outdir / f"influence_results_{start}_{num}.json", influences)
    return influences, harmful, helpful


def _selection(config: Config, tests: Any) -> tuple[str, PerClass]:
    """Return the chosen test samples with a name for them.

    Raises:
        RequestError: a class is missing or has too few samples.
    """
    if config.test_sample_num is None:
        return "tests", PerClass(tests, list(range(len(tests))))
    num = config.test_sample_num
    ids = list(per_class(tests, num, config.test_start_index).indices)
    bands = [ids[n : n + num] for n in range(0, len(ids), num)]
    by_class = {int(targets_of(fetch(tests, "test_loader.dataset", band[0]))): band for band in bands}
    classes = sorted(by_class) if config.num_classes is None else range(config.num_classes)
    missing = ", ".join(str(label) for label in classes if label not in by_class)
    if missing:
        raise RequestError(
            f"config: num_classes = {config.num_classes}, and the test set has no sample of class {missing}; "
            f"its classes are {', '.join(map(str, sorted(by_class)))}"
        )
    name = f"tests-{config.test_start_index}-{num}-{len(classes)}"
    return name, PerClass(tests, [i for label in classes for i in by_class[label]])


def _collate(*loaders: Any) -> Callable[[list[Any]], Any] | None:
    """Return what makes batches, None for PyTorch's own.

    Raises:
        RequestError: the loaders have different ones.
    """
    given = [getattr(loader, "collate_fn", None) for loader in loaders]
    train, test = (None if function in (default_collate, default_convert) else function for function in given)
    if train != test:
        raise RequestError("train_loader and test_loader have different collate_fn: give both the same function")
    return train


def _device(gpu: int | None) -> str:
    if gpu is None:
        return "auto"
    if gpu >= 0 and not torch.cuda.is_available():
        log.warning("config: gpu = %d, and there is no CUDA here: using the CPU", gpu)
    return f"cuda:{gpu}" if gpu >= 0 and torch.cuda.is_available() else "cpu"


def _log_file(name: Path | None) -> Path | None:
    """Return the file to log to, None where :func:`init_logging` does so already."""
    handled = {getattr(handler, "baseFilename", None) for handler in logging.getLogger().handlers}
    return None if name is None or os.path.abspath(name) in handled else name


def _results(found: Influences) -> Results:
    """Bring results into that package's form and sign."""
    labels, _ = found.labels()
    total = len(found.train_ids)
    harmful, helpful = (ranked(min(RANKS, total))[0].tolist() for ranked in (found.harmful, found.helpful))
    influences = {}
    for row, test in enumerate(found.test_ids.tolist()):
        label = math.nan if labels is None else float(labels[row])
        influences[str(test)] = {
            "label": None if math.isnan(label) else int(label),
            "num_in_dataset": test,
            "time_calc_influence_s": found.seconds / len(found),
            "influence": (-found.scores[row]).tolist(),
            "harmful": harmful[row],
            "helpful": helpful[row],
        }
    return influences, found.harmful_on_average(total)[0].tolist(), found.helpful_on_average(total)[0].tolist()


def _write(path: Path, content: Any) -> None:
    """Write a file of this name, with the time added where there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path = path.with_stem(f"{path.stem}_{datetime.now():%Y-%m-%d-%H-%M-%S-%f}")
    with open(path, "x", encoding="utf-8") as file:
        json.dump(content, file, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    log.info("written: %s", path)
