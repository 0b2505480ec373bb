"""Workers of a ray cluster. The only place that imports ray."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from influence_pipeline.engines.cluster import ANSWERS, KEPT, MOST_LOST, Cluster, Lost, no_answer, not_installed
from influence_pipeline.engines.worker import Answer, block_on_cluster
from influence_pipeline.errors import RequestError, WorkError
from influence_pipeline.settings import RuntimeSettings

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2, and so of gRPC, says first: its preface and no settings (RFC 9113, 3.4)."""
SETTINGS = bytes([4])
"""The type of frame that a server answers with, after three bytes of its length."""
LIFE = "life"
"""What an actor does in a thread of its own."""


@dataclass
class Actor:
    """A process on a node of the cluster.

    Attributes:
        handle: ray's.
        sign: an answer that it owes.
        signs: how many it gave.
        gone: whether it is no more.
    """

    handle: Any
    sign: Any
    signs: int = 0
    gone: bool = False


class Ray(Cluster):
    """Processes on the nodes of a ray cluster: one for each node or GPU, or as many as there are to be workers.

    The CPUs of a node are shared out among its processes, which compute with so many threads each.
    """

    def __init__(self, runtime: RuntimeSettings) -> None:
        """Connect to a cluster.

        Raises:
            RequestError: ray is not installed, or no cluster answers.
        """
        super().__init__()
        address = str(runtime.address)
        try:
            import ray
        except ImportError as error:
            raise RequestError(not_installed("ray", error)) from error
        self.name, self.remedy = f"the ray cluster at {address}", f"start some with `ray start --address={address}`"
        self._ray, self._most = ray, runtime.workers or 0
        self._gpus = runtime.device == "auto" or runtime.device.startswith("cuda")
        self._actors: dict[str, Actor] = {}
        self._failed = 0
        try:
            _reach(address)
            with _same_signals():
                ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise RequestError(no_answer(address, "ray cluster", error, "ray start --head")) from error

    @property
    def connected(self) -> bool:
        """Whether the cluster can be asked."""
        return bool(self._ray.is_initialized())

    def close(self) -> None:
        """End the processes that were started here."""
        for actor in self._actors.values():
            self._ray.kill(actor.handle)

    def signs(self) -> Mapping[str, tuple[int, object]]:
        """Return the threads of each process, none of one that is starting, and how often it answered.

        Raises:
            WorkError: the cluster does not answer.
        """
        try:
            nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        except (OSError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise WorkError(f"{self.name} does not answer any more ({error}). {KEPT}") from error
        found = {}
        for node in nodes:
            cpus, gpus = int(node["Resources"]["CPU"]), int(node["Resources"].get("GPU", 0)) * self._gpus
            here = gpus or min(cpus, math.ceil(self._most / len(nodes)) or 1)
            for number in range(here):
                worker = f"process {number} on {node['NodeManagerAddress']} (node {node['NodeID']})"
                actor = self._asked(worker, node["NodeID"], gpus > 0, cpus // here)
                sign = (id(actor), actor.signs) if actor.signs else time.monotonic()
                found[worker] = max(1, cpus // here) if actor.signs else 0, sign
        return found

    def _asked(self, worker: str, node: str, gpu: bool, cpus: int) -> Actor:
        """Return a process, started where there is none, once it has been asked for a sign of life.

        Raises:
            RequestError: several could not be started, one after the other.
        """
        actor = self._actors.get(worker)
        if actor is None or actor.gone:
            self._actors[worker] = actor = self._started(node, gpu, cpus)
        done, _ = self._ray.wait([actor.sign], timeout=0)
        if done:
            try:
                self._ray.get(actor.sign)
            except self._ray.exceptions.RayError as error:
                self._failed += not actor.signs
                if self._failed == MOST_LOST:
                    raise RequestError(
                        f"{worker} does not start: it needs the packages that are here ({str(error).splitlines()[-1]})"
                    ) from error
                self._actors[worker] = actor = self._started(node, gpu, cpus)
            else:
                self._failed = 0
                actor.signs, actor.sign = actor.signs + 1, _life(actor.handle)
        return actor

    def _started(self, node: str, gpu: bool, cpus: int) -> Actor:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        made = self._ray.remote(concurrency_groups={LIFE: 1})(Worker)
        options = {"num_cpus": cpus, "num_gpus": int(gpu), "max_restarts": 0, "scheduling_strategy": strategy}
        handle = made.options(**options).remote()
        return Actor(handle, _life(handle))

    def submit(self, worker: str, *order: Any) -> Future[Answer]:
        """Have a worker compute a block."""
        answer, errors, actor = Future[Answer](), self._ray.exceptions, self._actors[worker]
        job = actor.handle.compute.remote(*order)

        def answered(found: Future[Answer]) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            error = found.exception()
            if error is None:
                answer.set_result(found.result())
            elif isinstance(error, (errors.RayActorError, errors.TaskCancelledError)):
                actor.gone = True
                answer.set_exception(Lost(str(error)))
            else:
                answer.set_exception(
                    RequestError(f"{worker} cannot compute blocks ({error}): it needs the packages that are here")
                )

        job.future().add_done_callback(answered)
        return answer


class Worker:
    """What runs in a process of the cluster."""

    def alive(self) -> None:
        """Give a sign of life."""

    def compute(self, *order: Any) -> Answer:
        """Compute a block."""
        return block_on_cluster(*order)


def _life(handle: Any) -> Any:
    """Ask an actor for a sign of life."""
    return handle.alive.options(concurrency_group=LIFE).remote()


def _reach(address: str) -> None:
    """Look whether something answers that may be ray: ray itself takes minutes to see that nothing does.

    Raises:
        OSError: nothing does.
        ValueError: it is no address, or something else.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), ANSWERS) as there:
        if os.environ.get("RAY_USE_TLS", "0") in {"", "0"}:
            there.sendall(HELLO)
            if there.recv(4)[3:] != SETTINGS:
                raise ValueError("it does not speak gRPC")


@contextmanager
def _same_signals() -> Iterator[None]:
    """Have signals do what they did: ray exits at SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
