"""Koh & Liang (2017), figure 1: what the Hessian and the training loss add to plain similarity.

For logistic regression, of two digits here as there, influence is

    score(t, i) = σ(−yₜ θᵀxₜ) · σ(−yᵢ θᵀxᵢ) · yₜ yᵢ · xₜᵀ H⁻¹ xᵢ / N,

and leaving factors out of it says what each is for. The inner product of images alone, with a sign for like labels,
holds every sample with the test's own label for helpful.

python scripts/figures/similarity.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from shared import (
    COLOURS,
    Objective,
    Options,
    Retraining,
    at_optimum,
    changes,
    command,
    correlation,
    digits,
    figure,
    make,
    save,
    settings,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import influence_pipeline as ip

CLASSES = (1, 7)
"""The digits that are told apart: labels +1 and −1."""
EXACT = {"solver": "exact", "curvature": "hessian", "damping": 0.0}
PLAIN = {"solver": "identity"}
HELD_OUT, TOP = 360, 20


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return log(1 + exp(−y θᵀx)) of each sample, (B,)."""
    return functional.softplus(-labels * outputs[:, 0])


TASK = ip.Task.from_loss(loss, name="logistic", l2=1e-2)


@dataclass(frozen=True)
class Components:
    """Influence, and what is left of it without some factors, each (T, N).

    Attributes:
        influence: all of it.
        variants: by what was left out.
        found: the changes of the tests' losses by training without each sample.
        same_label: whether a sample has the test's label.
        images: of tests and training samples, (T, 8, 8) and (N, 8, 8).
    """

    influence: np.ndarray
    variants: dict[str, np.ndarray]
    found: np.ndarray
    same_label: np.ndarray
    images: tuple[np.ndarray, np.ndarray]


def two_digits(data: TensorDataset) -> TensorDataset:
    """Return the samples of both classes, as pixels in float64 and labels of ±1."""
    images, labels = data.tensors
    chosen = (labels == CLASSES[0]) | (labels == CLASSES[1])
    return TensorDataset(
        images[chosen].double().flatten(1), torch.where(labels[chosen] == CLASSES[0], 1.0, -1.0).double()
    )


def components(given: Options) -> Components:
    """Compute what is drawn."""
    loaded = digits(held_out=1600 if given.quick else HELD_OUT)
    train, tests = two_digits(loaded.train), two_digits(loaded.test)
    if given.quick:
        tests = TensorDataset(*(tensor[:4] for tensor in tests.tensors))
    objective = Objective(nn.Linear(64, 1, bias=False), TASK, train)
    whitening = at_optimum(given.folder / "weights.pt", objective)
    experiment = ip.Experiment(objective.model, TASK, train, {"tests": tests}, retrain=Retraining(objective, whitening))

    exact, plain = (ip.Pipeline(experiment, given.folder / "cache", settings(**solver)) for solver in (EXACT, PLAIN))
    influence, without_hessian = (each.run()["tests"].scores[:].astype(np.float64) for each in (exact, plain))
    (images, labels), (test_images, test_labels) = ([t.numpy() for t in data.tensors] for data in (train, tests))
    with torch.no_grad():
        residual = torch.sigmoid(-train.tensors[1] * objective.model(train.tensors[0])[:, 0]).numpy()
    signs = test_labels[:, None] * labels
    return Components(
        influence,
        {
            "inner product of images": signs * (test_images @ images.T),
            "without the training loss": influence / residual,
            "without H⁻¹": without_hessian,
        },
        changes(exact, "tests", range(len(train))),
        signs > 0,
        (test_images.reshape(-1, 8, 8), images.reshape(-1, 8, 8)),
    )


def agreement(variant: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the mean over tests of Pearson's r, and of the part of one's largest that are among the other's."""
    top = [np.argsort(-np.abs(each), axis=1, kind="stable")[:, :TOP] for each in (variant, other)]
    shared = [len(np.intersect1d(*pair)) / TOP for pair in zip(*top, strict=True)]
    return float(np.mean([correlation(*pair) for pair in zip(variant, other, strict=True)])), float(np.mean(shared))


def table(parts: Components) -> str:
    """Return how well each variant tells what training without a sample does, in Markdown."""
    lines = [
        f"| compared with training without each sample | Pearson r | of the {TOP} largest effects | "
        "own label and harmful |",
        "|---|---|---|---|",
    ]
    for name, variant in {"influence": parts.influence, **parts.variants, "found": parts.found}.items():
        r, top = agreement(variant, parts.found)
        harmful = (variant < 0)[parts.same_label].mean()
        lines.append(f"| {name} | {r:.3f} | {top:.0%} | {harmful:.0%} |")
    return "\n".join(lines)


def shown(parts: Components) -> tuple[int, int]:
    """Return the test that is drawn, and a sample of its label that harms it: the most harmful such pair."""
    harmful = np.where(parts.same_label, parts.influence, np.inf)
    test, sample = np.unravel_index(harmful.argmin(), harmful.shape)
    return int(test), int(sample)


def draw(parts: Components, path: Path) -> None:
    """Draw influence on one test against each variant, and the images of a pair of one label of which one harms."""
    drawn, axes = figure(len(parts.variants))
    test, sample = shown(parts)
    own, influence = parts.same_label[test], parts.influence[test]
    for (name, variant), axis in zip(parts.variants.items(), axes, strict=True):
        for chosen, colour, label in ((own, COLOURS[2], "the test's label"), (~own, COLOURS[1], "the other label")):
            axis.scatter(variant[test, chosen], influence[chosen], s=10, color=colour, alpha=0.7, lw=0, label=label)
        axis.axhline(0, color=COLOURS[3], linewidth=0.6, zorder=0)
        axis.axvline(0, color=COLOURS[3], linewidth=0.6, zorder=0)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(f"{name} (r = {correlation(variant[test], influence):.2f})", fontsize=9)
        if axis is not axes[0]:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
    axes[0].set_ylabel("influence: predicted change of the test's loss", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    images = {"the test": parts.images[0][test], "harmful": parts.images[1][sample]}
    for number, (title, image) in enumerate(images.items()):
        inset = axes[2].inset_axes((0.08 + 0.3 * number, 0.05, 0.22, 0.22))
        inset.imshow(image, cmap="gray_r")
        inset.set_title(title, fontsize=8, pad=2)
        inset.set(xticks=[], yticks=[])
    save(drawn, path)


def main(arguments: Sequence[str] | None = None) -> None:
    make(__file__, __doc__, components, table, draw, arguments)


if __name__ == "__main__":
    command(main)
