"""``grad_z``: gradients of the small CNN into a fresh cache, against a plain loop and against computing alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import workload
from common import Bench, Row, Side, alternate
from torch import Tensor
from torch.nn import functional

import influence_pipeline as ip
from influence_pipeline.context import Context
from stages.device_batch import DeviceBatch
from stages.grad_z import PerSample


class InMemory:
    """Samples as stages see them, with nothing between them and memory."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.inputs)

    def batch(self, ids: Sequence[int]) -> list[Tensor]:
        """Return the samples at these positions."""
        return [self.inputs[ids], self.labels[ids]]

    def batches(self, ids: Sequence[int], size: int) -> Iterator[list[Tensor]]:
        """Yield samples that follow one another, so many at a time."""
        for start in range(0, len(ids), size):
            part = slice(ids[start], ids[min(start + size, len(ids)) - 1] + 1)
            yield [self.inputs[part], self.labels[part]]


def stored(bench: Bench, samples: int) -> Side:
    """Return what computes and keeps all gradients, float16."""
    pipeline = None

    def prepare() -> None:
        nonlocal pipeline
        cache = bench.fresh("grad_z")
        os.sync()
        pipeline = ip.Pipeline(workload.experiment(samples, {}), cache, workload.settings())

    return Side(lambda: pipeline.grad_z(), prepare)


def one_at_a_time(bench: Bench, samples: int) -> Side:
    """Return what does so by autograd for one sample after another, each into a file of its own."""
    model, (inputs, labels) = workload.trained_cnn(), workload.images(workload.DISTINCT)
    parameters, folder = list(model.parameters()), bench.folder / "files"

    def prepare() -> None:
        bench.fresh("files").mkdir()
        os.sync()

    def run() -> None:
        for i in range(samples):
            loss = functional.cross_entropy(model(inputs[i : i + 1]), labels[i : i + 1])
            torch.save(torch.autograd.grad(loss, parameters), folder / f"{i}.grad_z")

    return Side(run, prepare)


def computed(samples: int) -> Side:
    """Return what computes all gradients and keeps none."""
    context = Context(workload.experiment(samples, {}), workload.settings())
    inputs, labels = workload.images(workload.DISTINCT)
    data = InMemory(inputs[:samples], labels[:samples])
    per_sample = PerSample(
        context.function, context.function.losses, data, DeviceBatch(context.batch_within("gradients", context.memory))
    )

    def run() -> None:
        with context.evaluating():
            for _ in per_sample.rows(range(samples)):
                pass

    return Side(run)


def against_loop(bench: Bench) -> Row:
    samples = bench.size(4096, 64)
    ours, theirs = alternate(bench, stored(bench, samples), one_at_a_time(bench, samples))
    bench.fresh("files")
    note = f"{samples / ours:.0f} against {samples / theirs:.0f} samples/s"
    return Row(
        *("grad_z_loop", f"grad_z stored, float16, small CNN, N = {samples}", "autograd and torch.save, one by one"),
        *(ours, theirs, "s", 8),
        note=note,
    )


def against_computing(bench: Bench) -> Row:
    samples = bench.size(4096, 64)
    ours, theirs = alternate(bench, stored(bench, samples), computed(samples))
    note = f"{samples / ours:.0f} against {samples / theirs:.0f} samples/s"
    return Row(
        *("grad_z_computing", f"grad_z stored, float16, small CNN, N = {samples}", "computed and thrown away"),
        *(ours, theirs, "s", 0.7),
        note=note,
    )


ROWS = {"grad_z_loop": against_loop, "grad_z_computing": against_computing}
