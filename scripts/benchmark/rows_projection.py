"""Projected gradients: what scores keep by them, what they cost, and that models of real size fit the memory.

As a program, ``python rows_projection.py FOLDER SAMPLES DIM WIDTH`` (with the checkout on ``PYTHONPATH``) makes a run
of a ResNet-18 and prints its peak of memory; 0 for DIM keeps the gradients of all parameters, 11 million for the usual
WIDTH of 64.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import workload
from common import Bench, Row, Side, alternate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import influence_pipeline as ip
from influence_pipeline.peak import peak
from scripts.resnet import ResNet18
from stages.grad_z.fidelity import spearman

DIM = 4096
DAMPING = 0.1
MEMORY = 2 * 2**30
WIDTH = 64
"""Channels of a ResNet-18 in the first of its four layers."""


def scores(bench: Bench, projection: dict[str, object] | None, solver: dict[str, object]) -> np.ndarray:
    """Return the scores of the small CNN (T, N)."""
    samples, tests = bench.size((512, 32), (32, 2))
    sections = {"grad_z": {"projection": projection}, "s_test": solver}
    cache = bench.folder / f"scores_{projection and projection['kind']}"
    pipeline = ip.Pipeline(workload.experiment(samples, {"holdout": tests}), cache, workload.settings(**sections))
    return pipeline.run()["holdout"].scores[...]


def kept(bench: Bench, name: str, solver: dict[str, object], bar: float) -> Row:
    """Return how alike the order of scores is, for each test sample; kinds other than "kronecker" beside it."""
    exact, found = scores(bench, None, solver), {}
    for kind in ("kronecker", "sparse"):
        projected = scores(bench, {"kind": kind, "dim": bench.size(DIM, 256)}, solver)
        found[kind] = [spearman(*pair) for pair in zip(projected, exact, strict=True)]
    means = {kind: float(np.mean(values)) for kind, values in found.items()}
    least = {kind: f"least test {min(values):.3f}" for kind, values in found.items()}
    return Row(
        *(name, f"Spearman of scores by test, {solver}, small CNN projected to {DIM}", "not projected"),
        *(1.0, means["kronecker"], "", bar),
        note=f"{least['kronecker']}; sparse {means['sparse']:.3f}, {least['sparse']}",
    )


def identity(bench: Bench) -> Row:
    return kept(bench, "projection_identity", {"solver": "identity"}, 0.97)


def ggn(bench: Bench) -> Row:
    solver = {"solver": "cg", "curvature": "ggn", "damping": DAMPING, "tolerance": bench.size(1e-3, 0.3)}
    return kept(bench, "projection_ggn", solver, 0.92)


def passes(model: nn.Module, data: TensorDataset) -> Side:
    """Return a plain forward and backward pass over some data."""
    parameters = list(model.parameters())

    def run() -> None:
        for inputs, labels in DataLoader(data, batch_size=64):
            torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), parameters)

    return Side(run)


def projected(bench: Bench, model: nn.Module, data: TensorDataset) -> Side:
    """Return what computes and keeps projected gradients of the same data."""
    pipeline = None

    def prepare() -> None:
        nonlocal pipeline
        settings = workload.settings(grad_z={"projection": {"dim": bench.size(DIM, 256)}})
        pipeline = ip.Pipeline(ip.Experiment(model, workload.TASK, data, {}), bench.fresh("projected"), settings)

    return Side(lambda: pipeline.grad_z(), prepare)


def resnet(width: int = WIDTH) -> nn.Module:
    """Return a ResNet-18 with random weights whose normalisation is that of the data."""
    torch.manual_seed(0)
    model = ResNet18(width=width)
    with torch.no_grad():
        for part in workload.images(256, 3, 16)[0].split(64):
            model(part)
    return model.eval()


def cost(bench: Bench) -> Row:
    count = bench.size(512, 16)
    data = TensorDataset(*workload.images(count, 3, bench.size(32, 16)))
    model = resnet(bench.size(WIDTH, 4))
    ours, theirs = alternate(bench, projected(bench, model, data), passes(model, data))
    small = TensorDataset(*workload.images(bench.size(4096, 64)))
    of_small = alternate(bench, projected(bench, workload.trained_cnn(), small), passes(workload.trained_cnn(), small))
    return Row(
        *("projection_cost", f"grad_z of a ResNet-18, projected to {DIM} and stored, N = {count}"),
        *("a forward and backward pass", ours, theirs, "s", 1.5, True),
        note=f"small CNN: {of_small[0] / of_small[1]:.2g}x",
    )


def run_of_resnet(folder: Path, samples: int, dim: int, width: int) -> dict[str, int]:
    """Run all stages; return the peak of the bytes in memory above model, data and libraries, bytes and files."""
    inputs, labels = workload.images(512, 3, 16)
    experiment = ip.Experiment(
        *(resnet(width), workload.TASK, workload.Repeated(inputs, labels, samples)),
        {"holdout": TensorDataset(inputs[:8] + 0.01, labels[:8])},
    )
    sections = {
        "grad_z": {"projection": {"dim": dim} if dim else None},
        "s_test": {"solver": "cg", "damping": 1.0, "sample": min(32, samples), "max_iterations": 5, "tolerance": 0.1},
        "influence": {"top_k": min(100, samples)},
        "runtime": {"memory": MEMORY},
    }
    pipeline = ip.Pipeline(experiment, folder, workload.settings(**sections))
    with peak() as held:
        pipeline.run()
    files = [path for path in (folder / "grad_z").rglob("*") if path.is_file()]
    return {"peak": held(), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def within(bench: Bench, name: str, samples: int, dim: int) -> Row:
    """Return the peak of memory against what was given."""
    command = [sys.executable, __file__, str(bench.fresh("resnet")), str(samples), str(dim)]
    command.append(str(bench.size(WIDTH, 4)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    bench.fresh("resnet")
    found = json.loads(done.stdout)
    return Row(
        *(
            name,
            f"peak memory of a run of a ResNet-18, D = {dim or 11_173_962}, N = {samples}, T = 8",
            "runtime.memory",
        ),
        *(found["peak"] / 2**20, MEMORY / 2**20, "MiB", 1.0, True),
        note=f"gradients: {found['files']} files, {found['bytes'] / 2**30:.2f} GiB",
    )


def whole_resnet(bench: Bench) -> Row:
    return within(bench, "resnet_memory", bench.size(512, 8), 0)


def projected_resnet(bench: Bench) -> Row:
    return within(bench, "projected_memory", bench.size(20_000, 16), bench.size(DIM, 256))


ROWS = {
    "projection_identity": identity,
    "projection_ggn": ggn,
    "projection_cost": cost,
    "resnet_memory": whole_resnet,
    "projected_memory": projected_resnet,
}

if __name__ == "__main__":
    print(json.dumps(run_of_resnet(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
