"""The four problems: a model, real data with one label in ten made wrong, and how it is trained from a seed.

Training is the ground truth's: its cost is what the whole table costs, and the same samples, seed and machine give the
same weights, so that retraining without a sample shows that sample and not the draw of another shuffle. It runs on one
thread, and sums every loss over the number of all training samples, those that are left out among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from digits import digits, flip
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from train import FOLDER, keep, trained
from truth import Size

import influence_pipeline as ip

FLIPPED = 0.1
"""Share of the training labels that are made wrong."""
Fit = Callable[[nn.Module, ip.Classification, TensorDataset, Tensor, int], None]
"""Train a network that was just initialised on a data set, with a weight of 0 or 1 for each sample, from a seed."""


class Data(NamedTuple):
    """Inputs and labels.

    Attributes:
        train: the training set.
        test: samples that were held out, with right labels.
        flipped: ids of the training samples whose label was made wrong.
    """

    train: TensorDataset
    test: TensorDataset
    flipped: Tensor


@dataclass(frozen=True)
class Case:
    """A problem.

    Attributes:
        key: by which it is asked for.
        title: for people.
        data: loads the data.
        network: makes the model, untrained.
        task: the loss and its penalty.
        fit: trains the model.
        size: how many models are trained again.
        suffix: to the name of its weights.
    """

    key: str
    title: str
    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    task: ip.Classification
    fit: Fit
    size: Size
    suffix: str = ""

    @property
    def name(self) -> str:
        """The name of its weights in ``scripts/weights``."""
        return f"accuracy_{self.key}{self.suffix}"

    def retrain(self, dataset: TensorDataset, seed: int, weights: Tensor | None = None) -> nn.Module:
        """Train the model anew; samples of weight 0 count for nothing."""
        with one_thread():
            torch.manual_seed(seed)
            model = self.network()
            self.fit(model, self.task, dataset, torch.ones(len(dataset)) if weights is None else weights, seed)
        return model.eval()

    def train(self) -> None:
        """Train the model that is asked about, from seed 0, unless that was done before."""
        if not (FOLDER / f"{self.name}.pt").is_file():
            keep(self.name, self.retrain(self.data().train, 0))

    def model(self) -> nn.Module:
        """Load that model."""
        return trained(self.name, self.network(), f"{sys.executable} {Path(__file__).with_name('run.py')}").eval()

    def is_flipped(self) -> NDArray[np.bool_]:
        """Return whether each training label was made wrong, (N,)."""
        train, _, flipped = self.data()
        return np.isin(np.arange(len(train)), flipped)

    def experiment(self) -> ip.Experiment:
        """Put together what the pipeline needs."""
        train, test, flipped = self.data()
        return ip.Experiment(
            *(self.model, self.task, train, {"holdout": test}), retrain=self.retrain, mislabelled=flipped.tolist()
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Have PyTorch compute on one thread, so that sums are the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- data ------------------------------------------------------------------------------------------------------------


def some_digits(train: int, test: int) -> Data:
    """Take digits: of those that are held out, the first."""
    found = digits(FLIPPED, held_out=1797 - train)
    return Data(found.train, TensorDataset(*(values[:test] for values in found.test.tensors)), found.flipped)


def tumours(train: int, test: int) -> Data:
    """Take breast tumours, malignant or benign: thirty measurements, each of mean 0 and variance 1."""
    inputs, labels = map(torch.tensor, load_breast_cancer(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).float()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[: train + test]
    inputs, labels = inputs[order], labels[order]
    given, changed = flip(labels[test:], FLIPPED, 2, generator)
    return Data(TensorDataset(inputs[test:], given), TensorDataset(inputs[:test], labels[:test]), changed)


# ---- training --------------------------------------------------------------------------------------------------------


def by_newton(model: nn.Module, task: ip.Classification, data: TensorDataset, weights: Tensor, seed: int) -> None:
    """Take softmax regression, flattened inputs and one linear layer, to its optimum in float64."""
    inputs, labels = (values[weights > 0] for values in data.tensors)
    layer, count = model[-1], len(data)
    ones = torch.ones(len(inputs), 1)
    x_NF = torch.cat([inputs.flatten(1), ones], 1).double()
    y_NC = functional.one_hot(labels, layer.out_features).double()
    theta_CF = torch.zeros(layer.out_features, x_NF.shape[1], dtype=torch.float64)
    size, classes = theta_CF.numel(), range(layer.out_features)
    while True:
        p_NC = (x_NF @ theta_CF.T).softmax(1)
        gradient = (p_NC - y_NC).T @ x_NF / count + task.l2 * theta_CF
        weighted = (p_NC[:, :, None] * x_NF[:, None, :]).flatten(1)
        hessian = torch.block_diag(*(weighted.unflatten(1, theta_CF.shape)[:, c].T @ x_NF for c in classes))
        hessian = (hessian - weighted.T @ weighted) / count + task.l2 * torch.eye(size, dtype=torch.float64)
        step = torch.cholesky_solve(gradient.reshape(-1, 1), torch.linalg.cholesky(hessian)).reshape(theta_CF.shape)
        decrement = float((gradient * step).sum()) ** 0.5
        theta_CF -= step / (1 + decrement)  # shorter far from the optimum, where a full one may be too long
        if decrement < 1e-12:
            break
    with torch.no_grad():
        layer.weight.copy_(theta_CF[:, :-1])
        layer.bias.copy_(theta_CF[:, -1])


def by_adam(
    model: nn.Module,
    task: ip.Classification,
    data: TensorDataset,
    weights: Tensor,
    seed: int,
    *,
    epochs: int,
    step: float,
) -> None:
    """Train by Adam over batches of some 64, with a step that falls to zero.

    The batches are those of all samples in a shuffled order, without those of weight 0: leaving out one sample leaves
    the others where they are.
    """
    generator = torch.Generator().manual_seed(seed)
    # What it calls decay of weights is the gradient of the penalty, added to that of the losses.
    optimizer = torch.optim.Adam(model.parameters(), lr=step, weight_decay=task.l2, fused=True)
    batches = -(-len(data) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for ids in torch.randperm(len(data), generator=generator).tensor_split(batches):
            kept = ids[weights[ids] > 0]
            batch = [values[kept] for values in data.tensors]
            optimizer.zero_grad()
            (task.losses(task.outputs(model, batch), batch).sum() / len(ids)).backward()
            optimizer.step()
            schedule.step()


# ---- the four --------------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    """Make logistic regression: 650 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def mlp(hidden: int = 32) -> nn.Module:
    """Make a network with a hidden layer: 2,410 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def cnn(channels: int = 8) -> nn.Module:
    """Make a convolutional network: 3,818 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(2 * channels * 4 * 4, 10)),
    )


