"""Koh & Liang (2017), figure 2: what leaving a training sample out does to a test's loss, predicted and found.

As there, for wrongly classified tests and the training samples with the largest predicted influence on each: logistic
regression solved exactly and by the stochastic recursion, and a small CNN with tanh units, whose loss is not convex.
Without a sample, training goes on from the optimum over all; otherwise the start would hide what one sample does.

python scripts/figures/left_out.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import (
    COLOURS,
    Digits,
    Objective,
    Options,
    Retraining,
    at_optimum,
    changes,
    command,
    correlation,
    digits,
    figure,
    in_double,
    logistic,
    make,
    save,
    settings,
)
from torch import nn
from torch.utils.data import Subset, TensorDataset
from train import by_adam

import influence_pipeline as ip

Begin = Callable[[nn.Module], None]
LOGISTIC = NETWORK = ip.Classification(l2=1e-2)
"""The network's penalty is ten times the paper's: there are fewer samples by five, and each weighs more beside it."""
HESSIAN = {"curvature": "hessian", "damping": 0.0}
NOT_CONVEX = {"CNN": {"solver": "exact", **HESSIAN}}
"""Solvers, by the titles of their panels."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        held_out: digits that are not trained on; the tests are the first wrongly classified of these.
        tests: how many.
        logistic: samples left out of logistic regression for each test.
        cnn: samples left out of the CNN for each test.
        channels: of the CNN.
        epochs: of Adam before the CNN goes to its optimum.
        repeats: of the stochastic recursion.
        tolerance: of its estimates.
    """

    held_out: int = 797
    tests: int = 10
    logistic: int = 500
    cnn: int = 100
    channels: int = 6
    epochs: int = 60
    repeats: int = 10
    tolerance: float = 0.05


QUICK = Sizes(held_out=1597, tests=3, logistic=20, cnn=10, channels=2, epochs=20, repeats=1, tolerance=0.3)


@dataclass(frozen=True)
class Panel:
    """Predicted and found changes of each test's loss, (T, K), without each of the K samples that are its own."""

    title: str
    predicted: np.ndarray
    found: np.ndarray

    @property
    def correlations(self) -> np.ndarray:
        """Pearson's r for each test, (T,)."""
        return np.array([correlation(*pair) for pair in zip(self.predicted, self.found, strict=True)])

    @property
    def slope(self) -> float:
        """Of found against predicted changes, by least squares through the origin."""
        return float((self.predicted * self.found).sum() / np.square(self.predicted).sum())


