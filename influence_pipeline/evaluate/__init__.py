"""Evaluation: is the ranking to be believed? By training again without samples, which is what scores predict.

Shapes: ``R`` retrainings, ``T`` test samples, ``N`` training samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_pipeline import engines
from influence_pipeline.errors import RequestError
from influence_pipeline.evaluate.left_out import NOTHING, LeftOut, RandomSamples, RandomSubsets, listed
from influence_pipeline.evaluate.metrics import (
    CHECKED,
    DatamodelingScore,
    Detection,
    LeaveOneOut,
    datamodeling_score,
    detection,
    leave_one_out,
)
from influence_pipeline.evaluate.truth import Measured, Truth
from influence_pipeline.export import written
from influence_pipeline.plan import show_seconds

if TYPE_CHECKING:
    from influence_pipeline.influences import Influences
    from influence_pipeline.settings import EvaluateSettings
    from stages.stage import Array

__all__ = [
    "DatamodelingScore",
    "Detection",
    "Evaluation",
    "LeaveOneOut",
    "Measured",
    "datamodeling_score",
    "detection",
    "evaluate",
    "leave_one_out",
    "predicted",
]

ENTRIES = 2**24
"""Of scores that are read at once."""


@dataclass(frozen=True)
class Curve:
    """What is measured after training without a part of the training set, or with no more than that.

    Attributes:
        trained: on which samples.
        shares: of the training set that they are, or that is missing.
        measurement: mean over tests and seeds, one for each share.
        accuracy: likewise; NaN where there are no predictions.
    """

    trained: str
    shares: tuple[float, ...]
    measurement: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """What was found about the scores of one test set.

    Attributes:
        tests: its name.
        about: what was evaluated, in a line.
        subsets: retrainings for the linear datamodeling score, seeds of each.
        lds: that score, None where it was not asked for.
        leave_one_out: None where it was not asked for.
        mislabelled: how well wrong labels are found, by what ranks the samples; empty where none are known.
        curves: what is measured after training without, or with no more than, the first samples of some rankings.
    """

    tests: str
    about: str
    subsets: tuple[int, int]
    lds: DatamodelingScore | None = None
    leave_one_out: LeaveOneOut | None = None
    mislabelled: Mapping[str, Detection] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()

    def __str__(self) -> str:
        """Show the figures, a few lines."""
        lines = [f"{self.tests}: {self.about}"]
        if self.lds is not None:
            subsets, seeds = self.subsets
            lines.append(
                f"  LDS {self.lds.mean:.3f} (95 %: {self.lds.low:.3f} to {self.lds.high:.3f}; "
                f"{subsets} subsets, {seeds} seed{'s' * (seeds > 1)} each; least test {self.lds.by_test.min():.3f})"
            )
        if (one := self.leave_one_out) is not None:
            lines.append(
                f"  leave-one-out: Pearson {one.pearson:.4f}, slope {one.slope:.3f} "
                f"({len(one.samples)} samples; mean over tests {one.by_test.mean():.4f})"
            )
        shares = "/".join(f"{share:.0%}".rstrip("%") for share in CHECKED)
        for order, found in self.mislabelled.items():
            parts = " / ".join(f"{part:.0%}" for part in found.found)
            lines.append(f"  wrong labels by {order}: AUC {found.auc:.3f}; in the first {shares} %: {parts}")
        for curve in self.curves:
            values = curve.accuracy if np.isfinite(curve.accuracy).all() else curve.measurement
            what = "accuracy" if values is curve.accuracy else "measurement"
            points = ", ".join(f"{share:.0%}: {value:.4g}" for share, value in zip(curve.shares, values, strict=True))
            lines.append(f"  {what} {curve.trained}: {points}")
        return "\n".join(lines)

    def to_json(self, path: Path | str) -> None:
        """Write all figures, with those of each test sample and each pair.

        Raises:
            RequestError: the path is none of a file in a folder.
            WorkError: the file cannot be written.
        """
        with written(path) as file:
            file.write(json.dumps(_plain(self), indent=1).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return {name: _plain(entry) for name, entry in vars(value).items()} if hasattr(value, "__dict__") else value


def predicted(influences: Influences, left_out: LeftOut, *, weighted: bool) -> Array:
    """Return the predicted change of each measurement by training without some samples, (R, T) float64.

    The sum of the scores of what is left out; where training is on a mean over the M samples that are left, and not
    on a sum of weighted losses over N, the step is N/M as long and begins with all samples' mean gradient:
    (N/M)·(Σ scores + (N − M)·offset).

    Args:
        influences: with stored scores.
        left_out: which samples each retraining does without.
        weighted: whether retraining gives what is left out the weight 0 in a sum over N.
    """
    count, scores = len(influences.train_ids), influences.scores
    is_out = np.zeros((left_out.count, count))
    for number in range(left_out.count):
        is_out[number, list(left_out[number])] = 1
    found = np.zeros((left_out.count, len(influences)))
    step = max(1, ENTRIES // count)
    for start in range(0, len(influences), step):
        rows = slice(start, start + step)
        found[:, rows] = is_out @ np.asarray(scores[rows], np.float64).T
    if weighted:
        return found
    gone = is_out.sum(axis=1, keepdims=True)
    found += gone * influences.offset[None]
    found *= count / (count - gone)
    return found


def evaluate(
    truth: Truth,
    influences: Influences,
    settings: EvaluateSettings,
    told: Callable[[str], None] = lambda line: None,
    self_influence: Array | None = None,
) -> Evaluation:
    """Train again whatever is missing, and compare; see :meth:`Pipeline.evaluate`.

    Args:
        truth: retrained models.
        influences: what is evaluated.
        settings: how.
        self_influence: of the training samples (N,), where wrong labels are to be found by that, too.
        told: hears before training starts how many models are missing, and how long they will take.

    Raises:
        RequestError: scores are not stored, or nothing is asked for that can be evaluated.
    """
    experiment, count = truth.works.context.experiment, len(influences.train_ids)
    wrong = _wrong(influences, experiment.mislabelled)
    subsets = RandomSubsets(settings.subsets, count, settings.share, settings.seed)
    singles = _singles(influences, settings, count)
    curves = _parts(influences, settings)
    wanted: list[LeftOut] = [one for one in (subsets, singles, *curves.values()) if one.count]
    if not wanted and wrong is None:
        raise RequestError("nothing to evaluate: [evaluate] asks for no retraining, and no wrong labels are known")
    if singles.count:
        wanted.append(NOTHING)
    if wanted:
        _tell(truth, wanted, settings.seeds, told)

    def measured(left_out: LeftOut) -> Measured:
        return truth.measured(influences.tests, left_out, settings.seeds)

    lds = one = None
    if subsets.count:
        actual = measured(subsets).values.mean(axis=0)
        lds = datamodeling_score(actual, predicted(influences, subsets, weighted=experiment.weighted))
    if singles.count:
        actual = (measured(singles).values - measured(NOTHING).values).mean(axis=0)
        change = predicted(influences, singles, weighted=experiment.weighted)
        one = leave_one_out(actual, change, [singles[number][0] for number in range(singles.count)])
    return Evaluation(
        influences.tests,
        f"{len(influences)} tests × {count} training samples, {_about(truth, influences)}",
        (settings.subsets, settings.seeds),
        lds,
        one,
        {} if wrong is None else _detections(influences, self_influence, wrong),
        tuple(_curve(trained, settings.shares, measured(left_out)) for trained, left_out in curves.items()),
    )


def _about(truth: Truth, influences: Influences) -> str:
    solver = truth.works.settings.s_test.solver
    several = f", {influences.combination} of {len(influences.weights)} models" if influences.combination else ""
    return (solver if influences.damping is None else f"{solver}, λ = {influences.damping:.4g}") + several


def _singles(influences: Influences, settings: EvaluateSettings, count: int) -> LeftOut:
    """Return which single samples are left out.

    Raises:
        RequestError: there are fewer.
    """
    if settings.leave_one_out > count:
        raise RequestError(f"evaluate.leave_one_out = {settings.leave_one_out}, and there are {count} training samples")
    if settings.by == "random" or not settings.leave_one_out:
        return RandomSamples(settings.leave_one_out, count, settings.seed)
    size = np.zeros(count)
    for row in range(len(influences)):
        size += np.abs(influences.scores[row])
    return listed([[i] for i in np.argsort(-size, kind="stable")[: settings.leave_one_out].tolist()])


def _parts(influences: Influences, settings: EvaluateSettings) -> dict[str, LeftOut]:
    """Return what is left out along each curve, by what its models are trained on."""
    if not settings.shares:
        return {}
    mean = -influences.mean_scores() if influences.higher_is_better else influences.mean_scores()
    helpful, count = np.argsort(-mean, kind="stable"), len(mean)
    at_random = np.random.default_rng(settings.seed).permutation(count)
    sizes = [max(1, min(count - 1, round(share * count))) for share in settings.shares]

    def without(order: Array) -> LeftOut:
        return listed([order[:size].tolist() for size in sizes])

    def with_only(order: Array) -> LeftOut:
        return listed([order[size:].tolist() for size in sizes])

    return {
        "without the most helpful": without(helpful),
        "without the most harmful": without(helpful[::-1]),
        "without random samples": without(at_random),
        "with the most helpful alone": with_only(helpful),
        "with random samples alone": with_only(at_random),
    }


def _curve(trained: str, shares: tuple[float, ...], found: Measured) -> Curve:
    return Curve(
        trained,
        shares,
        tuple(found.values.mean(axis=(0, 2)).tolist()),
        tuple(found.correct.mean(axis=(0, 2), dtype=np.float64).tolist()),
    )


def _wrong(influences: Influences, mislabelled: Array | None) -> Array | None:
    """Return which training samples have wrong labels, (N,), None where nothing is known.

    Raises:
        RequestError: an id is none of a training sample's, or all or none are wrong.
    """
    if mislabelled is None:
        return None
    wrong: Array = np.isin(influences.train_ids, mislabelled)
    unknown = np.setdiff1d(mislabelled, influences.train_ids)
    if len(unknown) or not 0 < wrong.sum() < len(wrong):
        what = f"{unknown[:5].tolist()} are ids of no training sample" if len(unknown) else "not all labels, nor none"
        raise RequestError(f"mislabelled: {what}; there are {len(wrong)} training samples")
    return wrong


def _detections(influences: Influences, self_influence: Array | None, wrong: Array) -> dict[str, Detection]:
    """Return how well wrong labels are found by each ranking that there is."""
    mean = influences.mean_scores()
    orders = {
        "harm on average": mean if influences.higher_is_better else -mean,
        "self-influence": self_influence,
        "training loss": influences.losses(),
    }
    return {name: detection(order, wrong) for name, order in orders.items() if order is not None}


def _tell(truth: Truth, wanted: Sequence[LeftOut], seeds: int, told: Callable[[str], None]) -> None:
    """Time a training where some are missing, and say how long all will take."""
    places = truth.missing(wanted, seeds)
    if not places:
        return
    workers = engines.count(truth.works.settings.runtime)
    left, seconds = truth.seconds(places, workers)
    if left:
        told(
            f"{left} models are to be trained: about {show_seconds(seconds)} with {workers} worker{'s' * (workers > 1)}"
        )
