"""``influence``: products with cached gradients, against the same from float32 on disk and in memory."""

from __future__ import annotations

import functools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import workload
from common import MOST_RESIDENT, Bench, Row, Side, alternate, evict
from torch import Tensor

import influence_pipeline as ip

SLOW_DISK = 1.0
"""GB/s below which a cache must be faster than raw float32."""
BAND = 1024


@dataclass(frozen=True)
class Scene:
    """Cached gradients and solutions, and the same gradients as a raw file.

    Attributes:
        pipeline: with test sets "few" of 8 and "many" of 64, solved for.
        raw: all gradients, float32.
        shape: (N, D).
        disk: what the disk delivers of the raw file, GB/s.
        zeros: share of zeros among the gradients.
    """

    pipeline: ip.Pipeline
    raw: Path
    shape: tuple[int, int]
    disk: float
    zeros: float

    @property
    def gigabytes(self) -> float:
        """The size of all gradients as float32."""
        return 4e-9 * self.shape[0] * self.shape[1]

    def vectors(self, tests: str) -> Tensor:
        """Return S."""
        group = next(g for g in self.pipeline.cache.groups("s_test") if g.attributes["tests"] == tests)
        return torch.from_numpy(np.asarray(group.rows("vectors")[:, :]))

    def forget(self) -> None:
        """Remove all scores."""
        shutil.rmtree(self.pipeline.cache.path / "influence", ignore_errors=True)


@functools.cache
def scene(bench: Bench) -> Scene:
    """Compute gradients once for all rows."""
    samples = bench.size(12288, 64)
    experiment = workload.experiment(samples, {"few": 8, "many": bench.size(64, 16)})
    pipeline = ip.Pipeline(experiment, bench.fresh("influence"), workload.settings())
    pipeline.grad_z()
    for name in pipeline.tests:
        pipeline.s_test(name)
    gradients = next(pipeline.cache.groups("grad_z")).rows("gradients")
    raw, zeros = bench.folder / "gradients.float32", 0
    with raw.open("wb") as file:
        for start in range(0, samples, BAND):
            part = np.asarray(gradients[start : min(start + BAND, samples), :])
            zeros += part.size - np.count_nonzero(part)
            part.tofile(file)
    share = zeros / (samples * gradients.shape[1])
    return Scene(pipeline, raw, (samples, gradients.shape[1]), disk_rate(bench, raw), share)


def disk_rate(bench: Bench, path: Path) -> float:
    """Return what the disk delivers of a file from its beginning to its end, GB/s."""
    rates, buffer = [], bytearray(2**23)
    for _ in range(bench.size(3, 1)):
        evict(path)
        began = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        rates.append(1e-9 * path.stat().st_size / (time.perf_counter() - began))
    return float(np.median(rates))


def cold(bench: Bench, name: str, tests: str, bar: float) -> Row:
    """Measure with nothing of G in the page cache."""
    at, stayed = scene(bench), []
    vectors, cached = at.vectors(tests), at.pipeline.cache.path / "grad_z"

    def prepare_ours() -> None:
        at.forget()
        stayed.append(evict(cached))

    def mapped() -> Tensor:
        gradients = torch.from_numpy(np.memmap(at.raw, np.float32, "c", shape=at.shape))
        return torch.cat([vectors @ part.T for part in gradients.split(BAND)], 1)

    ours = Side(lambda: at.pipeline.influence(tests), prepare_ours)
    theirs = Side(mapped, lambda: stayed.append(evict(at.raw)))
    found = alternate(bench, ours, theirs)
    rates = " against ".join(f"{at.gigabytes / seconds:.2f}" for seconds in found)
    evicted = f"{max(stayed):.0%} of pages stayed cached" + (": not cold" if max(stayed) > MOST_RESIDENT else "")
    return Row(
        *(name, f"influence, cold, T = {len(vectors)}, {at.gigabytes:.2f} GB as float32", "raw memmap and product"),
        *(*found, "s", bar if at.disk < SLOW_DISK else None),
        note=f"{rates} GB/s; disk reads {at.disk:.2f} GB/s; {evicted}; {at.zeros:.0%} zeros",
    )


def warm(bench: Bench) -> Row:
    at = scene(bench)
    vectors = at.vectors("many")
    gradients = torch.from_numpy(np.fromfile(at.raw, np.float32).reshape(at.shape))
    expected = vectors @ gradients.T / at.shape[0]
    at.forget()
    scores = torch.from_numpy(np.asarray(at.pipeline.influence("many").scores[...]))
    off = float((scores - expected).norm() / expected.norm())
    assert off < 1e-5, f"scores are {off:.1%} off"
    ours = Side(lambda: at.pipeline.influence("many"), at.forget)
    found = alternate(bench, ours, Side(lambda: vectors @ gradients.T))
    rates = " against ".join(f"{at.gigabytes / seconds:.2f}" for seconds in found)
    return Row(
        *("influence_warm", f"influence, warm, T = {len(vectors)}, {at.gigabytes:.2f} GB as float32"),
        *("product of float32 in memory", *found, "s", 0.7),
        note=f"{rates} GB/s",
    )


ROWS = {
    "influence_cold_8": lambda bench: cold(bench, "influence_cold_8", "few", 4),
    "influence_cold_64": lambda bench: cold(bench, "influence_cold_64", "many", 2.5),
    "influence_warm": warm,
}
