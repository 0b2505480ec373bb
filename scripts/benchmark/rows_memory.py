"""Memory: the peak of a whole run must not grow with the number of training samples, and be what was predicted.

As a program, ``python rows_memory.py FOLDER SAMPLES`` makes such a run and prints its peak; ``FOLDER wide UNITS``
prints the peak of gradients with many coordinates, and what the plan says of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from common import Bench, Row

from influence_pipeline.peak import peak


def whole(folder: Path, samples: int) -> int:
    """Run all stages; return the peak of the bytes in memory above what model, data and libraries take."""
    import torch
    import workload

    import influence_pipeline as ip

    torch.manual_seed(0)
    model = workload.fitted(workload.small_cnn(8, 16), *workload.images(workload.DISTINCT), workload.STEPS // 4)
    experiment = workload.experiment(samples, {"holdout": 64}, model)
    pipeline = ip.Pipeline(experiment, folder, workload.settings(influence={"top_k": min(100, samples)}))
    pipeline.plan()
    with peak() as held:
        pipeline.run()
    return held()


def wide_peak(folder: Path, units: int) -> tuple[int, int]:
    """Compute gradients of a layer with 103 coordinates for each unit; return their peak and the prediction."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import influence_pipeline as ip

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 100), torch.arange(8) % 2)
    model = nn.Sequential(nn.Linear(100, units), nn.Tanh(), nn.Linear(units, 2)).eval()
    settings = {"s_test": {"solver": "identity"}, "runtime": {"device": "cpu", "progress": False, "memory": "1 GiB"}}
    experiment = ip.Experiment(model, ip.Classification(), data, {"few": data})
    pipeline = ip.Pipeline(experiment, folder, ip.Settings(**settings))
    predicted = pipeline.plan("few")["grad_z"].memory_bytes
    with peak() as held:
        pipeline.grad_z()
    return held(), predicted


def in_child(bench: Bench, *what: str) -> list[int]:
    """Return the figures of a process of its own."""
    command = [sys.executable, __file__, str(bench.fresh("memory")), *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    bench.fresh("memory")
    return [int(figure) for figure in done.stdout.split()]


def memory(bench: Bench) -> Row:
    few, many = bench.size((4096, 65536), (64, 128))
    peaks: dict[int, list[int]] = {many: [], few: []}
    for _ in range(bench.repeats):
        for samples, found in peaks.items():
            found += in_child(bench, str(samples))
    ours, theirs = (statistics.median(found) / 2**20 for found in peaks.values())
    return Row(
        *("memory", f"peak memory of a run, N = {many}", f"N = {few}", ours, theirs, "MiB", 1.1, True),
        note="above model, data and libraries; small CNN of half the width; solver identity",
    )


def wide(bench: Bench) -> Row:
    units = bench.size(200_000, 2_000)
    peaks, predicted = zip(*(in_child(bench, "wide", str(units)) for _ in range(bench.repeats)), strict=True)
    return Row(
        *("wide", f"peak memory of grad_z, D = {103 * units + 2}", "as predicted"),
        *(statistics.median(peaks) / 2**20, predicted[0] / 2**20, "MiB", 1.2, True),
        note="above model, data and libraries; a perceptron, 8 samples, memory = 1 GiB",
    )


ROWS = {"memory": memory, "wide": wide}

if __name__ == "__main__":
    folder, *what = sys.argv[1:]
    print(*(wide_peak(Path(folder), int(what[1])) if what[0] == "wide" else [whole(Path(folder), int(what[0]))]))
