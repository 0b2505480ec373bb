"""One more test set: what a cache of gradients saves over computing them again, which is what others do."""

from __future__ import annotations

import shutil

import numpy as np
import torch
import workload
from common import Bench, Row, Side, alternate
from rows_grad_z import InMemory
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline.context import Context
from stages.device_batch import DeviceBatch
from stages.grad_z import PerSample


class LargerCnn(nn.Module):
    """A CNN of a million parameters for images of 3 × 32 × 32; gradients are kept of its two last layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(inputs))


def scores_of_head(model: LargerCnn, inputs: Tensor, labels: Tensor, vectors: Tensor, positions: Tensor) -> Tensor:
    """Return S Gᵀ with the gradients of both last layers computed anew: no backward pass through anything else."""
    first, _, last = model.head
    found = []
    with torch.inference_mode():
        for part in positions.split(256):
            features = model.body(inputs[part])
            hidden = first(features)
            active = hidden.relu()
            at_last = last(active).softmax(1) - functional.one_hot(labels[part], 10)
            at_first = (at_last @ last.weight) * (hidden > 0)
            weights = [torch.einsum("bo,bi->boi", *pair) for pair in ((at_first, features), (at_last, active))]
            gradients = torch.cat([weights[0].flatten(1), at_first, weights[1].flatten(1), at_last], 1)
            found.append(vectors @ gradients.T)
    return torch.cat(found, 1)


def solutions(pipeline: ip.Pipeline) -> Tensor:
    """Return S of the only test set."""
    return torch.from_numpy(np.asarray(next(pipeline.cache.groups("s_test")).rows("vectors")[:, :]))


def again(pipeline: ip.Pipeline) -> Side:
    """Return what scores a test set whose solutions are there."""

    def forget() -> None:
        shutil.rmtree(pipeline.cache.path / "influence", ignore_errors=True)

    return Side(lambda: pipeline.influence("further"), forget)


def small(bench: Bench) -> float:
    """Return the ratio on the small CNN, all of whose gradients are kept."""
    samples = bench.size(4096, 16)
    experiment = workload.experiment(samples, {"further": bench.size(64, 2)})
    pipeline = ip.Pipeline(experiment, bench.fresh("further_small"), workload.settings())
    pipeline.grad_z()
    pipeline.s_test("further")
    vectors, context = solutions(pipeline), Context(experiment, workload.settings())
    data = InMemory(*(tensor[:samples] for tensor in workload.images(workload.DISTINCT)))
    per_sample = PerSample(
        context.function, context.function.losses, data, DeviceBatch(context.batch_within("gradients", context.memory))
    )

    def recomputed() -> Tensor:
        with context.evaluating():
            return torch.cat([vectors @ rows.grads.T for rows in per_sample.rows(range(samples))], 1)

    ours, theirs = alternate(bench, again(pipeline), Side(recomputed))
    return theirs / ours


def further(bench: Bench) -> Row:
    samples, count = bench.size(20480, 16), bench.size(64, 2)
    torch.manual_seed(0)
    inputs, labels = workload.images(bench.size(1024, 16), 3, 32)
    model = workload.fitted(LargerCnn(), inputs, labels, bench.size(50, 1))
    experiment = ip.Experiment(
        *(model, workload.TASK, workload.Repeated(inputs, labels, samples)),
        {"further": TensorDataset(inputs[:count] + 0.01, labels[:count])},
    )
    settings = workload.settings(grad_z={"parameters": ["head.*"]})
    pipeline = ip.Pipeline(experiment, bench.fresh("further"), settings)
    pipeline.grad_z()
    pipeline.s_test("further")
    vectors, positions = solutions(pipeline), torch.arange(samples) % len(inputs)

    def recomputed() -> Tensor:
        return scores_of_head(model, inputs, labels, vectors, positions)

    scores, expected = torch.from_numpy(pipeline.influence("further").scores[...]), recomputed() / samples
    off = float((scores - expected).norm() / expected.norm())
    assert off < 1e-2, f"scores are {off:.1%} off"
    ours, theirs = alternate(bench, again(pipeline), Side(recomputed))
    parameters, dim = sum(p.numel() for p in model.parameters()), vectors.shape[1]
    return Row(
        *("further_tests", f"a further test set, T = {count}, N = {samples}, {parameters:.3g} parameters, D = {dim}"),
        *("last layers' gradients computed again", ours, theirs, "s", 10),
        note=f"small CNN, all gradients: {small(bench):.2g}x",
    )


ROWS = {"further_tests": further}
