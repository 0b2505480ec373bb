"""``ekfac`` beside kronfluence, on the small CNN: ``python scripts/benchmark/ekfac.py``.

Seconds, in processes of their own that take turns: what factors and eigenvalues take, all that the first test set
takes, the training gradients among it, and a further one. The same for a wide CNN of 1.2 million parameters, of which
the cache has the last layer's gradients; kronfluence computes those of all layers again for every test set. Then how
far scores agree: of the empirical Fisher matrix, the same in both, with l2 = 0 and the same damping; and of the sampled
one, whose targets each draws for itself, beside two runs of each with other draws. It uses the environment that
``peers.py`` makes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from peers import SAMPLES, TESTS, others

DAMPING = 1e-2
LIMIT = 1800.0
"""Seconds for one process."""


WIDE = {"channels": 32, "hidden": 512}
LAST = "9.*"
"""The parameters of the last layer."""


class Took(NamedTuple):
    """Seconds of factors, of all for the first test set, and of a further one; and the scores of the first."""

    factors: float
    first: float
    further: float
    scores: Any


def further_tests() -> Any:
    """Return test samples that are not of the first test set."""
    import workload
    from torch.utils.data import TensorDataset

    return TensorDataset(*workload.tests(2 * TESTS)[:TESTS])


def ours(samples: int, folder: Path, *, wide: bool = False, **solver: Any) -> Took:
    """Return what it took here."""
    import workload

    import influence_pipeline as ip

    data, model = (
        workload.Repeated(*workload.images(workload.DISTINCT), samples),
        workload.trained_cnn(**WIDE if wide else {}),
    )
    tests = {"first": workload.tests(TESTS), "further": further_tests()}
    experiment = ip.Experiment(model, ip.Classification(), data, tests)
    sections = {"grad_z": {"parameters": [LAST]}} if wide else {}
    settings = workload.settings(s_test={"solver": "ekfac", "damping": DAMPING, **solver}, **sections)
    began = time.perf_counter()
    pipeline = ip.Pipeline(experiment, folder / "cache", settings)
    for place in pipeline._works.curvature_places():
        pipeline._run(place)
    factors = time.perf_counter() - began
    scores = pipeline.run("first")["first"].scores[:]
    first = time.perf_counter() - began
    pipeline.run("further")["further"].scores[:]
    return Took(factors, first, time.perf_counter() - began - first, scores)


def theirs(samples: int, folder: Path, *, wide: bool = False, empirical: bool = False, seed: int = 0) -> Took:
    """Return the same of kronfluence."""
    import kronfluence.analyzer  # noqa: F401 - no part of what is measured
    import torch
    import workload

    model = copy.deepcopy(workload.trained_cnn(**WIDE if wide else {}))
    data = workload.Repeated(*workload.images(workload.DISTINCT), samples)
    torch.manual_seed(seed)
    began = time.perf_counter()
    score = others.kronfluence(model, data, folder, use_empirical_fisher=empirical)
    factors = time.perf_counter() - began
    scores = score(workload.tests(TESTS), damping_factor=DAMPING).numpy()
    first = time.perf_counter() - began
    score(further_tests(), damping_factor=DAMPING).numpy()
    return Took(factors, first, time.perf_counter() - began - first, scores)


def spearman(first: Any, second: Any) -> float:
    """Return the mean over test samples of Spearman's correlation."""
    import numpy as np

    ranks = [np.argsort(np.argsort(scores, axis=1), axis=1) for scores in (first, second)]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)]))


def agreement(samples: int) -> dict[str, float]:
    """Return how far scores agree."""

    def scores(function: Any, **options: Any) -> Any:
        with tempfile.TemporaryDirectory(prefix="ekfac_") as folder:
            return function(samples, Path(folder), **options).scores

    empirical = spearman(scores(ours, fisher="empirical"), scores(theirs, empirical=True))
    own, other = ([scores(side, seed=seed) for seed in (0, 1)] for side in (ours, theirs))
    return {
        "empirical": empirical,
        "sampled": spearman(own[0], other[0]),
        "sampled, two draws of ours": spearman(*own),
        "sampled, two draws of theirs": spearman(*other),
    }


def child(what: str, samples: int) -> None:
    """Print, as JSON in the last line, what one process finds."""
    warnings.simplefilter("ignore")
    import workload

    if what == "agreement":
        print(json.dumps(agreement(samples)))
        return
    side, wide = what.split()
    workload.trained_cnn(**WIDE if wide == "wide" else {})  # neither training nor data are part of what is measured
    with tempfile.TemporaryDirectory(prefix="ekfac_") as folder:
        found = {"ours": ours, "theirs": theirs}[side](samples, Path(folder), wide=wide == "wide")
        print(json.dumps(found[:-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="training samples")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--python", type=Path, help="of an environment that has both; by default it is made")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]))
        return
    python = options.python or others.install()[0]

    def found(what: str) -> Any:
        answer = others.ask(python, __file__, ["--child", what, options.samples], LIMIT)
        if isinstance(answer, str):
            raise SystemExit(f"{what}: {answer}")
        return answer

    print(f"N = {options.samples}, T = {TESTS}; median seconds of {options.rounds}")
    for model in ("small", "wide"):
        rounds = [(found(f"ours {model}"), found(f"theirs {model}")) for _ in range(options.rounds)]
        for number, name in enumerate(("factors and eigenvalues", "the first test set, all in all", "a further one")):
            own, other = (statistics.median(pair[side][number] for pair in rounds) for side in (0, 1))
            print(f"{model} CNN, {name}: {own:.2f}, kronfluence {other:.2f}: {other / own:.2f}x", flush=True)
    for name, value in found("agreement").items():
        print(f"Spearman, {name}: {value:.5f}")


if __name__ == "__main__":
    main()
