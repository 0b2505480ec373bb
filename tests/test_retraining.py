"""What the numbers claim, against models that were trained again without a sample.

Softmax regression on digits: convex, so that every model here is the optimum of its objective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import influence_pipeline as ip

Floats = NDArray[np.float64]

TRAIN, TESTS, LEFT_OUT, CLASSES = 1000, 20, 100, 10
L2 = 0.01
"""Of all 650 parameters, biases too."""


class Softmax:
    """Training by Newton's method in NumPy: minimise Σ wᵢ L(zᵢ) + (l2/2)|θ|² over θ (classes, features + 1)."""

    def __init__(self, inputs: Floats, labels: NDArray[Any]) -> None:
        self.inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        self.targets = np.eye(CLASSES)[labels]

    def probabilities(self, theta: Floats) -> Floats:
        logits = self.inputs @ theta.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def losses(self, theta: Floats) -> Floats:
        return -np.log((self.probabilities(theta) * self.targets).sum(1))

    def gradient(self, theta: Floats, weights: Floats) -> Floats:
        return ((self.probabilities(theta) - self.targets) * weights[:, None]).T @ self.inputs + L2 * theta

    def hessian(self, theta: Floats, weights: Floats) -> Floats:
        p, (_, features) = self.probabilities(theta), self.inputs.shape
        whole = np.empty((CLASSES, features, CLASSES, features))
        for a in range(CLASSES):
            for b in range(a, CLASSES):
                inner = weights * p[:, a] * ((a == b) - p[:, b])
                whole[a, :, b] = whole[b, :, a] = (self.inputs * inner[:, None]).T @ self.inputs
        return whole.reshape(CLASSES * features, -1) + L2 * np.eye(CLASSES * features)

    def train(self, weights: Floats, start: Floats, factor: Any = None) -> Floats:
        """Minimise to a gradient of 1e-10; with a factor of a nearby Hessian, by steps with that."""
        theta = start
        for _ in range(100):
            gradient = self.gradient(theta, weights)
            if np.abs(gradient).max() < 1e-10:
                return theta
            step = (
                np.linalg.solve(self.hessian(theta, weights), gradient.ravel())
                if factor is None
                else factor @ gradient.ravel()
            )
            theta = theta - step.reshape(theta.shape)
        raise AssertionError("not converged")


class Digits:
    """A trained model, and what each of some tests loses without each of some training samples."""

    def __init__(self) -> None:
        inputs, labels = load_digits(return_X_y=True)
        inputs = inputs / 16.0
        order = np.random.default_rng(0).permutation(len(inputs))
        train, test = order[:TRAIN], order[TRAIN : TRAIN + TESTS]
        self.train = Softmax(inputs[train], labels[train])
        self.test = Softmax(inputs[test], labels[test])
        self.sets = [
            TensorDataset(torch.from_numpy(inputs[ids]), torch.from_numpy(labels[ids])) for ids in (train, test)
        ]
        weights = np.full(TRAIN, 1 / TRAIN)
        self.theta = self.train.train(weights, np.zeros((CLASSES, 65)))
        self.inverse = np.linalg.inv(self.train.hessian(self.theta, weights))

    def changes(self, ids: range, mean_over: int) -> Floats:
        """Return each test's loss after training again without each sample, minus its loss now, (T, len(ids))."""
        now, columns = self.test.losses(self.theta), []
        for i in ids:
            weights = np.full(TRAIN, 1 / mean_over)
            weights[i] = 0.0
            columns.append(self.test.losses(self.train.train(weights, self.theta, self.inverse)) - now)
        return np.stack(columns, axis=1)

    def experiment(self) -> ip.Experiment:
        model = nn.Linear(64, CLASSES).double()
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self.theta[:, :64]))
            model.bias.copy_(torch.from_numpy(self.theta[:, 64]))
        return ip.Experiment(model, ip.Classification(l2=L2), self.sets[0], {"holdout": self.sets[1]})


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def truth(digits: Digits) -> Floats:
    """Weight zero for the sample that is left out."""
    return digits.changes(range(LEFT_OUT), TRAIN)


