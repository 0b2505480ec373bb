"""Other packages beside this one, on the small CNN: ``python scripts/benchmark/peers.py [--plots FOLDER]``.

Each system scores ten test sets, one after the other, in a process of its own: what it can prepare once is part of
the first, and everything it recomputes is part of each. They are installed, with this package and a pinned torch,
into ``.peers-env`` beside ``others.py``. A system that cannot be installed or fails says so in its row.

Each is used as its documentation has it for many test sets: kronfluence fits EK-FAC factors once and computes
pairwise scores; traker featurizes once (512 dimensions) and scores; captum's ArnoldiInfluenceFunction finds its
projections once, over 512 samples, with all other settings at their defaults but batched gradients.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import others  # noqa: E402

SOLVER = {"solver": "cg", "damping": 0.1, "sample": 128, "max_iterations": 10, "tolerance": 0.1}
SETS, TESTS, SAMPLES = 10, 64, 4096
SIZES = (4096, 16384, 65536)


# ---- systems: each prepares, yields, and scores one test set each time that it is asked again ----------------------


def of_this(samples: int, folder: Path) -> Iterator[None]:
    """Keep gradients once, then solve and score."""
    import workload

    import influence_pipeline as ip

    inputs, labels = workload.images(workload.DISTINCT)
    sets = {f"tests{i}": test_set(i) for i in range(SETS)}
    data = workload.Repeated(inputs, labels, samples)
    experiment = ip.Experiment(workload.trained_cnn(), workload.TASK, data, sets)
    pipeline = ip.Pipeline(experiment, folder / "cache", workload.settings(s_test=SOLVER))
    pipeline.grad_z()
    for name in sets:
        pipeline.s_test(name)
        pipeline.influence(name)
        yield


def of_kronfluence(samples: int, folder: Path) -> Iterator[None]:
    """Fit EK-FAC factors once, then compute pairwise scores."""
    import workload

    data = workload.Repeated(*workload.images(workload.DISTINCT), samples)
    yield from scored(others.kronfluence(workload.trained_cnn(), data, folder))


def of_traker(samples: int, folder: Path) -> Iterator[None]:
    """Featurize once, then score."""
    import workload

    data = workload.Repeated(*workload.images(workload.DISTINCT), samples)
    yield from scored(others.traker(workload.trained_cnn(), data, folder))


def of_captum(samples: int, folder: Path) -> Iterator[None]:
    """Find the projections of an approximate inverse once, then compute influence."""
    import workload

    images = workload.images(workload.DISTINCT)
    data, some = (workload.Repeated(*images, count) for count in (samples, min(samples, 512)))
    yield from scored(others.captum(workload.trained_cnn(), data, folder, hessian_dataset=some))


def scored(score: Callable[..., Any]) -> Iterator[None]:
    """Score the test sets, one each time that it is asked."""
    for i in range(SETS):
        score(test_set(i))
        yield


SYSTEMS: dict[str, Callable[[int, Path], Iterator[None]]] = {
    "influence_pipeline": of_this,
    "kronfluence": of_kronfluence,
    "traker": of_traker,
    "captum": of_captum,
}


def test_set(number: int) -> Any:
    """Return one of ten test sets."""
    import workload
    from torch.utils.data import TensorDataset

    inputs, labels = workload.images(workload.DISTINCT)
    part = slice(number * TESTS, (number + 1) * TESTS)
    return TensorDataset(inputs[part] + 0.01, labels[part])


def child(system: str, samples: int, sets: int) -> None:
    """Print, as JSON in the last line, the seconds since the beginning after each test set."""
    import workload

    workload.trained_cnn()  # neither training nor data are part of what is measured
    if system != "influence_pipeline":
        importlib.import_module(others.MODULES.get(system, system))
    with tempfile.TemporaryDirectory(prefix="peers_") as folder:
        began, seconds = time.perf_counter(), []
        for _, _ in zip(range(sets), SYSTEMS[system](samples, Path(folder)), strict=False):
            seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


# ---- the program around them ----------------------------------------------------------------------------------------


def measured(python: Path, system: str, samples: int, sets: int, limit: float) -> list[float] | str:
    """Return the seconds after each test set; or what went wrong."""
    found: list[float] | str = others.ask(python, __file__, ["--child", system, samples, sets], limit)
    return found


def plots(python: Path, folder: Path, found: dict[str, list[float]], by_size: dict[str, dict[int, float]]) -> None:
    """Draw time against test samples and against training samples."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = folder / "peers.json"
    figures.write_text(json.dumps({"tests": TESTS, "by_set": found, "by_size": by_size}, indent=2))
    subprocess.run([str(python), __file__, "--draw", str(figures)], check=True)


def draw(figures: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    told = json.loads(figures.read_text())
    lines = {
        ("test samples", "tests"): {
            system: [(told["tests"] * (i + 1), s) for i, s in enumerate(seconds)]
            for system, seconds in told["by_set"].items()
        },
        ("training samples", "samples"): {
            system: sorted((int(samples), s) for samples, s in sizes.items())
            for system, sizes in told["by_size"].items()
        },
    }
    for (axis, name), systems in lines.items():
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for system, points in systems.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=system)
        axes.set(xlabel=axis, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(figures.parent / f"{name}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="training samples of the table")
    parser.add_argument("--only", action="append", choices=SYSTEMS, help="systems")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw time against test and training samples")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="training samples of the second plot")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one system and size")
    parser.add_argument("--child", nargs=3, metavar=("SYSTEM", "SAMPLES", "SETS"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], *map(int, options.child[1:]))
        return
    if options.draw:
        draw(options.draw)
        return

    python, failed = others.install()
    print(f"N = {options.samples}, T = {TESTS} for each test set; seconds")
    print(
        "| system             | first | second |   ten | note |\n| ------------------ | ----- | ------ | ----- | ---- |"
    )
    found: dict[str, list[float]] = {}
    for system in options.only or SYSTEMS:
        if system in failed or "torch" in failed:
            seconds: list[float] | str = f"not installed: {failed.get(system) or failed['torch']}"
        else:
            seconds = measured(python, system, options.samples, SETS, options.limit)
        if isinstance(seconds, str):
            cells = ("–", "–", "–", seconds)
        else:
            found[system] = seconds
            cells = (*(f"{s:.2f}" for s in (seconds[0], seconds[1] - seconds[0], seconds[-1])), "")
        print(f"| {system:<18} | {cells[0]:>5} | {cells[1]:>6} | {cells[2]:>5} | {cells[3]} |", flush=True)
    if options.plots:
        by_size: dict[str, dict[int, float]] = {system: {} for system in found}
        for system in found:
            for samples in sorted(options.sizes):
                seconds = measured(python, system, samples, 1, options.limit)
                if isinstance(seconds, str):
                    print(f"left out of the second plot: {system} at N = {samples} and above: {seconds}", flush=True)
                    break
                by_size[system][samples] = seconds[0]
        plots(python, options.plots, found, {system: sizes for system, sizes in by_size.items() if sizes})


if __name__ == "__main__":
    main()
