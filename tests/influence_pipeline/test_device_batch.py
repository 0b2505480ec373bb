"""The device batch: chosen so that what the model keeps fits, recorded with each block, found again by the next run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_pipeline as ip
from influence_pipeline.context import Context
from stages import work
from tests import tiny

Make = Callable[..., ip.Pipeline]


class Small(ip.Classification):
    """A task on a machine that has memory for few samples only."""

    _most = 1000

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > Small._most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().outputs(model, batch)


def recorded(cache: Path, stage: str) -> list[Any]:
    """Return the batches that blocks were computed with."""
    [path] = cache.glob(f"{stage}/*/batch")
    found: list[Any] = zarr.open_array(path, mode="r")[...].tolist()
    return found


def test_a_batch_that_was_halved_is_recorded_and_used_again(
    make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = {"solver": "cg", "damping": 0.1}
    monkeypatch.setattr(Small, "_most", 5)
    pipeline = make(s_test=solver, task=Small(0.01))
    pipeline.run()
    kept = tiny.files(cache)
    assert recorded(cache, "grad_z") == [4] * 4
    assert recorded(cache, "s_test") == [[4, 4]] * 3
    monkeypatch.setattr(Small, "_most", 1000)
    for stage in ("grad_z", "s_test"):
        [path] = cache.glob(f"{stage}/*/blocks/c/1")
        shutil.rmtree(path)
    make(s_test=solver, task=Small(0.01)).run()
    assert tiny.files(cache) == kept


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 16, 16, generator=generator), torch.arange(count) % 3)


def convolutional() -> nn.Module:
    """Make a network of few parameters whose forward pass keeps about 70 KiB of each sample."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def test_what_the_model_keeps_of_a_batch_bounds_it(make: Make) -> None:
    def batch(**runtime: Any) -> int:
        images_ = {"train": images(64), "tests": {"few": images(4)}}
        pipeline = make(model=convolutional, runtime=runtime, **images_)
        held = pipeline.plan()["grad_z"].memory_bytes
        context = Context(pipeline.experiment, pipeline.settings)
        found = context.batch_within("gradients", context.memory)
        assert min(found, tiny.ROWS) * 64 * 16 * 16 * 4 < held
        return found

    assert batch() == 256
    assert batch(memory="64 MiB") == 32
    assert batch(device_memory="4 MiB") == 8
    with pytest.raises(ip.RequestError, match=r"one sample takes up to .* runtime\.device_memory is 100 KiB: raise it"):
        batch(device_memory="100 KiB")
    with pytest.raises(ip.RequestError, match=r"grad_z: a block of gradients .* needs .*; runtime\.memory is 256 KiB"):
        batch(memory="256 KiB")


def test_nothing_is_counted_where_nothing_is_to_be_computed(
    done: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "count", None)
    make().run()
    assert {plan.memory_bytes for plan in make().plan().stages} == {0}
