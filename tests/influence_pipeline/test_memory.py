"""What a run is predicted to hold, against what it does hold: in a process of its own, whose peak counts nothing else.

As a program, ``python test_memory.py STAGE FOLDER`` computes a stage and prints the peak and the prediction.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline import peak as memory
from stages.device_batch import DeviceBatch
from stages.grad_z import PerSample
from stages.grad_z.choose import choosing_bytes
from tests.marks import thoroughly


def pipeline(folder: Path, tests: int) -> ip.Pipeline:
    """Make a pipeline of a convolutional network for images of 8 × 8, of 38,282 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1))
    model.extend([nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)])
    data = TensorDataset(torch.randn(128, 1, 8, 8), torch.arange(128) % 10)
    experiment = ip.Experiment(model.eval(), ip.Classification(), data, {"few": TensorDataset(*data[:tests])})
    solver = {"solver": "cg", "damping": 1.0, "tolerance": 0.5}
    return ip.Pipeline(experiment, folder, ip.Settings(s_test=solver, runtime={"device": "cpu", "progress": False}))


def wide(folder: Path, samples: int) -> ip.Pipeline:
    """Make a pipeline of a perceptron of 330,010 parameters, whose gradients take more than all around them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4400), nn.ReLU(), nn.Linear(4400, 10)).eval()
    data = TensorDataset(torch.randn(samples, 64), torch.arange(samples) % 10)
    experiment = ip.Experiment(model, ip.Classification(), data, {"few": TensorDataset(*data[: min(samples, 64)])})
    settings = ip.Settings(s_test={"solver": "identity"}, runtime={"device": "cpu", "progress": False})
    return ip.Pipeline(experiment, folder, settings)


def deep(folder: Path, samples: int) -> ip.Pipeline:
    """Make a pipeline of a convolutional network of 5,000 parameters, whose forward pass keeps 0.8 MiB of a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model.extend([nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)])
    data = TensorDataset(torch.randn(samples, 3, 64, 64), torch.arange(samples) % 10)
    settings = ip.Settings(runtime={"device": "cpu", "progress": False, "memory": "512 MiB"})
    return ip.Pipeline(ip.Experiment(model.eval(), ip.Classification(), data, {"few": data}), folder, settings)


def factored(folder: Path, samples: int, inputs: int = 1500) -> ip.Pipeline:
    """Make a pipeline of a perceptron whose Kronecker factors take more than all around them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 400), nn.ReLU(), nn.Linear(400, 10)).eval()
    data = TensorDataset(torch.randn(samples, inputs), torch.arange(samples) % 10)
    experiment = ip.Experiment(model, ip.Classification(), data, {"few": TensorDataset(*data[:16])})
    settings = ip.Settings(s_test={"solver": "ekfac"}, runtime={"device": "cpu", "progress": False})
    return ip.Pipeline(experiment, folder, settings)


class Table(nn.Module):
    """A mean of looked-up rows and a layer on it: of many parameters, a sample's gradient is nearly all zeros."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(rows, 100), nn.Linear(100, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(x).mean(1))


def table(folder: Path, rows: int, memory: str) -> ip.Pipeline:
    """Make a pipeline of a table of 100 columns."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, rows, (8, 5)), torch.arange(8) % 2)
    solver = {"solver": "cg", "max_iterations": 2, "tolerance": 0.9}
    runtime = {"device": "cpu", "progress": False, "memory": memory}
    experiment = ip.Experiment(Table(rows).eval(), ip.Classification(), data, {"few": TensorDataset(*data[:1])})
    return ip.Pipeline(experiment, folder, ip.Settings(s_test=solver, influence={"top_k": 1}, runtime=runtime))


def correcting(folder: Path, features: int) -> ip.Pipeline:
    """Make a pipeline of a softmax regression whose gradients are corrected, with H and the like prepared."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, features), torch.arange(256) % 10)
    solver, runtime = {"solver": "exact", "damping": 1.0}, {"device": "cpu", "progress": False}
    experiment = ip.Experiment(
        nn.Linear(features, 10).eval(), ip.Classification(), data, {"few": TensorDataset(*data[:1])}
    )
    settings = ip.Settings(s_test=solver, influence={"top_k": 1, "correction": "newton"}, runtime=runtime)
    made = ip.Pipeline(experiment, folder, settings)
    made.s_test("few")
    return made


def choosing(folder: Path, rows: int) -> tuple[int, int]:
    """Return the peak of finding out how gradients are computed, and what is predicted of it."""
    context = table(folder, rows, "2 GiB")._works.context
    function = context.function
    per_sample = PerSample(function, function.losses, context.train, DeviceBatch(1))
    with context.evaluating():
        return peak(per_sample.check), choosing_bytes(function)


