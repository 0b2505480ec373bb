"""Clusters: workers that somebody else started, on any machine, of which each computes a block at a time.

Blocks are handed to workers one by one, and nothing relies on what a cluster tries again by itself, or when: a block
is handed out anew where its worker is gone, or has given no sign of life for as long as a claim lasts. The one who
hands a block out names the claim that its worker takes; removing that claim takes the block back, so that a worker
that was taken for dead and wakes up stops, and keeps nothing.
"""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any

from influence_pipeline.cache import Group, claims
from influence_pipeline.cache.claims import Claim
from influence_pipeline.engines.worker import Answer, Order
from influence_pipeline.errors import RequestError, WorkError
from stages.stage import Block, Blocks

log = logging.getLogger(__name__)

ANSWERS = 5.0
"""Seconds in which a cluster must answer, and have a worker."""
STARTS = 60.0
"""Seconds in which workers that are there, or starting, must be able to take a block."""
LOOK = 0.5
"""Seconds between looks at which workers there are, at most."""
MOST_LOST = 3
"""Workers that a run loses over one block before it gives up."""
STOPPING = 3.0
"""Seconds that workers have to stop when a run is interrupted, before it goes on without them."""
KEPT = "Finished blocks are kept; the same command goes on"


class Lost(Exception):
    """The worker that had a block is gone."""


@dataclass
class Job:
    """A block that a worker has.

    Attributes:
        worker: its name.
        block: which.
        claim: what the worker claims it with.
        answer: what comes of it.
    """

    worker: str
    block: Block
    claim: Claim
    answer: Future[Answer]