SOLVERS: dict[str, dict[str, Any]] = {
    "exact": {"curvature": "hessian"},
    "cg": {"tolerance": 1e-3},
    "lissa": {"tolerance": 0.05, "batch_size": 128},
}


def influences(digits: Digits, folder: Path, solver: str, **influence: Any) -> ip.Influences:
    chosen = {"solver": solver, "damping": 0.0, **SOLVERS[solver]}
    settings = ip.Settings(s_test=chosen, influence=influence, runtime={"progress": False, "device": "cpu"})
    return ip.Pipeline(digits.experiment(), folder / "cache", settings).run()["holdout"]


def pearson(found: Floats, expected: Floats) -> float:
    return float(np.corrcoef(found.ravel(), expected.ravel())[0, 1])


def same_sign(found: Floats, expected: Floats) -> float:
    return float((np.sign(found) == np.sign(expected)).mean())


def slope(found: Floats, expected: Floats) -> float:
    return float((found * expected).sum() / (found * found).sum())


def test_the_models_that_scores_are_compared_with_are_optima(digits: Digits) -> None:
    weights = np.full(TRAIN, 1 / TRAIN)
    assert np.abs(digits.train.gradient(digits.theta, weights)).max() < 1e-10
    assert (digits.test.probabilities(digits.theta).argmax(1) == digits.test.targets.argmax(1)).mean() > 0.8
    weights[3] = 0.0
    by_newton = digits.train.train(weights, np.zeros((CLASSES, 65)))
    by_chord = digits.train.train(weights, digits.theta, digits.inverse)
    np.testing.assert_allclose(by_chord, by_newton, rtol=0, atol=1e-8)
    assert np.abs(by_newton - digits.theta).max() > 1e-4


@pytest.mark.parametrize(("solver", "least"), [("exact", 0.99), ("cg", 0.99), ("lissa", 0.97)])
def test_scores_predict_the_change_of_each_tests_loss_without_each_sample(
    digits: Digits, truth: Floats, tmp_path: Path, solver: str, least: float
) -> None:
    found = influences(digits, tmp_path, solver)
    scores = found.scores[:, :LEFT_OUT].astype(np.float64)
    assert pearson(scores, truth) >= least
    assert same_sign(scores, truth) >= 0.97
    assert 0.95 < slope(scores, truth) < 1.25, "the scale is that of the change itself, less the sample's own leverage"
    helpful, _ = found.helpful(5)
    harmful, _ = found.harmful(5)
    for row, change in enumerate(truth):
        for ids, sign in ((helpful[row], 1), (harmful[row], -1)):
            assert (sign * change[ids[ids < LEFT_OUT]] > 0).all()


def test_corrected_scores_have_the_scale_of_the_change_of_each_tests_loss(
    digits: Digits, truth: Floats, tmp_path: Path
) -> None:
    first = influences(digits, tmp_path / "first", "exact").scores[:, :LEFT_OUT].astype(np.float64)
    whole = influences(digits, tmp_path / "whole", "exact", correction="newton").scores[:, :LEFT_OUT].astype(np.float64)
    assert pearson(whole, truth) >= 0.998
    assert abs(slope(whole, truth) - 1) < 0.03
    assert np.abs(whole - truth).max() < np.abs(first - truth).max() / 3


def test_with_the_offset_scores_predict_training_on_a_mean_over_one_sample_less(digits: Digits, tmp_path: Path) -> None:
    found = influences(digits, tmp_path, "exact")
    truth = digits.changes(range(40), TRAIN - 1)
    scores = found.scores[:, :40].astype(np.float64)
    shifted = scores + found.offset[:, None]
    assert same_sign(shifted, truth) >= 0.97
    assert pearson(shifted, truth) >= 0.99
    assert same_sign(scores, truth) < 0.95, "without the offset signs differ, or this test shows nothing"
