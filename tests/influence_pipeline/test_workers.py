"""Worker processes are started by what joblib knows under a name; each has a GPU of its own where there are some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import joblib
import pytest
import torch
from joblib._parallel_backends import LokyBackend

import influence_pipeline as ip
from influence_pipeline.engines import worker
from tests import tiny

Make = Callable[..., ip.Pipeline]


@pytest.mark.parametrize("backend", ["threading", "sequential", "multiprocessing"])
def test_backends_without_processes_of_their_own_are_refused(backend: str) -> None:
    with pytest.raises(ip.RequestError, match=r"runtime.backend: .*does not start processes"):
        tiny.settings(runtime={"backend": backend})


def test_an_unknown_backend_is_refused_when_it_is_used(make: Make) -> None:
    with pytest.raises(ip.RequestError, match=r"runtime.backend = 'lokey' cannot be used"):
        make(runtime={"backend": "lokey", "workers": 2}).run()


def test_a_backend_that_was_registered_does_the_work(make: Make, cache: Path, finished: Path) -> None:
    started: list[int] = []

    class Counted(LokyBackend):
        def configure(self, n_jobs: int = 1, **options: object) -> int:
            started.append(n_jobs)
            return int(super().configure(n_jobs, **options))

    joblib.register_parallel_backend("counted", Counted)
    make(runtime={"backend": "counted", "workers": 2}).run()
    assert set(started) == {2}
    assert tiny.files(cache) == tiny.files(finished)


def test_each_worker_has_a_gpu_of_its_own_and_any_further_one_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for _ in range(3):
        worker.take_gpu(tmp_path)
    assert chosen == [0, 1]
