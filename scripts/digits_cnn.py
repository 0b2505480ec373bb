"""A small convolutional network on all 1797 handwritten digits, one in ten of whose labels is wrong.

The tests are a hundred of these digits whose labels we know to be right, as if we had looked through them by hand:
what harms the network's answers on them?

python scripts/train.py digits_cnn
influence-pipeline run scripts/digits_cnn.toml
"""

from digits import digits
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from train import trained

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-2)


def network() -> nn.Module:
    """Make the network, untrained: 38,282 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def data() -> tuple[Dataset, Dataset]:
    """Load 1797 training samples, 180 of them with wrong labels, and ten of each class whose labels are right."""
    loaded = digits(flipped=0.1, held_out=0)
    images, labels = loaded.train.tensors
    right = labels == loaded.true_labels
    return loaded.train, ip.per_class(TensorDataset(images[right], labels[right]), 10)


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("digits_cnn", network()), TASK, train, {"trusted": test})
