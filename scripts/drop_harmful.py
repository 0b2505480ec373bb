"""Drop the training samples that harm most, train again, and compare with dropping as many random ones.

One in ten labels of the training digits is wrong. What is harmful is so to a hundred digits that are known to be right;
accuracy is that of other digits, by logistic regression. What was trained is kept, and shared with figures/removal.py.

python scripts/drop_harmful.py
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "figures"))
import removal
from shared import Options, command, options

SHARES = (0.05, 0.1, 0.15)
"""Of the training set that are dropped."""


@dataclass(frozen=True)
class Dropped:
    """What became of test accuracy, for each of some seeds.

    Attributes:
        before: with all samples, (seeds,).
        harmful: without the most harmful samples, (seeds, shares).
        at_random: without as many random ones, (seeds, shares).
        wrong: part of what was most harmful that has wrong labels, (seeds, shares).
    """

    before: np.ndarray
    harmful: np.ndarray
    at_random: np.ndarray
    wrong: np.ndarray


def dropped(given: Options) -> Dropped:
    """Drop samples, and train again, for each seed."""
    seeds = [of_seed(seed, given) for seed in range(1 if given.quick else removal.SEEDS)]
    return Dropped(*(np.stack(each) for each in zip(*seeds, strict=True)))


def of_seed(seed: int, given: Options) -> tuple[np.ndarray, ...]:
    """Return what :class:`Dropped` has of one seed."""
    found = removal.ranked(seed, given)
    sizes = [round(share * len(found.train)) for share in SHARES]
    harmless = [found.influences.subset(found.train, k, which="not-harmful").indices for k in sizes]
    accuracy = found.with_only([range(len(found.train)), *harmless, *(found.at_random[k:] for k in sizes)])
    worst, _ = found.influences.harmful_on_average(sizes[-1])
    wrong = np.isin(worst, found.wrong)
    return (
        accuracy[0],
        accuracy[1 : len(sizes) + 1],
        accuracy[len(sizes) + 1 :],
        np.array([wrong[:k].mean() for k in sizes]),
    )


def table(found: Dropped) -> str:
    """Return means over the seeds, in Markdown."""
    lines = [
        "| dropped | wrong labels among the most harmful | accuracy without these | without random ones | difference |",
        "|---|---|---|---|---|",
        f"| nothing | | {found.before.mean():.1%} | {found.before.mean():.1%} | |",
    ]
    for column, share in enumerate(SHARES):
        harmful, at_random = found.harmful[:, column], found.at_random[:, column]
        cells = (
            f"{found.wrong[:, column].mean():.0%}",
            f"{harmful.mean():.1%}",
            f"{at_random.mean():.1%}",
            removal.difference(harmful, at_random),
        )
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Test accuracy after training again, mean of {len(found.before)} seeds."])


def main(arguments: Sequence[str] | None = None) -> None:
    print(table(dropped(options(removal.__file__, __doc__, arguments))))


if __name__ == "__main__":
    command(main)
