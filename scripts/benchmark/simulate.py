"""Compare what ``plan --simulate`` says with runs of three sizes: seconds, and blocks, files and bytes of each stage.

    python scripts/benchmark/simulate.py [--samples 16384 65536 262144] [--folder FOLDER]

The model is one layer of 64 × 64 weights, D = 4096, with 64 tests. Rates are measured first, on another size: of
the stages as ``plan --measure`` does, of scoring by blocks of few and of many tests. Blocks, files and bytes before
compression must be the same; the script fails where they are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

import influence_pipeline as ip  # noqa: E402
from influence_pipeline.simulation import Scale, simulate  # noqa: E402
from stages.influence import Influence  # noqa: E402
from stages.influence.ranking import bottom_k, top_k  # noqa: E402
from stages.stage import Positions  # noqa: E402

WIDTH, TESTS, SOLVED, BAND = 64, 64, 2048, 8192
DIM = WIDTH * WIDTH
MEASURED = 32768
"""Training samples of the run that rates are of."""
logging.getLogger("stages").setLevel(logging.ERROR)  # the solver is stopped before it is done
SETTINGS = ip.Settings(
    s_test={"damping": {"relative": 0.1}, "sample": SOLVED, "max_iterations": 20, "tolerance": 1e-12},
    runtime={"device": "cpu", "progress": False},
)


def pipeline(samples: int, folder: Path) -> ip.Pipeline:
    """Return a pipeline of a layer and so many random samples, with nothing cached."""
    generator = torch.Generator().manual_seed(0)

    def points(count: int) -> TensorDataset:
        return TensorDataset(
            torch.randn(count, WIDTH, generator=generator), torch.randint(WIDTH, (count,), generator=generator)
        )

    shutil.rmtree(folder, ignore_errors=True)
    experiment = ip.Experiment(
        torch.nn.Linear(WIDTH, WIDTH, bias=False), ip.Classification(), points(samples), {"tests": points(TESTS)}
    )
    return ip.Pipeline(experiment, folder, SETTINGS)


def seconds(do: Callable[[], object]) -> float:
    """Return what something takes, at best of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return min(times)


def scoring(made: ip.Pipeline, tests: int) -> float:
    """Return the seconds of a block of scores for so many random solutions, from cached gradients."""
    gradients = next(made.cache.groups("grad_z")).rows("gradients")
    vectors = np.random.default_rng(0).standard_normal((tests, DIM), dtype=np.float32)
    stage = Influence(
        *(vectors, gradients, Positions(BAND), np.arange(tests)),
        bands=(tests, BAND),
        read_rows=256,
        read_columns=DIM,
        tile_columns=DIM,
        rows_first=False,
        curvature_samples=BAND,
        top_k=500,
        store_scores=True,
    )
    return seconds(lambda: stage.compute(stage.grid.block((0, 0))))


def measured(samples: int, folder: Path) -> Scale:
    """Return the rates of this machine."""
    pipeline(4096, folder).run()  # what is loaded once
    made = pipeline(samples, folder)
    gradients = samples / made.grad_z().seconds
    scale = Scale(samples, TESTS, DIM).measured(made.plan(measure=True))
    few, many = scoring(made, 16), scoring(made, 256)
    each = (many - few) / 240  # of a test; the rest is for reading
    scores = np.random.default_rng(0).standard_normal((TESTS, BAND), dtype=np.float32)
    ranking = seconds(lambda: [pick(scores, np.arange(BAND), 500) for pick in (top_k, bottom_k)]) / TESTS
    return dataclasses.replace(
        scale,
        gradients=gradients,
        reads=4 * BAND * DIM / (few - 16 * each),
        flops=2 * BAND * DIM / max(each - ranking, each / 10),
        ranked=BAND / ranking,
    )


def compare(scale: Scale, folder: Path) -> bool:
    """Print what was said of a size beside what a run of it takes; return whether all that is exact is the same."""
    said, made = simulate(scale, SETTINGS), pipeline(scale.samples, folder)
    steps: dict[tuple[str, ...], Callable[[], object]] = {
        ("grad_z",): made.grad_z,
        ("curvature", "s_test"): lambda: made.s_test("tests"),
        ("influence",): lambda: made.influence("tests"),
    }
    made.plan()
    same = True
    for names, run in steps.items():
        began = time.perf_counter()
        run()
        taken = time.perf_counter() - began
        seconds = sum(said[name].seconds for name in names)
        print(
            f"{scale.samples:>7} {' + '.join(names):<18} {seconds:>8.2f} {taken:>8.2f} {seconds / taken - 1:>+7.0%}",
            end="",
        )
        for name in names:
            plan, stage = made.plan()[name], said[name]
            arrays = zarr.open_group(made.cache.path / name / plan.key, mode="r").arrays()
            found = plan.total, plan.files, sum(array.nbytes for _, array in arrays)
            wanted = stage.blocks, stage.files, stage.bytes
            same = same and found == wanted
            exact = "the same" if found == wanted else f"not {' '.join(map(str, wanted))}"
            print(f"  {name}: {found[0]} blocks, {found[1]} files, {found[2]} bytes: {exact}", end="")
        print(flush=True)
    return same


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simulate_", dir=options.folder) as folder:
        scale = measured(MEASURED, Path(folder) / "measured")
        print(scale)
        print(f"{'samples':>7} {'stage':<18} {'said, s':>8} {'taken, s':>8} {'off':>7}")
        sizes = (dataclasses.replace(scale, samples=samples) for samples in options.samples)
        exact = [compare(size, Path(folder) / "run") for size in sizes]
    sys.exit(0 if all(exact) else "what should be exact is not")


if __name__ == "__main__":
    main()
