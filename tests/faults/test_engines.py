"""Clusters: what dies, hangs or joins late costs a block at most, and what comes out is what this machine makes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import EXPERIMENT, SETTINGS
from tests.faults import clusters
from tests.faults.children import Child, Server
from tests.faults.clusters import DaskCluster
from tests.faults.kills import left_over

EXPIRY = 3.0
"""Seconds without a sign of life after which a worker counts for nothing, in these tests."""
STAGES = ("grad_z", "curvature", "s_test", "influence")
EXACT = tiny.solved_by(SETTINGS, solver="exact", damping=0.1)


@pytest.fixture(scope="module")
def dask(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    with clusters.dask_cluster(server, tmp_path_factory.mktemp("dask") / "gates", EXPIRY) as found:
        yield found


@pytest.fixture(scope="module")
def local(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that this machine alone makes."""
    folder = tmp_path_factory.mktemp("local")
    alone = run(server, project_in(folder))
    assert alone.wait() == 0, alone.said
    return tiny.files(folder / "runs")


def project_in(folder: Path, **runtime: object) -> Path:
    """Write a project and its settings file."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.py").write_text(EXPERIMENT)
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in runtime.items()]
    (folder / "settings.toml").write_text(EXACT + "".join(lines))
    return folder / "settings.toml"


def run(server: Server, settings: Path) -> Child:
    return server.start("tests.faults.clusters:command", arguments=["run", settings], expiry=EXPIRY)


def test_in_each_stage_a_worker_is_killed_and_another_stopped(
    dask: DaskCluster, server: Server, local: dict[str, bytes], tmp_path: Path
) -> None:
    settings = project_in(tmp_path / "a folder", backend="dask", address=dask.address)
    dask.close(*STAGES)
    running = run(server, settings)
    stopped: Child | None = None
    for stage in STAGES:
        dask.holding(stage, 1, running)
        if stopped is not None:  # its block of the stage before was computed by another
            stopped.signal(signal.SIGCONT)
        killed, stopped, *_ = dask.holding(stage, 2, running)
        stopped.signal(signal.SIGSTOP)
        killed.killed()
        dask.workers.remove(killed)
        dask.start()
        dask.open(stage)
    assert running.wait() == 0, running.said
    stopped.signal(signal.SIGCONT)
    assert tiny.files(settings.parent / "runs") == local
    assert left_over(settings.parent / "runs") == []
