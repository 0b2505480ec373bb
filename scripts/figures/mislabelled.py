"""Koh & Liang (2017), section 5.4: finding wrong labels by influence, and what it brings to mend them.

One label in ten is made wrong. Someone checks the training samples in some order and mends the labels that are wrong
among them; the model is trained again. The orders: self-influence, the largest training loss, the harm done to a
hundred digits that are known to be right, and chance. There it was e-mails, spam or not, and logistic regression; it
was done forty times over, as here.

python scripts/figures/mislabelled.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from shared import COLOURS, Objective, Options, command, digits, figure, in_double, logistic, make, save, settings
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-3)
EXACT = {"solver": "exact", "curvature": "hessian", "damping": 0.0}
FLIPPED = 0.1
HELD_OUT, TRUSTED = 497, 100
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Of the training set that are checked, as in the paper."""
SEEDS = 40
ORDERS = ("self-influence", "training loss", "harm to trusted digits", "random")


@dataclass(frozen=True)
class Checked:
    """What checking brings in each of the orders, for each of some seeds.

    Attributes:
        auc: the chance that a wrong label stands before a right one, (seeds, orders).
        mended: part of the wrong labels that were found, (seeds, orders, shares).
        accuracy: on the tests, (seeds, orders, shares).
        clean: accuracy of a model trained on right labels alone, (seeds,).
    """

    auc: np.ndarray
    mended: np.ndarray
    accuracy: np.ndarray
    clean: np.ndarray


def trusted_and_tests(data: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Cut digits with right labels into those that are known to be so and those that accuracy is measured on."""
    trusted, tests = (TensorDataset(*data[part]) for part in (slice(TRUSTED), slice(TRUSTED, None)))
    return trusted, tests


def checked(given: Options) -> Checked:
    """Check the samples of each seed; what was found once is kept."""
    found = []
    for seed in range(1 if given.quick else SEEDS):
        path = given.folder / f"seed-{seed}.npz"
        if not path.is_file():
            unfinished = path.with_suffix(".partial.npz")
            np.savez(unfinished, **checked_once(seed, held_out=1500 if given.quick else HELD_OUT))
            unfinished.replace(path)
        found.append(np.load(path, allow_pickle=False))
    return Checked(*(np.stack([each[name] for each in found]) for name in ("auc", "mended", "accuracy", "clean")))


def checked_once(seed: int, held_out: int) -> dict[str, np.ndarray]:
    """Make one label in ten wrong, rank the samples, mend what is found, and train again."""
    loaded = digits(flipped=FLIPPED, held_out=held_out, seed=seed)
    train = in_double(loaded.train)
    trusted, tests = trusted_and_tests(in_double(loaded.test))
    objective = Objective(logistic(), TASK, train)
    whitening = objective.to_optimum()
    count = len(train)

    def accuracy(ids: np.ndarray) -> float:
        """Mend the labels of these ids, train again, and return the accuracy on the tests."""
        images, labels = train.tensors
        labels = labels.clone()
        labels[ids] = loaded.true_labels[ids]
        other = Objective(objective.model, TASK, TensorDataset(images, labels))
        other.descend(whitening)
        with torch.no_grad():
            return float((other.model(tests.tensors[0]).argmax(1) == tests.tensors[1]).double().mean())

    experiment = ip.Experiment(objective.model, TASK, train, {"trusted": trusted})
    with torch.no_grad():
        losses = TASK.losses(objective.model(train.tensors[0]), train.tensors).numpy()
    with tempfile.TemporaryDirectory() as cache:
        pipeline = ip.Pipeline(experiment, cache, settings(**EXACT))
        harm = -pipeline.run()["trusted"].mean_scores()
        itself = pipeline.self_influence().values
    suspicion = (itself, losses, harm, np.random.default_rng(seed).random(count))
    wrong = np.isin(np.arange(count), loaded.flipped)
    orders = [np.argsort(-each, kind="stable") for each in suspicion]
    sizes = [round(share * count) for share in SHARES]
    return {
        "auc": np.array([roc_auc_score(wrong, each) for each in suspicion]),
        "mended": np.array([[wrong[order[:size]].sum() / wrong.sum() for size in sizes] for order in orders]),
        "accuracy": np.array([[accuracy(order[:size]) for size in sizes] for order in orders]),
        "clean": np.array(accuracy(np.arange(count))),
    }


def table(found: Checked) -> str:
    """Return means over the seeds, in Markdown."""
    shown = [SHARES.index(share) for share in (0.1, 0.2, 0.3)]
    percent = [f"{SHARES[i]:.0%}" for i in shown]
    lines = [
        f"| checked in the order of | AUC | wrong labels in the first {' / '.join(percent)} | test accuracy then |",
        "|---|---|---|---|",
    ]
    for row, order in enumerate(ORDERS):
        mended, accuracy = (each[:, row].mean(axis=0)[shown] for each in (found.mended, found.accuracy))
        auc = f"{found.auc[:, row].mean():.3f} ± {found.auc[:, row].std():.3f}"
        cells = (" / ".join(f"{x:.0%}" for x in mended), " / ".join(f"{x:.1%}" for x in accuracy))
        lines.append(f"| {order} | {auc} | {' | '.join(cells)} |")
    ends = found.accuracy[:, 0, 0].mean(), found.clean.mean()
    lines.append(
        f"\nTest accuracy with all wrong labels {ends[0]:.1%}, with none {ends[1]:.1%}; {len(found.auc)} seeds."
    )
    return "\n".join(lines)


def draw(found: Checked, path: Path) -> None:
    """Draw test accuracy, and wrong labels found, over the share that is checked."""
    drawn, axes = figure(2, width=4.2)
    for axis, curves in zip(axes, (found.accuracy, found.mended), strict=True):
        for row, order in enumerate(ORDERS):
            mean, error = curves[:, row].mean(axis=0), curves[:, row].std(axis=0) / len(curves) ** 0.5
            axis.plot(SHARES, mean, marker="o", markersize=3, color=COLOURS[row], label=order)
            axis.fill_between(SHARES, mean - error, mean + error, color=COLOURS[row], alpha=0.15, linewidth=0)
        axis.set_xlabel("share of the training set checked", fontsize=8)
        axis.xaxis.set_major_formatter("{x:.0%}")
    axes[0].locator_params(axis="y", nbins=5)
    axes[0].yaxis.set_major_formatter("{x:.1%}")
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    axes[0].axhline(found.clean.mean(), color="black", linewidth=0.8, linestyle="--", label="right labels alone")
    axes[0].set_title("test accuracy", fontsize=9)
    axes[1].set_title("wrong labels found", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    save(drawn, path)


def main(arguments: Sequence[str] | None = None) -> None:
    make(__file__, __doc__, checked, table, draw, arguments)


if __name__ == "__main__":
    command(main)
