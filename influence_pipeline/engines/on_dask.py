"""Workers of a dask cluster. The only place that imports distributed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from influence_pipeline.cache import claims
from influence_pipeline.engines.cluster import ANSWERS, KEPT, STARTS, Cluster, Lost, no_answer, not_installed
from influence_pipeline.engines.worker import Answer, block_on_cluster
from influence_pipeline.errors import RequestError, WorkError
from influence_pipeline.settings import RuntimeSettings


class Dask(Cluster):
    """The workers of a dask scheduler; each computes with as many threads as it was given."""

    def __init__(self, runtime: RuntimeSettings) -> None:
        """Connect to a scheduler.

        Raises:
            RequestError: distributed is not installed, or no scheduler answers.
        """
        super().__init__()
        address = str(runtime.address)
        try:
            from distributed import Client
        except ImportError as error:
            raise RequestError(not_installed("dask", error)) from error
        self.name, self.remedy = f"the dask scheduler at {address}", f"start some with `dask worker {address}`"
        try:
            with ThreadPoolExecutor(1) as own:  # where no loop is running, as there is in a notebook
                own.submit(asyncio.run, asyncio.wait_for(_known(address), ANSWERS)).result()
            self._client = Client(address, timeout=ANSWERS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise RequestError(no_answer(address, "dask scheduler", error, "dask scheduler")) from error

    @property
    def connected(self) -> bool:
        """Whether the scheduler can be asked."""
        return bool(self._client.status == "running")

    def close(self) -> None:
        """Leave the scheduler."""
        self._client.close()

    def signs(self) -> Mapping[str, tuple[int, object]]:
        """Return the threads of each worker, none of one that is paused, and when the scheduler last heard of it.

        Raises:
            WorkError: the scheduler does not answer.
        """
        try:
            patience = max(claims.EXPIRY, STARTS)
            found = self._client.sync(self._client.scheduler.identity, callback_timeout=patience)["workers"]
        except (OSError, RuntimeError, ValueError) as error:
            raise WorkError(f"{self.name} does not answer any more ({error}). {KEPT}") from error
        return {
            address: (of["nthreads"] if of["status"] == "running" else 0, of["last_seen"])
            for address, of in found.items()
        }

    def submit(self, worker: str, *order: Any) -> Future[Answer]:
        """Have a worker compute a block."""
        answer = Future[Answer]()
        job = self._client.submit(
            block_on_cluster,
            *order,
            key=f"influence-pipeline-{uuid.uuid4().hex}",
            workers=[worker],
            allow_other_workers=False,
            pure=False,
        )

        def answered(job: Any) -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(job.result())
                except Exception as error:  # noqa: BLE001 - it is raised where the answer is asked for
                    answer.set_exception(_meaning(worker, error))

        job.add_done_callback(answered)
        answer.add_done_callback(lambda answer: job.release())
        return answer


async def _known(address: str) -> None:
    """See that what is at an address is a scheduler: a client would wait for ever for something that is silent.

    Raises:
        ValueError: it is something else.
    """
    from distributed import rpc
    from distributed.security import Security

    async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
        kind = (await there.identity())["type"]
    if kind != "Scheduler":
        raise ValueError(f"it is a {kind}")


def _meaning(worker: str, error: BaseException) -> Exception:
    from distributed import KilledWorker

    if isinstance(error, (KilledWorker, CancelledError, OSError)):
        return Lost(str(error))
    return RequestError(
        f"{worker} cannot compute blocks ({type(error).__name__}: {error}): it needs the packages that are here"
    )