def cnn(channels: int) -> nn.Module:
    """Make a network of convolutions and tanh, untrained: of six channels 970 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )


def wrongly_classified(model: nn.Module, data: TensorDataset, count: int) -> Subset[Any]:
    """Return the first tests that a model gets wrong, and after these the ones with the largest loss.

    Raises:
        RequestError: there are fewer tests.
    """
    images, labels = data.tensors
    with torch.no_grad():
        outputs = model(images)
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    wrong = (outputs.argmax(1) != labels).nonzero().flatten().tolist()
    others = [test for test in losses.argsort(descending=True).tolist() if test not in set(wrong)]
    return Subset(data, (wrong + others)[:count])


class Case:
    """A model at its optimum, with its tests; what solvers predict for these, and what training again finds."""

    def __init__(
        self, folder: Path, model: nn.Module, task: ip.Task, data: Digits, tests: int, begin: Begin | None = None
    ) -> None:
        """Train the model, or load it.

        Args:
            folder: weights and caches.
            model: untrained.
            task: what it is trained on.
            data: what it is trained and tested on.
            tests: how many of the latter are asked about.
            begin: trains the model before it goes to an optimum.
        """
        train, held_out = in_double(data.train), in_double(data.test)
        objective = Objective(model, task, train)
        whitening = at_optimum(folder / "weights.pt", objective, begin)
        chosen = {"wrong": wrongly_classified(objective.model, held_out, tests)}
        self._folder = folder
        self._experiment = ip.Experiment(objective.model, task, train, chosen, retrain=Retraining(objective, whitening))

    def panels(self, solvers: dict[str, dict[str, Any]], count: int) -> list[Panel]:
        """Return what each solver predicts for the samples with the largest influence on each test.

        Args:
            solvers: their settings, by the panel's title.
            count: of samples.
        """
        pipelines = [self._pipeline(solver) for solver in solvers.values()]
        predicted = [pipeline.run()["wrong"].scores[:].astype(np.float64) for pipeline in pipelines]
        largest = [np.argsort(-np.abs(each), axis=1, kind="stable")[:, :count] for each in predicted]
        left_out = np.unique(largest)
        found = np.full_like(predicted[0], np.nan)
        found[:, left_out] = changes(pipelines[0], "wrong", left_out.tolist())
        return [
            Panel(title, *(np.take_along_axis(each, ids, 1) for each in (scores, found)))
            for title, scores, ids in zip(solvers, predicted, largest, strict=True)
        ]

    def _pipeline(self, solver: dict[str, Any]) -> ip.Pipeline:
        return ip.Pipeline(self._experiment, self._folder / "cache", settings(**solver))


def panels(given: Options) -> list[Panel]:
    """Compute what is drawn."""
    sizes = QUICK if given.quick else Sizes()
    data = digits(held_out=sizes.held_out)

    def begin(model: nn.Module) -> None:
        torch.manual_seed(0)
        by_adam(model, NETWORK, in_double(data.train), epochs=sizes.epochs, step=5e-3)

    torch.manual_seed(0)
    convex = Case(given.folder / "logistic", logistic(), LOGISTIC, data, sizes.tests)
    network = Case(given.folder / "cnn", cnn(sizes.channels), NETWORK, data, sizes.tests, begin)
    solvers = {
        "logistic regression, exact": {"solver": "exact", **HESSIAN},
        "logistic regression, stochastic": {
            "solver": "lissa",
            "batch_size": 64,
            "repeats": sizes.repeats,
            "tolerance": sizes.tolerance,
            **HESSIAN,
        },
    }
    return [*convex.panels(solvers, sizes.logistic), *network.panels(NOT_CONVEX, sizes.cnn)]


PUBLISHED = ("on the diagonal", "on the diagonal", "r = 0.86")
"""What the paper shows, in the order of the panels."""


def table(found: Sequence[Panel]) -> str:
    """Return the figures beside the paper's, in Markdown."""
    lines = [
        "| left out, one at a time | samples | tests | Pearson r: mean | least | most | slope | the paper's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for panel, published in zip(found, PUBLISHED, strict=True):
        tests, count = panel.found.shape
        r = panel.correlations
        cells = (panel.title, count, tests, *(f"{x:.3f}" for x in (r.mean(), r.min(), r.max(), panel.slope)), published)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(found: Sequence[Panel], path: Path) -> None:
    """Draw found against predicted changes: one test as the paper does, the others behind it."""
    drawn, axes = figure(len(found))
    for panel, axis in zip(found, axes, strict=True):
        axis.scatter(panel.predicted[1:], panel.found[1:], s=5, color=COLOURS[3], alpha=0.25, linewidths=0)
        axis.scatter(panel.predicted[0], panel.found[0], s=9, color=COLOURS[0], alpha=0.8, linewidths=0)
        ends = [min(panel.predicted.min(), panel.found.min()), max(panel.predicted.max(), panel.found.max())]
        axis.plot(ends, ends, color=COLOURS[1], linewidth=0.8, zorder=0)
        axis.set_title(f"{panel.title}\nr = {panel.correlations.mean():.3f} on average", fontsize=9)
        axis.set_xlabel("predicted change of the test's loss", fontsize=8)
    axes[0].set_ylabel("change found by training without the sample", fontsize=8)
    save(drawn, path)


def main(arguments: Sequence[str] | None = None) -> None:
    make(__file__, __doc__, panels, table, draw, arguments)


if __name__ == "__main__":
    command(main)
