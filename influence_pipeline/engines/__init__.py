"""Engines: what computes blocks in other processes, on this machine or on a cluster.

``local`` has processes that joblib starts, ``cluster`` the workers of a cluster that is there, which ``on_dask``
and ``on_ray`` reach. ``worker`` is what all of them do.
"""

from __future__ import annotations

from collections.abc import Callable

from influence_pipeline.cache import Group
from influence_pipeline.engines.cluster import Cluster
from influence_pipeline.engines.local import in_processes
from influence_pipeline.engines.on_dask import Dask
from influence_pipeline.engines.on_ray import Ray
from influence_pipeline.engines.worker import Order, Rebuild
from influence_pipeline.settings import RuntimeSettings
from stages.stage import Block, Blocks

CLUSTERS: dict[str, Callable[[RuntimeSettings], Cluster]] = {"dask": Dask, "ray": Ray}
_connected: dict[tuple[str, str | None, int | None, str], Cluster] = {}


def in_workers(
    label: str,
    group: Group,
    missing: Blocks,
    runtime: RuntimeSettings,
    rebuild: Rebuild,
    token: str,
    finished: Callable[[Block], None],
) -> list[tuple[int, ...]]:
    """Have blocks computed by other processes; each writes its own, and only its index comes back.

    Args:
        label: what people read.
        group: where they are kept.
        missing: the blocks.
        runtime: which processes.
        rebuild: makes work and group in them.
        token: tells one run's work from another's in workers that are used again.
        finished: hears of each block that is kept.

    Returns:
        Which were computed.

    Raises:
        RequestError: there are no such processes.
        WorkError: they died.
    """
    from influence_pipeline import __version__

    log_file = None if runtime.log_file is None else runtime.log_file.absolute()
    order = Order(rebuild, token, log_file, runtime.device in ("auto", "cuda"), __version__)
    if not runtime.on_cluster:
        return in_processes(label, group, missing, runtime, order, finished)
    return _cluster(runtime).compute(order, group, missing, runtime.workers, finished)


def count(runtime: RuntimeSettings) -> int:
    """Return how many processes compute blocks at once.

    Raises:
        RequestError: the cluster that the settings name does not answer, or has no workers.
    """
    if not runtime.on_cluster:
        return runtime.workers or 1
    found = _cluster(runtime).count()
    return found if runtime.workers is None else min(found, runtime.workers)


def _cluster(runtime: RuntimeSettings) -> Cluster:
    """Return the cluster that the settings name, which this process stays connected to until they name another."""
    key = runtime.backend, runtime.address, runtime.workers, runtime.device
    if key not in _connected or not _connected[key].connected:
        while _connected:
            _connected.popitem()[1].close()
        _connected[key] = CLUSTERS[runtime.backend](runtime)
    return _connected[key]
