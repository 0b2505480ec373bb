"""What a run is predicted to hold, against what it does hold: in a process of its own, whose peak counts nothing else.

As a program, ``python test_memory.py FOLDER`` solves for some test samples and prints the peak and the prediction.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import influence_pipeline as ip

CLEAR = Path("/proc/self/clear_refs")


def pipeline(folder: Path, tests: int) -> ip.Pipeline:
    """Make a pipeline of a convolutional network for images of 8 × 8, of 38,282 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1))
    model.extend([nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)])
    data = TensorDataset(torch.randn(128, 1, 8, 8), torch.arange(128) % 10)
    experiment = ip.Experiment(model.eval(), ip.Classification(), data, {"few": TensorDataset(*data[:tests])})
    solver = {"solver": "cg", "damping": 1.0, "tolerance": 0.5}
    return ip.Pipeline(experiment, folder, ip.Settings(s_test=solver, runtime={"device": "cpu", "progress": False}))


def resident(name: str) -> int:
    """Return the bytes of this process in memory: now (``VmRSS``), or at most so far (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path) -> tuple[int, int]:
    """Return the peak of solving above what libraries, model and data take; and what the plan says."""
    pipeline(folder / "first", 1).s_test("few")  # so that libraries have what they keep
    wanted = pipeline(folder / "wanted", 64)
    predicted = wanted.plan("few")["s_test"].memory_bytes
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be had again
    before = resident("VmRSS")
    CLEAR.write_text("5")  # VmHWM begins again at VmRSS
    wanted.s_test("few")
    return resident("VmHWM") - before, predicted


@pytest.mark.skipif(
    not (os.access(CLEAR, os.W_OK) and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="no peak of memory to be asked for here",
)
def test_solving_holds_what_the_plan_says(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(ip.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
    peak, predicted = map(int, done.stdout.split())
    assert 0.5 * predicted < peak < 1.2 * predicted


if __name__ == "__main__":
    print(*measure(Path(sys.argv[1])))
