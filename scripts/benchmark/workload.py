"""What is measured on: a small CNN of 42,026 parameters on digits, and what is around it."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-3)
QUICK = bool(os.environ.get("BENCHMARK_QUICK"))
"""Whether this, or what started it, is a look whether everything runs."""
DISTINCT = 512 if QUICK else 4096
"""Images that differ; longer data sets repeat them."""
STEPS = 5 if QUICK else 200
"""Of training."""


class Repeated(Dataset[tuple[Tensor, Tensor]]):
    """A data set of any length that goes round a shorter one, so that its length costs no memory."""

    def __init__(self, images: Tensor, labels: Tensor, length: int) -> None:
        self.images, self.labels, self.length = images, labels, length

    def __len__(self) -> int:
        """Count the samples."""
        return self.length

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        if not 0 <= position < self.length:
            raise IndexError(position)
        return self.images[position % len(self.images)], self.labels[position % len(self.images)]


@functools.cache
def images(count: int, channels: int = 1, side: int = 28) -> tuple[Tensor, Tensor]:
    """Return handwritten digits as larger images, each moved and made a little noisy, with their labels."""
    digits, labels = handwritten()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(count) % len(labels)
    small = digits[chosen].unsqueeze(1)
    large = functional.interpolate(small, (side, side), mode="bilinear").repeat(1, channels, 1, 1)
    moves = torch.randint(-2, 3, (count, 2), generator=generator).tolist()
    moved = torch.stack([image.roll(move, (1, 2)) for image, move in zip(large, moves, strict=True)])
    return moved + 0.05 * torch.randn(moved.shape, generator=generator), labels[chosen]


def handwritten() -> tuple[Tensor, Tensor]:
    """Return digits of 8 × 8 and their labels; for a look blots, which take no time to be loaded."""
    if QUICK:
        return torch.rand(100, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 10
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images / 16, dtype=torch.float32), torch.tensor(bunch.target)


def small_cnn(channels: int = 16, hidden: int = 32) -> nn.Module:
    """Make the small CNN: convolution, ReLU and pooling twice, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 36, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def fitted(model: nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Train a little, so that gradients are those of a model that has learnt something."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


@functools.cache
def trained_cnn(channels: int = 16, hidden: int = 32) -> nn.Module:
    """Return the small CNN after some steps, the same every time on one machine."""
    torch.manual_seed(0)
    return fitted(small_cnn(channels, hidden), *images(DISTINCT), STEPS)


def tests(count: int) -> TensorDataset:
    """Return test samples."""
    inputs, labels = images(DISTINCT)
    return TensorDataset(inputs[-count:] + 0.01, labels[-count:])


def experiment(samples: int, tests_: dict[str, int], model: nn.Module | None = None, **options: Any) -> ip.Experiment:
    """Return the small CNN with so many training samples and test sets of so many."""
    return ip.Experiment(
        model if model is not None else trained_cnn(),
        TASK,
        Repeated(*images(DISTINCT), samples),
        {name: tests(count) for name, count in tests_.items()},
        **options,
    )


def settings(**sections: dict[str, Any]) -> ip.Settings:
    """Return settings without progress bars, with no curvature unless a section says so."""
    sections["runtime"] = {"progress": False, "device": "cpu", **sections.get("runtime", {})}
    return ip.Settings(**{"s_test": {"solver": "identity"}, **sections})
