"""Memory: the peak of a whole run must not grow with the number of training samples.

As a program, ``python rows_memory.py FOLDER SAMPLES`` makes such a run and prints its peak.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from common import Bench, Row


def resident(name: str) -> int:
    """Return the bytes of this process in memory: now (``VmRSS``), or at most so far (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak(folder: Path, samples: int) -> int:
    """Run all stages; return the peak of the bytes in memory above what model, data and libraries take."""
    import torch
    import workload

    import influence_pipeline as ip

    torch.manual_seed(0)
    model = workload.fitted(workload.small_cnn(8, 16), *workload.images(workload.DISTINCT), 50)
    experiment = workload.experiment(samples, {"holdout": 64}, model)
    pipeline = ip.Pipeline(experiment, folder, workload.settings(influence={"top_k": 100}))
    pipeline.plan()
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
    pipeline.run()
    return resident("VmHWM") - base


def in_child(bench: Bench, samples: int) -> int:
    """Return the peak of a process of its own."""
    command = [sys.executable, __file__, str(bench.fresh("memory")), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    bench.fresh("memory")
    return int(done.stdout)


def memory(bench: Bench) -> Row:
    few, many = bench.size((4096, 65536), (1024, 2048))
    peaks: dict[int, list[int]] = {many: [], few: []}
    for _ in range(bench.repeats):
        for samples, found in peaks.items():
            found.append(in_child(bench, samples))
    ours, theirs = (statistics.median(found) / 2**20 for found in peaks.values())
    return Row(
        *("memory", f"peak memory of a run, N = {many}", f"N = {few}", ours, theirs, "MiB", 1.1, True),
        note="above model, data and libraries; small CNN of half the width; solver identity",
    )


ROWS = {"memory": memory}

if __name__ == "__main__":
    print(peak(Path(sys.argv[1]), int(sys.argv[2])))
