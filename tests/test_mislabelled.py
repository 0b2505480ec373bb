"""Wrong labels are found by self-influence: softmax regression on digits, of which a tenth is labelled wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from tests.test_retraining import CLASSES, L2, Floats, Softmax

TRAIN, FLIPPED = 500, 50


def auc(scores: Floats, positive: np.ndarray) -> float:
    """Return the share of pairs (one positive, one not) in which the positive one has the larger score."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(len(scores))
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (len(scores) - count)))


def test_wrong_labels_have_the_highest_self_influence(tmp_path: Path) -> None:
    inputs, labels = load_digits(return_X_y=True)
    draw = np.random.default_rng(0)
    chosen = draw.permutation(len(inputs))[:TRAIN]
    inputs, labels = inputs[chosen] / 16.0, labels[chosen]
    wrong = np.zeros(TRAIN, bool)
    wrong[draw.permutation(TRAIN)[:FLIPPED]] = True
    labels[wrong] = (labels[wrong] + draw.integers(1, CLASSES, FLIPPED)) % CLASSES
    theta = Softmax(inputs, labels).train(np.full(TRAIN, 1 / TRAIN), np.zeros((CLASSES, 65)))
    model = nn.Linear(64, CLASSES)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta[:, :64]))
        model.bias.copy_(torch.from_numpy(theta[:, 64]))

    data = TensorDataset(torch.from_numpy(inputs).float(), torch.from_numpy(labels))
    settings = ip.Settings(s_test={"solver": "exact", "damping": 0.0}, runtime={"progress": False, "device": "cpu"})
    experiment = ip.Experiment(model, ip.Classification(l2=L2), data, {"few": TensorDataset(*data[:2])})
    pipeline = ip.Pipeline(experiment, tmp_path / "cache", settings)
    pipeline.grad_z()
    found = pipeline.self_influence()
    assert auc(found.values, wrong) > 0.9
    assert wrong[found.highest(FLIPPED)[0]].mean() > 0.6
