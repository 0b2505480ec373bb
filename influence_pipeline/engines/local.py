"""Processes of this machine, or whatever else joblib starts under a name. The only place that imports joblib."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib

from influence_pipeline.cache import Group, leave_no_lock
from influence_pipeline.engines.worker import Order, block_in_worker, take_gpu
from influence_pipeline.errors import RequestError, WorkError
from influence_pipeline.settings import RuntimeSettings
from influence_pipeline.signals import deaf_to_interrupts, shielded
from stages.stage import Block, Blocks


def threads_each(workers: int) -> int:
    """Return how many threads each of some processes of this machine has."""
    return max(1, (os.cpu_count() or 1) // workers)


def in_processes(
    label: str,
    group: Group,
    missing: Blocks,
    runtime: RuntimeSettings,
    order: Order,
    finished: Callable[[Block], None],
) -> list[tuple[int, ...]]:
    """Have blocks computed by processes; each writes its own and only its index comes back.

    Raises:
        WorkError: a worker process died.
    """
    done: list[tuple[int, ...]] = []
    workers = runtime.workers or 1
    threads, count = threads_each(workers), min(workers, len(missing))
    parallel = _parallel(count, runtime, order)
    results: Any = None
    try:
        jobs = (joblib.delayed(block_in_worker)(order, block.index, threads) for block in missing)
        with shielded(), deaf_to_interrupts():
            results = parallel(jobs)
        for index, computed in results:
            if computed:
                done.append(index)
                finished(missing.grid.block(index))
    except BrokenProcessPool as error:
        group.clear()
        raise WorkError(
            f"{label}: a worker process died, out of memory perhaps: use fewer workers or less runtime.memory. "
            f"Finished blocks are kept; the same command goes on ({error})"
        ) from error
    except BaseException:
        _end_workers(results)
        group.clear()
        raise
    return done


def _parallel(workers: int, runtime: RuntimeSettings, order: Order) -> joblib.Parallel:
    """Return what has processes compute.

    Raises:
        RequestError: joblib has no such backend, or it cannot be used here.
    """
    own: dict[str, Any] = {}
    if runtime.backend == "loky":
        numbers = _numbers() if order.own_gpu else None
        own = {"initializer": _settle_worker, "initargs": (os.getpid(), numbers)}
    try:
        return joblib.Parallel(
            n_jobs=workers,
            backend=runtime.backend,
            return_as="generator_unordered",
            pre_dispatch="2 * n_jobs",
            batch_size=1,
            **own,
        )
    except (ValueError, ImportError) as error:
        raise RequestError(f"runtime.backend = {runtime.backend!r} cannot be used: {error}") from error


@functools.cache
def _numbers() -> Path:
    """Return a folder in which worker processes number themselves, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="influence_pipeline_workers_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _end_workers(results: Any) -> None:
    """Have joblib end its workers; what its threads say of the work that they lose thereby is not for people."""
    before = threading.excepthook
    threading.excepthook = lambda args: None
    try:
        with warnings.catch_warnings(action="ignore"):
            if results is not None:
                results.close()
    finally:
        threading.excepthook = before


def _settle_worker(parent: int, numbers: Path | None) -> None:
    """Have a new worker process end with its parent, leave nothing behind when it is killed, and use a GPU of its own.

    Args:
        parent: its process; where it died while this one was starting, somebody else is the parent now.
        numbers: where workers number themselves; None where the settings say which device they use.
    """
    if numbers is not None:
        take_gpu(numbers)
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    leave_no_lock()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
