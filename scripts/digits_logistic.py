"""Logistic regression on handwritten digits, trained to its optimum: here influence is exact up to first order.

python scripts/train.py digits_logistic
influence-pipeline run scripts/digits_logistic.toml
"""

from digits import digits
from torch import nn
from torch.utils.data import Dataset
from train import trained

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-3)


def network() -> nn.Module:
    """Make the model, untrained: 650 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def data() -> tuple[Dataset, Dataset]:
    """Load 1437 training and 360 test samples."""
    loaded = digits()
    return loaded.train, loaded.test


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("digits_logistic", network()), TASK, train, {"holdout": test})
