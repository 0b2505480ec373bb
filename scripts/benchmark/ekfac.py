"""``ekfac`` beside kronfluence, on the small CNN: ``python scripts/benchmark/ekfac.py``.

Seconds, in processes of their own that take turns: what factors and eigenvalues take, and all that the first test set
takes, the training gradients among it. Then how far scores agree: of the empirical Fisher matrix, which is the same in
both, with l2 = 0 and the same damping; and of the sampled one, whose targets each draws for itself, beside two runs of
each with other draws. It uses the environment that ``peers.py`` makes.
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
from typing import Any

from peers import SAMPLES, TESTS, others

DAMPING = 1e-2
LIMIT = 1800.0
"""Seconds for one process."""


def ours(samples: int, folder: Path, **solver: Any) -> tuple[float, float, Any]:
    """Return the seconds that factors took, and the first test set; and the scores."""
    import workload

    import influence_pipeline as ip

    data = workload.Repeated(*workload.images(workload.DISTINCT), samples)
    experiment = ip.Experiment(workload.trained_cnn(), ip.Classification(), data, {"tests": workload.tests(TESTS)})
    solver = {"solver": "ekfac", "damping": DAMPING, **solver}
    began = time.perf_counter()
    pipeline = ip.Pipeline(experiment, folder / "cache", workload.settings(s_test=solver))
    for place in pipeline._works.curvature_places():
        pipeline._run(place)
    factors = time.perf_counter() - began
    scores = pipeline.run()["tests"].scores[:]
    return factors, time.perf_counter() - began, scores


def theirs(samples: int, folder: Path, *, empirical: bool = False, seed: int = 0) -> tuple[float, float, Any]:
    """Return the same of kronfluence."""
    import kronfluence.analyzer  # noqa: F401 - no part of what is measured
    import torch
    import workload

    model = copy.deepcopy(workload.trained_cnn())
    data = workload.Repeated(*workload.images(workload.DISTINCT), samples)
    torch.manual_seed(seed)
    began = time.perf_counter()
    score = others.kronfluence(model, data, folder, use_empirical_fisher=empirical)
    factors = time.perf_counter() - began
    scores = score(workload.tests(TESTS), damping_factor=DAMPING).numpy()
    return factors, time.perf_counter() - began, scores


def spearman(first: Any, second: Any) -> float:
    """Return the mean over test samples of Spearman's correlation."""
    import numpy as np

    ranks = [np.argsort(np.argsort(scores, axis=1), axis=1) for scores in (first, second)]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)]))


def agreement(samples: int) -> dict[str, float]:
    """Return how far scores agree."""

    def scores(function: Any, **options: Any) -> Any:
        with tempfile.TemporaryDirectory(prefix="ekfac_") as folder:
            return function(samples, Path(folder), **options)[2]

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

    workload.trained_cnn()  # neither training nor data are part of what is measured
    if what == "agreement":
        print(json.dumps(agreement(samples)))
        return
    with tempfile.TemporaryDirectory(prefix="ekfac_") as folder:
        print(json.dumps({"ours": ours, "theirs": theirs}[what](samples, Path(folder))[:2]))


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

    rounds = [(found("ours"), found("theirs")) for _ in range(options.rounds)]
    print(f"N = {options.samples}, T = {TESTS}; median seconds of {options.rounds}")
    for number, name in enumerate(("factors and eigenvalues", "the first test set, all in all")):
        own, other = (statistics.median(pair[side][number] for pair in rounds) for side in (0, 1))
        print(f"{name}: {own:.2f}, kronfluence {other:.2f}: {other / own:.2f}x")
    for name, value in found("agreement").items():
        print(f"Spearman, {name}: {value:.5f}")


if __name__ == "__main__":
    main()
