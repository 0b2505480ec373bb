"""``nystrom``, alone and before ``cg``, on the small CNN: ``python scripts/benchmark/nystrom.py``.

For each solver, processor seconds (of all threads, so that a busy machine matters less) that preparing takes and that
the first test set takes beside; iterations; the largest residual; and Spearman's correlation of its scores with those
of ``cg`` alone, mean over tests. λ is the default, a tenth of the mean eigenvalue, or what is asked for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import workload

import influence_pipeline as ip
from stages.ranks import ranks

RANKS = (64, 128, 256, 512)


def solved(pipeline: ip.Pipeline) -> tuple[str, Any]:
    """Prepare and solve; return what it took, and the scores."""
    clock = [time.process_time()]
    for place in pipeline._works.curvature_places():
        pipeline._run(place)
    clock.append(time.process_time())
    pipeline.s_test("tests")
    clock.append(time.process_time())
    group = pipeline._works.find(pipeline._works.s_test_place("tests"))
    assert group is not None
    iterations, residual = group.array("iterations")[:], group.array("residual")[:]
    prepared, first = np.diff(clock)
    told = f"{prepared:.1f} s, {first:.1f} s, {iterations.mean():.1f} iterations, residual {residual.max():.2g}"
    return told, pipeline.run()["tests"].scores[:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="training samples")
    parser.add_argument("--tests", type=int, default=64, help="test samples")
    parser.add_argument("--damping", type=float, default=0.1, help="λ, as a part of the mean eigenvalue")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    options = parser.parse_args()
    solvers: dict[str, dict[str, Any]] = {"cg": {"solver": "cg"}}
    solvers |= {f"nystrom {r}": {"solver": "nystrom", "rank": r} for r in options.ranks}
    solvers |= {f"cg by nystrom {r}": {"solver": "cg", "preconditioner": "nystrom", "rank": r} for r in options.ranks}
    expected = None
    with tempfile.TemporaryDirectory(prefix="nystrom_") as folder:
        for name, solver in solvers.items():
            settings = workload.settings(s_test={**solver, "damping": {"relative": options.damping}})
            experiment = workload.experiment(options.samples, {"tests": options.tests})
            pipeline = ip.Pipeline(experiment, Path(folder) / "cache", settings)
            pipeline.grad_z()
            told, scores = solved(pipeline)
            expected = scores if expected is None else expected
            pairs = zip(expected, scores, strict=True)
            near = np.mean([np.corrcoef(ranks(one), ranks(other))[0, 1] for one, other in pairs])
            print(f"{name}: {told}, Spearman {near:.4f}", flush=True)


if __name__ == "__main__":
    main()
