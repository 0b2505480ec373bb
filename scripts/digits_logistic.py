"""Logistic regression on handwritten digits, trained to its optimum: here influence is exact up to first order.

python scripts/train.py digits_logistic
influence-pipeline run scripts/digits_logistic.toml
influence-pipeline evaluate scripts/digits_logistic.toml     # trains it again on halves of its data, and compares
"""

from digits import digits
from torch import nn
from torch.utils.data import Dataset
from train import to_optimum, trained

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-3)


def network() -> nn.Module:
    """Make the model, untrained: 650 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def data() -> tuple[Dataset, Dataset]:
    """Load 1437 training and 360 test samples."""
    loaded = digits()
    return loaded.train, loaded.test


def retrain(dataset: Dataset, seed: int) -> nn.Module:
    """Train the model on other data; the optimum is one, whatever the seed."""
    model = network()
    to_optimum(model, TASK, dataset)
    return model


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("digits_logistic", network()), TASK, train, {"holdout": test}, retrain=retrain)
