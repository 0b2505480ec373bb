"""Keep only the most influential, or the most helpful, training samples, train again, and compare with random ones.

One in ten labels of the training digits is wrong. Influence is that on a hundred digits that are known to be right;
accuracy is that of other digits, by logistic regression. What was trained is kept, and shared with figures/removal.py.

python scripts/keep_influential.py
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "figures"))
import removal
from shared import Options, command, options

SHARES = (0.1, 0.2, 0.3, 0.5)
"""Of the training set that are kept."""
KEPT = ("the most influential", "the most helpful", "random samples")


@dataclass(frozen=True)
class Kept:
    """Test accuracy for each of some seeds.

    Attributes:
        whole: with all samples, (seeds,).
        alone: with some of them alone, (seeds, kinds, shares).
        wrong: part of these that has wrong labels, (seeds, kinds, shares).
    """

    whole: np.ndarray
    alone: np.ndarray
    wrong: np.ndarray


def kept(given: Options) -> Kept:
    """Keep samples, and train again, for each seed."""
    seeds = [of_seed(seed, given) for seed in range(1 if given.quick else removal.SEEDS)]
    return Kept(*(np.stack(each) for each in zip(*seeds, strict=True)))


def of_seed(seed: int, given: Options) -> tuple[np.ndarray, ...]:
    """Return what :class:`Kept` has of one seed."""
    found = removal.ranked(seed, given)
    count = len(found.train)
    sizes = [round(share * count) for share in SHARES]

    def subsets(which: str) -> list[Sequence[int]]:
        return [found.influences.subset(found.train, k, which=which).indices for k in sizes]

    chosen = [
        *subsets("influential"),
        *subsets("helpful"),
        *(found.at_random[:k] for k in sizes),
    ]
    accuracy = found.with_only([range(count), *chosen])
    wrong = np.array([np.isin(ids, found.wrong).mean() for ids in chosen])
    return accuracy[0], accuracy[1:].reshape(len(KEPT), -1), wrong.reshape(len(KEPT), -1)


def table(found: Kept) -> str:
    """Return means over the seeds, in Markdown."""
    lines = [f"| kept | {' | '.join(f'{share:.0%}' for share in SHARES)} |", "|---" * (len(SHARES) + 1) + "|"]
    at_random = found.alone[:, -1]
    for row, name in enumerate(KEPT):
        cells = []
        for column in range(len(SHARES)):
            accuracy, wrong = found.alone[:, row, column], found.wrong[:, row, column].mean()
            against = "" if name == KEPT[-1] else f" ({removal.difference(accuracy, at_random[:, column])})"
            cells.append(f"{accuracy.mean():.1%}{against}, {wrong:.0%} wrong")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([
        *lines,
        "",
        f"Test accuracy after training on these alone (against random ones), and wrong labels among them; mean of "
        f"{len(found.whole)} seeds. With all samples: {found.whole.mean():.1%}.",
    ])


def main(arguments: Sequence[str] | None = None) -> None:
    print(table(kept(options(removal.__file__, __doc__, arguments))))


if __name__ == "__main__":
    command(main)
