"""A table: the progression of diabetes in 442 patients from ten measurements, by a small network and squared error.

python scripts/train.py diabetes
influence-pipeline run scripts/diabetes.toml
influence-pipeline report scripts/diabetes.toml
"""

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from train import trained

import influence_pipeline as ip

TASK = ip.Regression(l2=1e-1)
MEASURED = (
    *("age", "sex", "body mass", "blood pressure", "cholesterol", "LDL", "HDL", "cholesterol / HDL"),
    *("triglycerides", "glucose"),
)


def network() -> nn.Module:
    """Make the network, untrained: 385 parameters."""
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def data() -> tuple[Dataset, Dataset]:
    """Load 342 training and 100 test samples; inputs and targets are scaled to mean 0 and variance 1."""
    inputs, targets = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
    inputs, targets = ((values - values.mean(0)) / values.std(0) for values in (inputs, targets))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, test = order[100:], order[:100]
    return TensorDataset(inputs[train], targets[train]), TensorDataset(inputs[test], targets[test])


def patient(sample: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return what a page shows of one."""
    return {name: round(value, 2) for name, value in zip(MEASURED, sample[0].tolist(), strict=True)}


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("diabetes", network()), TASK, train, {"holdout": test}, show=patient)
