"""Clusters to be harmed: their processes are children of :mod:`tests.faults.children`, and talk over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence_pipeline.cache.writing import BlockWriting
from influence_pipeline.cli import app
from influence_pipeline.engines import cluster
from tests.faults.children import LOOK, ROOT, Child, Server, _patch, prepare

COMES = 240.0
"""Seconds in which what is waited for must come, on a busy machine."""


# ---- what children do ------------------------------------------------------------------------------------------------


def dask_scheduler(said: str) -> None:
    """Be a scheduler, which writes its address to a file."""
    from distributed.cli.dask_scheduler import main

    main(["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show", "--scheduler-file", said])


def dask_worker(said: str, folder: str, expiry: float) -> None:
    """Be a worker, which holds each block that it computes as long as there is a gate of its stage in a folder."""
    from distributed.cli.dask_worker import main

    work_at(Path(folder), expiry)
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", folder]
    main(["--scheduler-file", said, "--host", "127.0.0.1", *options])


def ray_nodes(said: str, stop: str) -> None:
    """Be a ray cluster of two nodes, with three CPUs in all, until a file appears."""
    from ray.cluster_utils import Cluster

    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    node = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **node})
    nodes.add_node(num_cpus=2, **node)
    Path(f"{said}.partial").write_text(nodes.address)
    Path(f"{said}.partial").rename(said)
    while not Path(stop).exists():
        time.sleep(LOOK)
    nodes.shutdown()


def work_at(gates: Path, expiry: float) -> None:
    """Have this process, a worker, hold blocks at gates."""
    prepare(expiry=expiry)

    def held(add: Callable[..., None]) -> Callable[..., None]:
        def added(writing: BlockWriting, values: Any) -> None:
            add(writing, values)
            stage = writing._group.path.parent.name
            (gates / f"{stage}.{os.getpid()}").touch()
            while (gates / stage).exists():
                time.sleep(LOOK)

        return added

    _patch(BlockWriting, "add", held)


def command(arguments: list[str], expiry: float | None = None) -> int:
    """Run a command, which looks more often than usual, and longer for workers to come; return its exit code."""
    prepare(expiry=expiry)
    cluster.LOOK, cluster.ANSWERS, cluster.STOPPING = 0.1, COMES, 1.0
    try:
        app(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ---- their client ----------------------------------------------------------------------------------------------------


class Gates:
    """A folder in which a file of a stage's name holds all blocks of that stage, half written."""

    def __init__(self, folder: Path) -> None:
        """Hold nothing."""
        folder.mkdir(exist_ok=True)
        self.folder, self._killed = folder, set[int]()

    def close(self, *stages: str) -> None:
        """Hold blocks of these stages from now on."""
        for mark in self.folder.glob("*.[0-9]*"):
            mark.unlink()
        for stage in stages:
            (self.folder / stage).touch()

    def open(self, *stages: str) -> None:
        """Let blocks go."""
        for stage in stages:
            (self.folder / stage).unlink(missing_ok=True)

    def holding(self, stage: str, least: int, running: Child) -> list[int]:
        """Return the processes of workers that hold a block of a stage, once there are so many."""

        def found() -> list[int]:
            there = {int(mark.suffix[1:]) for mark in self.folder.glob(f"{stage}.[0-9]*")} - self._killed
            return sorted(there) if len(there) >= least else []

        return list(until(found, running))

    def kill(self, process: int) -> None:
        """Kill a worker."""
        os.kill(process, signal.SIGKILL)
        self._killed.add(process)


class DaskCluster(Gates):
    """A scheduler and its workers."""

    def __init__(self, server: Server, folder: Path, expiry: float, workers: int = 3) -> None:
        """Start a scheduler and workers."""
        super().__init__(folder)
        self.workers = list[Child]()
        self._server, self._said, self._expiry = server, folder / "scheduler.json", expiry
        self.scheduler = server.start("tests.faults.clusters:dask_scheduler", hangs=None, said=self._said)
        self.address = str(until(self._written, self.scheduler)["address"])
        for _ in range(workers):
            self.start()

    def _written(self) -> Any:
        """Return what the scheduler says of itself, None as long as it has not said all of it."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(self._said.read_text())

    def start(self) -> None:
        """Start a worker."""
        order = {"said": self._said, "folder": self.folder, "expiry": self._expiry}
        self.workers.append(self._server.start("tests.faults.clusters:dask_worker", hangs=None, **order))

    def kill(self, process: int) -> None:
        """Kill a worker, and start another."""
        super().kill(process)
        self.start()

    def end(self) -> None:
        """End all of its processes."""
        for child in (*self.workers, self.scheduler):
            child.killed()


class RayCluster(Gates):
    """Two nodes; the experiment's file has to say that blocks are held."""

    def __init__(self, server: Server, folder: Path) -> None:
        """Start the nodes."""
        super().__init__(folder)
        said, self._stop = folder / "address", folder / "stop"
        self.nodes = server.start("tests.faults.clusters:ray_nodes", hangs=None, said=said, stop=self._stop)
        until(said.exists, self.nodes)
        self.address = said.read_text()

    def end(self) -> None:
        """End all of its processes."""
        self._stop.touch()
        self.nodes.wait()


def until(what: Callable[[], Any], *children: Child) -> Any:
    """Wait for something that is true; return it.

    Raises:
        TimeoutError: it does not come, or a child that should do it has ended.
    """
    end = time.monotonic() + COMES
    while not (found := what()):
        if time.monotonic() > end or any(child.exit is not None for child in children):
            raise TimeoutError("\n".join(child.said for child in children))
        time.sleep(LOOK)
    return found
