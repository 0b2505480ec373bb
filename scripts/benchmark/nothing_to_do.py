"""What a run costs that finds everything cached: seconds of run, plan, status and show over a finished cache.

    python scripts/benchmark/nothing_to_do.py [--samples 1000000] [--folder FOLDER]

The cache is of a linear model of 20 parameters; it is made once (some minutes for a million samples) and used again
where it is there.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

import influence_pipeline as ip  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Bench, Row  # noqa: E402

FEATURES, TESTS, TIMES = 19, 64, 5
SETTINGS = """\
experiment = "{script}:experiment"
cache = "cache"
[s_test]
sample = 4096
[runtime]
device = "cpu"
"""


def experiment() -> ip.Experiment:
    """Return a line through random points, and as many of them as the environment says."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, FEATURES, generator=generator)

    def points(count: int) -> TensorDataset:
        inputs = torch.randn(count, FEATURES, generator=generator)
        return TensorDataset(inputs, inputs @ weights.T + torch.randn(count, 1, generator=generator))

    def model() -> torch.nn.Module:
        made = torch.nn.Linear(FEATURES, 1)
        made.load_state_dict({"weight": weights, "bias": torch.zeros(1)})
        return made

    return ip.Experiment(model, ip.Regression(), points(int(os.environ["SAMPLES"])), {"holdout": points(TESTS)})


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_mib() -> float:
    """Return the most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def command(*words: str) -> float:
    """Return how long a command of the command line takes, in a process of its own."""
    module = (sys.executable, "-m", "influence_pipeline.cli")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return seconds(lambda: subprocess.run([*module, *words], check=True, capture_output=True, env=environment))


def prepared(samples: int, folder: Path) -> Path:
    """Return the settings file of so many samples, in a folder."""
    os.environ["SAMPLES"] = str(samples)
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "nothing_to_do.toml"
    text = SETTINGS.format(script=Path(__file__).resolve())
    settings.write_text(text.replace("4096", str(min(samples, 4096))))
    return settings


def row(bench: Bench) -> Row:
    """Compare a run of everything with one that finds it cached, beyond building the experiment."""
    samples = bench.size(10**6, 1000)
    settings = prepared(samples, bench.folder / "nothing_to_do")
    first = seconds(ip.Pipeline.from_toml(settings).run)
    found = []
    for _ in range(bench.repeats):
        pipeline = ip.Pipeline.from_toml(settings)
        pipeline.experiment  # noqa: B018 - builds it
        found.append(seconds(pipeline.run))
    median, most = statistics.median(found), 2.0
    note = f"{samples} samples, 20 parameters; a target of {most:g} s for a million; all of it took {first:.1f} s"
    return Row("nothing_to_do", "a run that finds all cached", "2 s", median, most, "s", 1.0, at_most=True, note=note)


ROWS = {"nothing_to_do": row}


def measure(samples: int, folder: Path) -> None:
    """Make the cache where it is not there, then time what finds it finished."""
    settings = prepared(samples, folder)
    print(f"{samples} samples; making sure that all is cached: {command('run', str(settings)):.1f} s")
    built, runs = [], []
    for _ in range(TIMES):
        pipeline = ip.Pipeline.from_toml(settings)
        built.append(seconds(lambda: pipeline.experiment))  # noqa: B023 - called at once
        before = peak_mib()
        runs.append(seconds(pipeline.run))
        print(f"  run {runs[-1]:.2f} s, peak memory {peak_mib() - before:+.0f} MiB")
    print(f"building the experiment   {statistics.median(built):.2f} s")
    print(f"run with nothing to do    {statistics.median(runs):.2f} s")
    plans = [seconds(ip.Pipeline.from_toml(settings).plan) for _ in range(TIMES)]
    print(f"plan, with the experiment {statistics.median(plans):.2f} s")
    for words in (("--help",), ("status", str(settings)), ("show", str(settings))):
        print(f"{words[0]:<25} {statistics.median(command(*words) for _ in range(TIMES)):.2f} s")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--folder", type=Path, help="where the cache is kept; a temporary folder where it is left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.samples, arguments.folder or Path(temporary))


if __name__ == "__main__":
    main()
