"""Training without what influence names: test accuracy over the share of the training set that is left out, or kept.

One label in ten is wrong. Samples are ranked by their mean influence on a hundred digits that are known to be right;
logistic regression is trained again without the most harmful, without the most helpful, or with the most helpful alone,
against chance. Accuracy is that of other digits.

python scripts/figures/removal.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mislabelled import EXACT, FLIPPED, HELD_OUT, TASK, trusted_and_tests
from shared import (
    COLOURS,
    Objective,
    Options,
    Retraining,
    at_optimum,
    command,
    digits,
    figure,
    in_double,
    logistic,
    make,
    save,
    settings,
)
from torch.utils.data import TensorDataset

import influence_pipeline as ip

LEFT_OUT = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
KEPT = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Shares of the training set."""
SEEDS = 10
WITHOUT = ("the most harmful", "the most helpful", "random samples")
WITH = ("the most helpful", "random samples")


@dataclass(frozen=True)
class Curves:
    """Test accuracy of models that were trained again.

    Attributes:
        without: some shares, in some orders, (seeds, orders, shares).
        alone: with some shares alone, likewise.
    """

    without: np.ndarray
    alone: np.ndarray


def curves(given: Options) -> Curves:
    """Train again for each seed."""
    found = [of_seed(seed, given) for seed in range(1 if given.quick else SEEDS)]
    return Curves(*(np.stack(each) for each in zip(*found, strict=True)))


@dataclass(frozen=True)
class Ranked:
    """A training set with wrong labels, and its influence on digits that are known to be right.

    Attributes:
        train: the training set.
        wrong: ids of those with wrong labels.
        influences: of the training set on the trusted digits.
        at_random: all ids in random order.
        pipeline: of the model that was trained on all of them.
    """

    train: TensorDataset
    wrong: np.ndarray
    influences: ip.Influences
    at_random: np.ndarray
    pipeline: ip.Pipeline

    def without(self, left_out: Sequence[np.ndarray]) -> np.ndarray:
        """Return test accuracy of models that were trained without some samples each, (R,)."""
        return self.pipeline.retrained("tests", [ids.tolist() for ids in left_out]).correct[0].mean(axis=1)

    def with_only(self, kept: Sequence[Sequence[int]]) -> np.ndarray:
        """Return test accuracy of models that were trained on some samples alone, (R,)."""
        everything = np.arange(len(self.train))
        return self.without([np.setdiff1d(everything, ids) for ids in kept])


def ranked(seed: int, given: Options) -> Ranked:
    """Make one label in ten wrong, train to the optimum, and compute influence."""
    loaded = digits(flipped=FLIPPED, held_out=1500 if given.quick else HELD_OUT, seed=seed)
    train, folder = in_double(loaded.train), given.folder / f"seed-{seed}"
    trusted, tests = trusted_and_tests(in_double(loaded.test))
    objective = Objective(logistic(), TASK, train)
    whitening = at_optimum(folder / "weights.pt", objective)
    sets = {"trusted": trusted, "tests": tests}
    experiment = ip.Experiment(objective.model, TASK, train, sets, retrain=Retraining(objective, whitening))
    pipeline = ip.Pipeline(experiment, folder / "cache", settings(**EXACT))
    at_random = np.random.default_rng(seed).permutation(len(train))
    return Ranked(train, loaded.flipped.numpy(), pipeline.run("trusted")["trusted"], at_random, pipeline)


def of_seed(seed: int, given: Options) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies without (orders, shares), and with (orders, shares), some of one training set."""
    found = ranked(seed, given)
    count = len(found.train)
    harmful, _ = found.influences.harmful_on_average(count)
    orders = [harmful, harmful[::-1], found.at_random]
    without = [order[: round(share * count)] for order in orders for share in LEFT_OUT]
    alone = [order[round(share * count) :] for order in orders[1:] for share in KEPT]
    correct = found.without([*without, *alone])
    return correct[: len(without)].reshape(len(WITHOUT), -1), correct[len(without) :].reshape(len(WITH), -1)


def difference(one: np.ndarray, other: np.ndarray) -> str:
    """Return the mean of differences in accuracy, (seeds,) each, and its standard error where there are several."""
    found = one - other
    error = f" ± {found.std(ddof=1) / len(found) ** 0.5:.1%}" if len(found) > 1 else ""
    return f"{found.mean():+.1%}{error}"


def table(found: Curves) -> str:
    """Return means over the seeds, in Markdown."""
    lines = []
    for title, orders, shares, values in (
        ("trained without", WITHOUT, LEFT_OUT, found.without),
        ("trained with no more than", WITH, KEPT, found.alone),
    ):
        lines += [f"| {title} | {' | '.join(f'{share:.0%}' for share in shares)} |", "|---" * (len(shares) + 1) + "|"]
        for order, accuracy in zip(orders, values.mean(axis=0), strict=True):
            lines.append(f"| {order} | {' | '.join(f'{x:.1%}' for x in accuracy)} |")
        lines.append("")
    return "\n".join([*lines, f"Test accuracy, mean of {len(found.without)} seeds."])


def draw(found: Curves, path: Path) -> None:
    """Draw accuracy over what is left out, and over what is kept."""
    drawn, axes = figure(2, width=4.2)
    colours = dict(zip(WITHOUT, (COLOURS[0], COLOURS[1], COLOURS[3]), strict=True))
    for axis, orders, shares, values, what in (
        (axes[0], WITHOUT, LEFT_OUT, found.without, "left out"),
        (axes[1], WITH, KEPT, found.alone, "kept"),
    ):
        for row, order in enumerate(orders):
            mean, error = values[:, row].mean(axis=0), values[:, row].std(axis=0) / len(values) ** 0.5
            axis.plot(shares, mean, marker="o", markersize=3, color=colours[order], label=order)
            axis.fill_between(shares, mean - error, mean + error, color=colours[order], alpha=0.15, linewidth=0)
        axis.set_xlabel(f"share of the training set {what}", fontsize=9)
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.legend(fontsize=8, frameon=False, loc="lower left" if what == "left out" else "lower right")
    axes[0].set_ylabel("test accuracy", fontsize=9)
    save(drawn, path)


def main(arguments: Sequence[str] | None = None) -> None:
    make(__file__, __doc__, curves, table, draw, arguments)


if __name__ == "__main__":
    command(main)
