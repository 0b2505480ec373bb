"""Scores of other packages for the same models and data, in the sign and scale of this package.

``python peers.py PEER CASE FILE`` runs in the environment of ``others.py`` and writes the scores of every setting: the
first is chosen without looking at any accuracy, the package's defaults with the penalty of the training objective as
damping, where it has one; the others are for the best in hindsight.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import numpy as np  # noqa: E402
import others  # noqa: E402
from truth import Scored  # noqa: E402

if TYPE_CHECKING:
    from cases import Case
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes:
        title: its method and version.
        settings: to be tried for a case, the one that is chosen beforehand first.
        prepare: makes, with one of these, a function that scores test sets (T, N) as this package would.
    """

    title: str
    settings: Callable[[Case], list[dict[str, Any]]]
    prepare: Callable[[nn.Module, TensorDataset, Path, dict[str, Any]], others.Score]


def kronfluence(model: nn.Module, data: TensorDataset, folder: Path, setting: dict[str, Any]) -> others.Score:
    """Divide by N, since its curvature is a mean over samples, as ours."""
    score = others.kronfluence(model, data, folder)
    return lambda tests: score(tests, **setting) / len(data)


def traker(model: nn.Module, data: TensorDataset, folder: Path, setting: dict[str, Any]) -> others.Score:
    """Multiply by 1 − p: what a margin gains is what the loss −log p loses, at that rate."""
    import torch

    score = others.traker(model, data, folder, **setting)

    def of_loss(tests: TensorDataset) -> Tensor:
        inputs, labels = tests.tensors
        with torch.no_grad():
            right = model(inputs).softmax(1).gather(1, labels[:, None])
        return score(tests) * (1 - right)

    return of_loss


def captum(model: nn.Module, data: TensorDataset, folder: Path, setting: dict[str, Any]) -> others.Score:
    """Leave the scores as they are: its curvature is a sum over samples."""
    return others.captum(model, data, folder, **setting)


def _kronfluence(case: Case) -> list[dict[str, Any]]:
    # None is a tenth of the mean eigenvalue of each layer; {} is its default, 1e-8.
    return [{"damping_factor": case.task.l2}, {}, *({"damping_factor": one} for one in (None, 1e-2, 1e-1))]


def _traker(case: Case) -> list[dict[str, Any]]:
    # Its matrix is singular where there are as many dimensions as samples, so that the default, 2048, is no choice.
    samples = len(case.data().train)
    return [{"dimensions": samples // share} for share in (4, 8, 2)]


def _captum(case: Case) -> list[dict[str, Any]]:
    penalty = {"hessian_reg": case.task.l2 * len(case.data().train)}
    return [penalty, {}, {"projection_dim": 190, **penalty}, {"projection_dim": 190}]


PEERS = {
    "kronfluence": Peer("kronfluence 1.0.1, EK-FAC", _kronfluence, kronfluence),
    "traker": Peer("traker 0.3.2, one model", _traker, traker),
    "captum": Peer("captum 0.9.0, Arnoldi", _captum, captum),
}


CHECKED = 16
"""Training samples whose scores for their own loss show the sign of a setting that was not chosen."""


def read(file: Path) -> list[Scored]:
    """Read what a child wrote of each setting."""
    with np.load(file, allow_pickle=False) as found:
        columns = (found[name] for name in ("setting", "scores", "own", "seconds"))
        return [
            Scored(str(setting), scores, None if np.isnan(own).any() else own, float(seconds))
            for setting, scores, own, seconds in zip(*columns, strict=True)
        ]


def scored(peer: Peer, case: Case) -> list[Scored]:
    """Score the test set with each setting, then training samples, whose scores for themselves must be positive.

    Raises:
        RuntimeError: they are not, so that the sign is not ours.
    """
    import torch
    from torch.utils.data import TensorDataset

    train, test, _ = case.data()
    found: list[Scored] = []
    for setting in peer.settings(case):
        count = CHECKED if found else len(train)
        own = np.full(len(train), np.nan, np.float32)
        with tempfile.TemporaryDirectory(prefix="accuracy_") as folder:
            torch.manual_seed(0)  # of the labels that kronfluence draws
            began = time.process_time()
            score = peer.prepare(case.model(), train, Path(folder), setting)
            scores = score(test).detach().numpy()
            seconds = time.process_time() - began
            own[:count] = score(TensorDataset(*(values[:count] for values in train.tensors))).detach().diagonal()
        if not np.median(own[:count]) > 0:
            raise RuntimeError(f"{peer.title} {setting}: a sample helps its own loss, and its score is not positive")
        shown = ", ".join(f"{name} = {value}" for name, value in setting.items()) or "defaults"
        found.append(Scored(shown, scores, own, seconds))
    return found


def main() -> None:
    """Write the scores of one peer for one case."""
    from cases import cases

    name, case, file = sys.argv[1:]
    partial = Path(file).with_suffix(".partial")
    with partial.open("wb") as opened:
        columns = zip(*scored(PEERS[name], cases()[case]), strict=True)
        np.savez(opened, **dict(zip(Scored._fields, map(np.array, columns), strict=True)))
    partial.replace(file)
    print("null")


if __name__ == "__main__":
    main()