def fisher(folder: Path, samples: int, **settings: object) -> ip.Pipeline:
    """Make a pipeline of a perceptron of 6,010 parameters, of many samples, solved by the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 10)).eval()
    data = TensorDataset(torch.randn(samples, 64), torch.arange(samples) % 10)
    experiment = ip.Experiment(model, ip.Classification(), data, {"few": TensorDataset(*data[: min(samples, 64)])})
    runtime = {"device": "cpu", "progress": False}
    return ip.Pipeline(experiment, folder, ip.Settings(s_test={"solver": "fisher", **settings}, runtime=runtime))


FISHER: dict[str, tuple[int, dict[str, object]]] = {"samples": (4096, {}), "rank": (4096, {"rank": 512})}
"""Training samples and settings of the forms that are solved; a dense matrix is held as ``exact`` does."""


def of_gradients(stage: str, form: str, folder: Path) -> tuple[int, int]:
    """Return the peak of what the gradients are solved by, or of solving; and what the plan says."""
    count, settings = FISHER[form]
    fisher(folder / "first", 300, **({"rank": 8} if settings else {})).run()  # so that libraries have what they keep
    wanted = fisher(folder / "wanted", count, **settings)
    wanted.grad_z()
    predicted = wanted.plan("few")[stage].memory_bytes
    prepared = wanted._works.curvature_place()
    if stage == "s_test":
        wanted._run(prepared)
    return peak(lambda: wanted._run(prepared) if stage == "curvature" else wanted.s_test("few")), predicted


def low_rank(stage: str, folder: Path) -> tuple[int, int]:
    """Return the peak of making a curvature of low rank of a perceptron, or of solving with it; and what is planned."""

    def made(name: str, rank: int) -> ip.Pipeline:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 10)).eval()
        data = TensorDataset(torch.randn(32, 64), torch.arange(32) % 10)
        experiment = ip.Experiment(model, ip.Classification(), data, {"few": TensorDataset(*data[:16])})
        settings = ip.Settings(s_test={"solver": "nystrom", "rank": rank}, runtime={"device": "cpu", "progress": False})
        return ip.Pipeline(experiment, folder / name, settings)

    made("first", 8).s_test("few")
    wanted = made("wanted", 192)
    predicted, prepared = wanted.plan("few")[stage].memory_bytes, wanted._works.curvature_place()
    if stage == "s_test":
        wanted._run(prepared)
    return peak(lambda: wanted._run(prepared) if stage == "curvature" else wanted.s_test("few")), predicted


KRONECKER = ("factors", "eigenvalues", "eigenbasis")


def measure(stage: str, folder: Path) -> tuple[int, int]:
    """Return the peak of a stage above what libraries, model and data take; and what the plan says."""
    if stage == "s_test":
        return solving(folder)
    if stage == "self_influence":
        return solving_for_samples(folder)
    if stage.startswith("nystrom"):
        return low_rank(stage.split()[1], folder)
    if stage.startswith("fisher"):
        return of_gradients(*stage.split()[1:], folder)
    if stage == "choosing":
        choosing(folder / "first", 100)
        return choosing(folder / "wanted", 120_000)
    if stage == "newton":
        correcting(folder / "first", 4).newton()
        wanted = correcting(folder / "wanted", 160)
        predicted = wanted.plan("few")["newton"].memory_bytes
        return peak(wanted.newton), predicted
    if stage == "probes":
        table(folder / "first", 100, "2 GiB").s_test("few")
        wanted = table(folder / "wanted", 40_000, "640 MiB")
        predicted = max(each.memory_bytes for each in wanted.plan("few").stages if each.stage == "curvature")
        return peak(lambda: wanted.s_test("few")), predicted
    if stage in KRONECKER:
        factored(folder / "first", 16, 20).s_test("few")
        wanted = factored(folder / "wanted", 1024)
        number = KRONECKER.index(stage)
        places, predicted = wanted._places(["few"])[1:4], wanted.plan("few").stages[1 + number].memory_bytes
        for place in places[:number]:
            wanted._run(place)
        return peak(lambda: wanted._run(places[number])), predicted
    if stage == "activations":
        deep(folder / "first", 4).grad_z()
        wanted = deep(folder / "wanted", 64)
        predicted = wanted.plan("few")["grad_z"].memory_bytes
        return peak(wanted.grad_z), predicted
    wide(folder / "first", 16).run()  # so that libraries have what they keep
    wanted = wide(folder / "wanted", 640)  # five blocks: more hold no more
    predicted = wanted.plan("few")[stage].memory_bytes
    if stage == "influence":
        wanted.grad_z()
        wanted.s_test("few")
    return peak(lambda: wanted.grad_z() if stage == "grad_z" else wanted.influence("few")), predicted


def peak(work: Callable[[], object]) -> int:
    """Return the bytes that some work held at most, above what was there before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be had again
    with memory.peak() as held:
        work()
    return held()


def solving(folder: Path) -> tuple[int, int]:
    """Return the peak of solving above what libraries, model and data take; and what the plan says."""
    pipeline(folder / "first", 1).s_test("few")  # so that libraries have what they keep
    wanted = pipeline(folder / "wanted", 64)
    predicted = wanted.plan("few")["s_test"].memory_bytes
    return peak(lambda: wanted.s_test("few")), predicted


def solving_for_samples(folder: Path) -> tuple[int, int]:
    """Return the same of solving for all training samples."""
    first, wanted = pipeline(folder / "first", 1), pipeline(folder / "wanted", 1)
    first.grad_z()
    first.self_influence()
    wanted.grad_z()
    predicted = wanted.plan("few", self_influence=True)["self_influence"].memory_bytes
    return peak(wanted.self_influence), predicted


@pytest.mark.skipif(
    not (os.access(memory.CLEAR, os.W_OK) and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="no peak of memory to be asked for here",
)
@pytest.mark.parametrize(
    "stage",
    [
        *("grad_z", "s_test", "influence"),
        *thoroughly([
            *("eigenvalues", "nystrom s_test", "activations", "choosing", "probes", "newton", "self_influence"),
            *(f"fisher {stage} {form}" for stage in ("curvature", "s_test") for form in FISHER),
            *("factors", "eigenbasis", "nystrom curvature"),
        ]),
    ],
)
def test_a_stage_holds_what_the_plan_says(tmp_path: Path, stage: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(ip.__file__).parents[1])}
    command = [sys.executable, __file__, stage, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
    found, predicted = map(int, done.stdout.split())
    assert 0.5 * predicted < found < 1.2 * predicted


if __name__ == "__main__":
    print(*measure(sys.argv[1], Path(sys.argv[2])))
