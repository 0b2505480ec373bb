"""The machine: what a second worker brings, and what being interrupted costs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import workload
from common import Bench, Row, Side, alternate
from joblib.externals.loky import get_reusable_executor

import influence_pipeline as ip
from influence_pipeline import plan


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with as many threads as each of two workers has: one, on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def small_blocks(name: str, rows: int) -> Iterator[None]:
    """Lay out new caches with blocks of so many rows; ``name`` is that of a limit in ``plan``."""
    before = getattr(plan, name)
    setattr(plan, name, rows)
    try:
        yield
    finally:
        setattr(plan, name, before)


def both_stages(bench: Bench, workers: int) -> Side:
    """Return what computes gradients and solutions anew."""
    solver = {"solver": "cg", "damping": 50.0, "sample": bench.size(32, 4)}
    settings = workload.settings(s_test=solver, runtime={"workers": workers})
    experiment = workload.experiment(bench.size(8192, 64), {"holdout": 8 * bench.size(8, 2)})
    pipeline = None

    def prepare() -> None:
        nonlocal pipeline
        cache = bench.fresh(f"workers_{workers}")
        os.sync()
        pipeline = ip.Pipeline(experiment, cache, settings)

    def run() -> None:
        pipeline.grad_z()
        pipeline.s_test("holdout")

    return Side(run, prepare)


def two_workers(bench: Bench) -> Row:
    rows = bench.size(plan.MOST_ROWS, 32)  # several blocks, however few samples there are
    with one_thread(), small_blocks("MOST_TESTS", 8), small_blocks("MOST_ROWS", rows):
        two, one = alternate(bench, both_stages(bench, 2), both_stages(bench, 1))
    get_reusable_executor().shutdown(wait=True)
    threads = max(1, (os.cpu_count() or 1) // 2)
    return Row(
        *("two_workers", f"grad_z and s_test, 2 workers, {threads} thread{'s' * (threads > 1)} each", "1 worker"),
        *(two, one, "s", 1.7),
    )


class Interrupting(workload.Repeated):
    """A data set at some of whose samples somebody presses Ctrl-C, once."""

    at: set[int]

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sample, or be interrupted."""
        if position in self.at:
            self.at.remove(position)
            raise KeyboardInterrupt
        return super().__getitem__(position)


BLOCK = 16
INTERRUPTIONS = 5


def blocks(bench: Bench) -> int:
    """Return how many blocks there are."""
    return bench.size(1000, 10)


def resumed(bench: Bench, interruptions: int) -> Side:
    """Return what computes gradients in many small blocks, going on after every interruption."""
    samples = BLOCK * blocks(bench)
    data = Interrupting(*workload.images(workload.DISTINCT), samples)
    experiment = ip.Experiment(workload.trained_cnn(), workload.TASK, data, {})
    cache = bench.folder / f"resumed_{interruptions}"

    def prepare() -> None:
        bench.fresh(cache.name)
        os.sync()
        data.at = {samples * (i + 1) // (interruptions + 1) + 5 for i in range(interruptions)}

    def run() -> None:
        for _ in range(interruptions):
            with contextlib.suppress(KeyboardInterrupt):
                ip.Pipeline(experiment, cache, workload.settings()).grad_z()
        outcome = ip.Pipeline(experiment, cache, workload.settings()).grad_z()
        assert not data.at
        assert outcome.computed < outcome.total or not interruptions

    return Side(run, prepare)


def resume(bench: Bench) -> Row:
    with small_blocks("MOST_ROWS", BLOCK):
        often, once = alternate(bench, resumed(bench, INTERRUPTIONS), resumed(bench, 0))
    return Row(
        *("resume", f"grad_z of {blocks(bench)} blocks, interrupted {INTERRUPTIONS} times", "not interrupted"),
        *(often, once, "s", 1.02, True),
    )


ROWS = {"two_workers": two_workers, "resume": resume}
