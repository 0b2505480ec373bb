"""Truth: models trained anew without some samples, kept in the cache, and what they measure.

Training again is what costs: each retrained model is kept, by itself, for every solver and test set.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

from influence_pipeline.cache import FORMAT, group_name
from influence_pipeline.cache.record import digest
from influence_pipeline.errors import RequestError
from influence_pipeline.evaluate.left_out import LeftOut
from influence_pipeline.experiment import Experiment
from influence_pipeline.place import Place
from influence_pipeline.task import plain
from influence_pipeline.work import Work, pending
from stages.retraining import Measuring, Retraining, State
from stages.stage import Array, Block

if TYPE_CHECKING:
    from influence_pipeline.plan import Timing
    from influence_pipeline.runner import Outcome
    from influence_pipeline.works import Works


class Run(Protocol):
    """Runs a stage, or times some blocks of it."""

    def __call__(self, place: Place, *, measure: bool = False) -> Outcome:
        """Compute what is missing; with ``measure``, a block or two."""


@dataclass(frozen=True)
class Measured:
    """What retrained models give.

    Attributes:
        values: measurements (S, R, T) float64 of S seeds, R retrainings and T test samples.
        correct: 1 where the prediction is right, 0 where not, NaN where there is none, of the same shape.
    """

    values: Array
    correct: Array


class Truth:
    """The retrained models of one experiment."""

    def __init__(self, works: Works, run: Run) -> None:
        """Compute nothing yet.

        Args:
            works: the stages of the experiment.
            run: computes them.
        """
        self.works, self._run = works, run

    def measured(self, tests: str, left_out: LeftOut, seeds: int) -> Measured:
        """Return what models measure that were trained without some samples; those that are missing are trained."""
        found = []
        for seed in range(seeds):
            self._run(retrained_place(self.works, left_out, seed))
            place = measured_place(self.works, tests, left_out, seed)
            self._run(place)
            group = self.works.find(place)
            assert group is not None
            found.append([group.array(name)[: left_out.count, :] for name in ("measurement", "correct")])
        values, correct = zip(*found, strict=True)
        return Measured(np.stack(values), np.stack(correct))

    def missing(self, left_out: Sequence[LeftOut], seeds: int) -> list[Place]:
        """Return where retrained models are missing."""
        places = [retrained_place(self.works, one, seed) for one in left_out for seed in range(seeds)]
        return [place for place in places if self._left(place)]

    def _left(self, place: Place) -> int:
        return len(pending(self.works.work(place), self.works.find(place)))

    def seconds(self, places: Sequence[Place], workers: int) -> tuple[int, float]:
        """Train one or two models, and return how many are missing still, and the seconds that these take by that.

        Args:
            places: of models, of which some are missing.
            workers: processes that share them.
        """
        timing: Timing | None = self._run(places[0], measure=True).timing
        left = sum(map(self._left, places))
        return left, 0.0 if timing is None else timing.left(left, max(left, 1), workers)


@functools.cache
def _identity_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what tells a function that trains from another: its name, its own code, and what was given to it before.

    What it calls is not looked at, and its file only once: that may be edited while it runs.
    """
    if isinstance(function, functools.partial):
        given = {"args": plain(function.args), "keywords": plain(function.keywords)}
        return {**_identity_of(function.func), **given}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        code = {"code": digest([ast.dump(tree).encode()]).hex()}
    except (OSError, TypeError, SyntaxError):  # made in a prompt, or an object, or a part of a longer line
        code = {}
    return {"function": getattr(function, "__qualname__", type(function).__qualname__), **code}


def retrained_place(works: Works, left_out: LeftOut, seed: int) -> Place:
    """Return where models are that were trained without some samples.

    Raises:
        RequestError: the experiment cannot train.
    """
    context = works.context
    experiment = context.experiment
    if experiment.retrain is None:
        raise RequestError(
            "evaluation trains the model again, and the experiment does not say how: "
            "Experiment(…, retrain=function) with function(dataset, seed) -> model"
        )
    identity = {
        "format": FORMAT,
        "retrain": _identity_of(experiment.retrain),
        "state": {name: list(value.shape) for name, value in State(experiment.model).entries.items()},
        "task": experiment.task.identity(),
        "l2": plain(experiment.task.l2),
        "train": experiment.train_name,
        "left_out": left_out.identity(),
        "seed": seed,
    }
    place = Place("retrained", group_name(None, identity), identity)
    return replace(place, left_out=_at_least(left_out, works, place))


def measured_place(works: Works, tests: str, left_out: LeftOut, seed: int) -> Place:
    """Return where that is which such models measure."""
    retrained = retrained_place(works, left_out, seed)
    measurement = works.context.experiment.task.measurement_identity()
    identity = {"retrained": retrained.name, "measurement": measurement, "tests": tests}
    name = group_name(tests, identity)
    return Place("measured", name, identity, tests, {"retrained": retrained.name}, retrained.left_out, retrained)


def _at_least(left_out: LeftOut, works: Works, place: Place) -> LeftOut:
    """Return as many retrainings as are kept already, where fewer are asked for."""
    group = works.find(place)
    return left_out if group is None else left_out.at_least(group.layout.grid.axes[0].length)


def retrained_work(works: Works, place: Place) -> Work:
    """Return the work of training models without some samples."""
    context, left_out = works.context, place.left_out
    assert left_out is not None
    experiment: Experiment = context.experiment

    def retrain(positions: Sequence[int], seed: int) -> nn.Module:
        return experiment.retrained(positions, seed)

    stage = Retraining(retrain, left_out.__getitem__, left_out.count, place.identity["seed"], State(experiment.model))
    return Work(
        stage,
        f"retraining, {left_out.identity()['kind']}, seed {stage.seed}",
        unit="retrainings",
        inputs=lambda block: digest([context.train.fingerprint(len(context.train))]),
        passes="a training for each",
    )


def measured_work(works: Works, place: Place) -> Work:
    """Return the work of measuring such models.

    Raises:
        RequestError: they are not there.
    """
    context, left_out, tests = works.context, place.left_out, str(place.tests)
    assert left_out is not None
    assert place.models is not None
    group = works.find(place.models)
    data, model = context.test(tests), context.experiment.model
    if group is None:
        raise RequestError(f"the retrained models {place.models.name} are gone: run again")
    stage = Measuring(*(group.array("weights"), model, context.experiment.task, data, context.device, left_out.count))

    def inputs(block: Block) -> bytes:
        record = group.record(block)
        return digest([b"missing" if record is None else record.content, data.fingerprint(len(data))])

    return Work(stage, f"measuring {tests}", unit="retrainings", inputs=inputs, passes="the test set for each")