def table() -> nn.Module:
    """Make a network for thirty measurements: 530 parameters."""
    return nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2))


def cases(quick: bool = False) -> dict[str, Case]:
    """Return the problems by name; ``quick`` are tiny ones, for a look whether everything runs."""
    images, patients, suffix = partial(some_digits, 1000, 100), partial(tumours, 400, 100), ""
    once, thrice, networks = Size(100, 200, 1), Size(100, 50, 3), (mlp, cnn)
    if quick:
        images, patients, suffix = partial(some_digits, 80, 8), partial(tumours, 60, 8), "_quick"
        once, thrice, networks = Size(4, 4, 1, 50), Size(4, 4, 2, 50), (partial(mlp, 4), partial(cnn, 1))

    def net(
        key: str, title: str, data: Callable[[], Data], network: Callable[[], nn.Module], l2: float, epochs: int
    ) -> Case:
        fit = partial(by_adam, epochs=2 if quick else epochs, step=5e-3)
        return Case(key, title, data, network, ip.Classification(l2), fit, thrice, suffix)

    linear_task = ip.Classification(1e-3)
    found = (
        Case("logistic", "Logistic regression, digits", images, linear, linear_task, by_newton, once, suffix),
        net("mlp", "MLP, digits", images, networks[0], 1e-3, 40),
        net("cnn", "CNN, digits", images, networks[1], 1e-3, 30),
        net("table", "MLP, breast tumours", patients, table, 1e-2, 60),
    )
    return {case.key: case for case in found}