class Cluster(ABC):
    """The workers of a cluster.

    Attributes:
        name: what the cluster is, for people.
        remedy: how workers are started.
    """

    name: str
    remedy: str

    def __init__(self) -> None:
        """Have handed out nothing."""
        self._jobs: dict[str, Job] = {}
        """The last of each worker, which gets no other before that is answered, also where it is silent."""
        self._signs: dict[str, tuple[object, float]] = {}
        self._alive: dict[str, int] = {}
        self._looked = -LOOK

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether it can be asked."""

    @abstractmethod
    def close(self) -> None:
        """Leave it."""

    @abstractmethod
    def signs(self) -> Mapping[str, tuple[int, object]]:
        """Return, for each worker that there is, its threads, and something that changes while it is alive.

        A worker of no threads takes no block, but may have one.

        Raises:
            WorkError: the cluster does not answer.
        """

    @abstractmethod
    def submit(self, worker: str, *order: Any) -> Future[Answer]:
        """Have a worker call :func:`~influence_pipeline.engines.worker.block_on_cluster`.

        What comes raises :class:`Lost` where the worker is gone.
        """

    def workers(self) -> dict[str, int]:
        """Return the workers that are alive, with the threads of each."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            found, self._looked = self.signs(), now
            for worker, (_, sign) in found.items():
                if worker not in self._signs or self._signs[worker][0] != sign:
                    self._signs[worker] = sign, now
            for gone in self._signs.keys() - found.keys():
                del self._signs[gone]
                if gone in self._jobs:
                    self._jobs.pop(gone).answer.cancel()
            self._alive = {w: n for w, (n, _) in found.items() if now - self._signs[w][1] < claims.EXPIRY}
        return self._alive

    def count(self) -> int:
        """Return how many workers there are.

        Raises:
            RequestError: none comes within a few seconds.
        """
        began = time.monotonic()
        while not any((found := self.workers()).values()):
            if time.monotonic() - began > (STARTS if found else ANSWERS):
                raise RequestError(f"{self.name} has no workers: {self.remedy}")
            time.sleep(LOOK)
        return len(found)

    def compute(
        self, order: Order, group: Group, missing: Blocks, most: int | None, finished: Callable[[Block], None]
    ) -> list[tuple[int, ...]]:
        """Have blocks computed; each worker writes its own, and only whether it did so comes back.

        Args:
            order: what is computed.
            group: where it is kept.
            missing: the blocks.
            most: workers to use at once, all where None.
            finished: hears of each block that is kept.

        Returns:
            Which were computed.

        Raises:
            RequestError: the cluster has no workers.
            WorkError: all workers are gone, or several over one block.
        """
        self.count()
        waiting, done, jobs = deque(missing), list[tuple[int, ...]](), list[Job]()
        lost: Counter[tuple[int, ...]] = Counter()
        answered = time.monotonic()
        try:
            while waiting or jobs:
                workers = self.workers()
                if any(workers.values()) or any(job.worker in workers for job in jobs):
                    answered = time.monotonic()
                elif time.monotonic() - answered > max(claims.EXPIRY, STARTS if self._signs else 0):
                    raise WorkError(f"{self.name}: no worker answers and takes a block any more. {KEPT}")
                free = [w for w, n in workers.items() if n and (w not in self._jobs or self._jobs[w].answer.done())]
                while waiting and free and (most is None or len(jobs) < most):
                    jobs.append(self._handed(free.pop(0), workers, order, group, waiting.popleft()))
                wait([job.answer for job in jobs], LOOK, FIRST_COMPLETED) if jobs else time.sleep(LOOK)
                for job in [job for job in jobs if job.answer.done() or not _has(job, workers)]:
                    jobs.remove(job)
                    answer, block = _taken(job), job.block
                    if answer is None:
                        workers.pop(job.worker, None)  # until the next look, which is at once
                        self._looked = -LOOK
                        lost[block.index] += job.answer.done()
                        if lost[block.index] == MOST_LOST:
                            raise WorkError(
                                f"{group.path}: {MOST_LOST} workers were lost over block {block.index}, out of memory "
                                f"perhaps: use less runtime.memory, or workers with more. {KEPT}"
                            )
                        log.warning("%s is gone, or silent: another worker computes block %s", job.worker, block.index)
                        waiting.appendleft(block)
                    elif answer.error is not None:
                        raise answer.error
                    elif answer.computed:
                        done.append(block.index)
                        finished(block)
        except BaseException:
            _stop(jobs)
            group.clear()
            raise
        return done

    def _handed(self, worker: str, threads: Mapping[str, int], order: Order, group: Group, block: Block) -> Job:
        """Hand a block to a worker."""
        claim = group.claim_named(block, uuid.uuid4().hex)
        answer = self.submit(worker, order, group.path.absolute(), block, claim.token, threads[worker])
        job = self._jobs[worker] = Job(worker, block, claim, answer)
        return job


def not_installed(backend: str, error: ImportError) -> str:
    """Return what is said where the library of a backend is not here."""
    return (
        f'runtime.backend = "{backend}" needs {error.name or backend} ({error}): pip install '
        f'"influence-pipeline[{backend}]", here and where the workers are'
    )


def no_answer(address: str, what: str, error: Exception, start: str) -> str:
    """Return what is said where there is no cluster at an address."""
    return (
        f"runtime.address = {address!r}: no {what} answers there ({error}). Start one with `{start}`, which says its "
        "address"
    )


def _has(job: Job, workers: Mapping[str, int]) -> bool:
    """Say whether a block is, or may yet be, computed by the worker that has it."""
    return job.worker in workers and (workers[job.worker] > 0 or job.claim.held())


def _taken(job: Job) -> Answer | None:
    """Take a block back from a worker; return what came of it, None where nothing did."""
    try:
        if job.answer.done():
            return job.answer.result()
    except (Lost, CancelledError):
        pass
    job.claim.release()
    return None


def _stop(jobs: list[Job]) -> None:
    """Take all blocks back, and give workers some time to stop: what was not begun by then never is."""
    end = time.monotonic() + STOPPING
    while (left := [job for job in jobs if not job.answer.done()]) and time.monotonic() < end:
        for job in left:
            job.claim.release()
        wait([job.answer for job in left], LOOK, FIRST_COMPLETED)
    for job in left:
        job.answer.cancel()
