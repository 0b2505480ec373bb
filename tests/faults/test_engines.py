"""Clusters: what dies, hangs or joins late costs a block at most, and what comes out is what this machine makes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import EXPERIMENT, SETTINGS
from tests.faults.children import Child, Server
from tests.faults.clusters import COMES, DaskCluster, Gates, RayCluster, until
from tests.faults.kills import left_over

EXPIRY = 3.0
"""Seconds without a sign of life after which a worker counts for nothing, in these tests."""
STAGES = ("grad_z", "curvature", "s_test", "influence")
EXACT = tiny.solved_by(SETTINGS, solver="exact", damping=0.1)


@pytest.fixture(scope="module")
def dask(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    found = DaskCluster(server, tmp_path_factory.mktemp("dask"), EXPIRY)
    try:
        yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def local(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that this machine alone makes."""
    folder = tmp_path_factory.mktemp("local")
    alone = run(server, project_in(folder))
    assert (alone.wait(), alone.value) == (0, 0), alone.said
    return tiny.files(folder / "runs")


def project_in(folder: Path, experiment: str = EXPERIMENT, **runtime: object) -> Path:
    """Write a project and its settings file."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.py").write_text(experiment)
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in runtime.items()]
    (folder / "settings.toml").write_text(EXACT + "".join(lines))
    return folder / "settings.toml"


def run(server: Server, settings: Path) -> Child:
    order = {"arguments": ["run", settings], "expiry": EXPIRY}
    return server.start("tests.faults.clusters:command", hangs=COMES, **order)


def harmed(cluster: Gates, running: Child, *stages: str) -> None:
    """Kill a worker and stop another in the middle of each stage."""
    stopped = None
    for stage in stages:
        cluster.holding(stage, 1, running)
        if stopped is not None:  # its block of the stage before was computed by another
            os.kill(stopped, signal.SIGCONT)
        killed, stopped, *_ = cluster.holding(stage, 2, running)
        os.kill(stopped, signal.SIGSTOP)
        cluster.kill(killed)
        cluster.open(stage)
    assert (running.wait(), running.value) == (0, 0), running.said
    assert stopped is not None
    os.kill(stopped, signal.SIGCONT)


def test_in_each_stage_a_worker_of_dask_is_killed_and_another_stopped(
    dask: DaskCluster, server: Server, local: dict[str, bytes], tmp_path: Path
) -> None:
    settings = project_in(tmp_path / "a folder", backend="dask", address=dask.address)
    dask.close(*STAGES)
    harmed(dask, run(server, settings), *STAGES)
    assert tiny.files(settings.parent / "runs") == local
    assert left_over(settings.parent / "runs") == []


@pytest.mark.thorough
def test_in_each_stage_a_worker_of_ray_is_killed_and_another_stopped(
    server: Server, local: dict[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    cluster = RayCluster(server, tmp_path / "gates")
    try:
        experiment = EXPERIMENT.replace(
            "tiny.shrink_blocks()", f"clusters.work_at(Path({str(cluster.folder)!r}), {EXPIRY})"
        )
        experiment = f"from pathlib import Path\n\nfrom tests.faults import clusters\n{experiment}"
        settings = project_in(tmp_path, experiment, backend="ray", address=cluster.address, workers=3)
        cluster.close(*STAGES)
        harmed(cluster, run(server, settings), *STAGES)
    finally:
        cluster.end()
    assert tiny.files(tmp_path / "runs") == local
    assert left_over(tmp_path / "runs") == []


def test_ctrl_c_twice_takes_all_blocks_back_and_leaves_the_workers_to_the_next_run(
    dask: DaskCluster, server: Server, local: dict[str, bytes], tmp_path: Path
) -> None:
    settings = project_in(tmp_path, backend="dask", address=dask.address)
    cache = tmp_path / "runs"
    alive = [worker for worker in dask.workers if worker.exit is None]
    dask.close("grad_z")
    running = run(server, settings)
    dask.holding("grad_z", 2, running)
    running.signal(signal.SIGINT)
    running.signal(signal.SIGINT)
    assert (running.wait(), running.value) == (0, 130), running.said
    assert "Traceback" not in running.said
    assert list(cache.rglob("*.claim")) == []
    dask.open("grad_z")
    until(lambda: not left_over(cache))
    assert "grad_z" not in {stage for stage, *_ in tiny.blocks(cache)}
    again = run(server, settings)
    assert (again.wait(), again.value) == (0, 0), again.said
    assert all(worker.exit is None for worker in alive)
    assert tiny.files(cache) == local


def test_runs_share_a_cluster(dask: DaskCluster, server: Server, local: dict[str, bytes], tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "two"]
    running = [run(server, project_in(folder, backend="dask", address=dask.address)) for folder in folders]
    for one, folder in zip(running, folders, strict=True):
        assert (one.wait(), one.value) == (0, 0), one.said
        assert tiny.files(folder / "runs") == local


NEVER_THE_SAME = """\
from pathlib import Path

from tests import tiny

tiny.shrink_blocks()


def experiment():
    file = Path(__file__).with_name("loads")
    loads = len(file.read_text()) if file.exists() else 0
    file.write_text("." * (loads + 1))
    return tiny.experiment({changed})
"""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("model=lambda: tiny.model(loads)", "loaded other weights"),
        ("train=tiny.points(60, 1 + loads)", "changed|is not the one that the cached gradients are of"),
    ],
)
def test_workers_that_load_something_else_are_refused(
    dask: DaskCluster, server: Server, tmp_path: Path, changed: str, said: str
) -> None:
    experiment = NEVER_THE_SAME.replace("{changed}", changed)
    running = run(server, project_in(tmp_path, experiment, backend="dask", address=dask.address))
    assert (running.wait(), running.value) == (0, 2), running.said
    assert re.search(said, running.said), running.said
    assert "Traceback" not in running.said
    assert left_over(tmp_path / "runs") == []


def test_where_nothing_answers_the_run_says_so(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = ["tcp://127.0.0.1:1", f"tcp://127.0.0.1:{silent.getsockname()[1]}", "nonsense"]
        running = [
            run(server, project_in(tmp_path / str(number), backend="dask", address=address))
            for number, address in enumerate(addresses)
        ]
        for one, address in zip(running, addresses, strict=True):
            assert (one.wait(), one.value) == (0, 2), one.said
            assert f"error: runtime.address = {address!r}: no dask scheduler answers there" in one.said
            assert "Traceback" not in one.said


def test_a_scheduler_that_goes_away_ends_the_run(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    cluster = DaskCluster(server, tmp_path / "gates", EXPIRY, workers=1)
    try:
        cluster.close("grad_z")
        running = run(server, project_in(tmp_path, backend="dask", address=cluster.address))
        cluster.holding("grad_z", 1, running)
        cluster.scheduler.killed()
        assert (running.wait(), running.value) == (0, 1), running.said
        assert "does not answer any more" in running.said
        assert "Traceback" not in running.said
        assert list((tmp_path / "runs").rglob("*.claim")) == []
    finally:
        cluster.end()
