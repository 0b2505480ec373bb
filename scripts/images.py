"""ResNet-18 (11,173,962 parameters) on handwritten digits as colour images, one in ten of whose labels is wrong.

The tests are digits that were held out, with right labels. Training takes some minutes.

python scripts/train.py images
influence-pipeline run scripts/images.toml
python scripts/images.py            # the same, then how many of the most harmful ids have wrong labels
"""

import sys
from pathlib import Path

from demo import show
from digits import digits
from resnet import ResNet18
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from train import trained

import influence_pipeline as ip

TASK = ip.Classification(l2=1e-3)
SIZE = 16


def network() -> nn.Module:
    """Make the network, untrained."""
    return ResNet18()


def enlarged(images: Tensor) -> Tensor:
    """Make (n, 3, SIZE, SIZE) of (n, 1, 8, 8)."""
    return functional.interpolate(images, SIZE, mode="bilinear").expand(-1, 3, -1, -1)


def data() -> tuple[Dataset, Dataset]:
    """Load 1497 training samples, 150 of them with wrong labels, and 10 test samples of each class."""
    train, test, *_ = digits(flipped=0.1, held_out=300)
    train, test = (TensorDataset(enlarged(part.tensors[0]), part.tensors[1]) for part in (train, test))
    return train, ip.per_class(test, 10)


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("images", network()), TASK, train, {"holdout": test})


if __name__ == "__main__":
    try:
        found = ip.Pipeline.from_toml(Path(__file__).with_suffix(".toml")).run("holdout")["holdout"]
        show(found, digits(flipped=0.1, held_out=300))
    except ip.InfluenceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
