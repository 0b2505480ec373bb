"""Clusters to be harmed: their processes are children of :mod:`tests.faults.children`, and talk over TCP."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from influence_pipeline.cache.writing import BlockWriting
from influence_pipeline.cli import app
from tests.faults.children import LOOK, Child, Server, _patch, prepare

COMES = 60.0
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
    """Run a command of the command line; return its exit code."""
    prepare(expiry=expiry)
    try:
        app(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ---- their client ----------------------------------------------------------------------------------------------------


class DaskCluster:
    """A scheduler with some workers.

    Attributes:
        gates: a folder; a file of a stage's name in it holds all blocks of that stage, half written.
        workers: those that were not killed.
    """

    def __init__(self, server: Server, folder: Path, expiry: float) -> None:
        """Start a scheduler."""
        folder.mkdir()
        self.gates, self.workers = folder, list[Child]()
        self._server, self._said, self._expiry = server, folder / "scheduler.json", expiry
        self.scheduler = server.start("tests.faults.clusters:dask_scheduler", hangs=None, said=self._said)
        until(self._said.exists, self.scheduler)

    @property
    def address(self) -> str:
        """Where the scheduler is."""
        return str(json.loads(self._said.read_text())["address"])

    def start(self, count: int = 1) -> None:
        """Start so many workers."""
        for _ in range(count):
            order = {"said": self._said, "folder": self.gates, "expiry": self._expiry}
            self.workers.append(self._server.start("tests.faults.clusters:dask_worker", hangs=None, **order))

    def close(self, *stages: str) -> None:
        """Hold blocks of these stages."""
        for mark in self.gates.glob("*.*"):
            if mark.suffix[1:].isdigit():
                mark.unlink()
        for stage in stages:
            (self.gates / stage).touch()

    def open(self, *stages: str) -> None:
        """Let blocks go."""
        for stage in stages:
            (self.gates / stage).unlink(missing_ok=True)

    def holding(self, stage: str, least: int, running: Child) -> list[Child]:
        """Return workers that hold a block of a stage, once there are so many."""

        def found() -> list[Child]:
            there = [worker for worker in self.workers if (self.gates / f"{stage}.{worker.process}").exists()]
            return there if len(there) >= least else []

        return list(until(found, running))

    def end(self) -> None:
        """End all of its processes."""
        for child in (*self.workers, self.scheduler):
            child.killed()


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


@contextmanager
def dask_cluster(server: Server, folder: Path, expiry: float) -> Iterator[DaskCluster]:
    """Have a scheduler and three workers."""
    cluster = DaskCluster(server, folder, expiry)
    try:
        cluster.start(3)
        yield cluster
    finally:
        cluster.end()
