"""scikit-learn's handwritten digits: 1797 images of 8 × 8, some held out, some of the others' labels made wrong."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset


class Digits(NamedTuple):
    """Images (1, 8, 8) between 0 and 1 with their labels.

    Attributes:
        train: those that are not held out; ids are positions in this set.
        test: those that are, with right labels.
        flipped: ids of the training samples whose label was changed, sorted.
        true_labels: the training labels as they were.
    """

    train: TensorDataset
    test: TensorDataset
    flipped: Tensor
    true_labels: Tensor


def digits(flipped: float = 0.0, held_out: int = 360, seed: int = 0) -> Digits:
    """Load the digits; a share ``flipped`` of the training samples gets a label drawn from the nine wrong ones."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    test, train = order[:held_out], order[held_out:]

    given, changed = flip(labels[train], flipped, 10, generator)
    return Digits(
        TensorDataset(images[train], given), TensorDataset(images[test], labels[test]), changed, labels[train]
    )


def flip(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give a share of labels another class; return all labels, and the positions of those, sorted."""
    changed = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].sort().values
    given = labels.clone()
    given[changed] = (given[changed] + torch.randint(1, classes, changed.shape, generator=generator)) % classes
    return given, changed
