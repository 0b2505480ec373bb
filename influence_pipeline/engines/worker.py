"""What a worker process does, whatever started it: it loads the experiment once, and computes and keeps blocks."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from influence_pipeline.cache import Group, claims
from influence_pipeline.cache.claims import Claim
from influence_pipeline.cache.store import files_at
from influence_pipeline.errors import InfluenceError, RequestError, WorkError
from influence_pipeline.location import Location
from influence_pipeline.logs import logging_to
from influence_pipeline.signals import shielded
from influence_pipeline.work import Work
from stages.stage import Block, Progress, StageError

Rebuild = Callable[[], tuple[Work, Group]]
"""Makes the same work in another process; must be picklable by reference."""
HELD = 1.0
"""Seconds between looks at whether a block is still to be computed here."""


@dataclass(frozen=True)
class Order:
    """What workers need to know to compute blocks of a stage.

    Attributes:
        rebuild: makes work and group.
        token: tells one run's work from another's in workers that are used again.
        log_file: where they log to.
        own_gpu: whether each is to use a GPU of its own, where there are several.
        version: of the package that hands out blocks.
    """

    rebuild: Rebuild
    token: str
    log_file: Path | None
    own_gpu: bool
    version: str


_rebuilt: dict[str, tuple[Work, Group]] = {}


def block_in_worker(
    order: Order,
    index: tuple[int, ...],
    threads: int,
    claim: Claim | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[tuple[int, ...], bool]:
    """Compute one block in a worker process, which keeps the model and the data for the next.

    Args:
        order: what is computed.
        index: which block.
        threads: to compute with.
        claim: of the block, where this process has claimed it.
        report: hears how far it is.

    Returns:
        Which block, and whether it was kept.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if order.token not in _rebuilt:
        _rebuilt.clear()
        _rebuilt[order.token] = order.rebuild()
    work, group = _rebuilt[order.token]
    with logging_to(order.log_file), named_errors(work.label), work.computing():
        keep = work.start(work.stage.grid.block(index), group, report, claim)
        with shielded():
            return index, keep is not None and keep()


@contextmanager
def named_errors(label: str) -> Iterator[None]:
    """Turn what a stage refuses into an error of the request.

    Raises:
        WorkError: in the place of a MemoryError.
        RequestError: in the place of a StageError.
    """
    try:
        yield
    except StageError as error:
        raise RequestError(f"{label}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise WorkError(f"{label}: out of memory: lower runtime.memory or runtime.workers ({error})") from error


def take_gpu(numbers: Path) -> int | None:
    """Have "cuda" mean a GPU that no other worker uses, as long as there is one; then the first.

    Args:
        numbers: a folder of this machine in which workers number themselves.

    Returns:
        The GPU's number, None for the first.
    """
    for number in range(torch.cuda.device_count()):
        if claims.take(numbers / f"{number}.claim") is not None:
            torch.cuda.set_device(number)
            return number
    return None


# ---- workers of a cluster --------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Whoever handed out a block has taken it back."""


@dataclass(frozen=True)
class Answer:
    """What came of a block that was handed to a worker.

    Attributes:
        computed: whether the worker computed and kept it.
        error: what it raised.
    """

    computed: bool = False
    error: Exception | None = None


_alone = threading.Lock()


def block_on_cluster(order: Order, group: Location, block: Block, token: str, threads: int) -> Answer:
    """Compute one block in a worker of a cluster, one at a time, as long as its claim stands.

    Args:
        order: what is computed.
        group: the folder of its arrays.
        block: which.
        token: what the block is claimed with: whoever handed it out takes it back by removing that claim.
        threads: to compute with.
    """
    from influence_pipeline import __version__

    here = f"worker {os.getpid()} on {socket.gethostname()}"
    if order.version != __version__:
        return Answer(error=RequestError(f"{here} has influence-pipeline {__version__}, not {order.version}"))
    if not files_at(group).there:
        remedy = "the cache must be on a file system that all workers have, under the same path"
        return Answer(error=RequestError(f"{here} sees no {group}: {remedy}"))
    with _alone:
        try:
            if (claim := Group(group).claim(block, token)) is None:
                return Answer()
            with claim:
                if order.own_gpu:
                    _use_own_gpu()
                return Answer(block_in_worker(order, block.index, threads, claim, _stopping(claim))[1])
        except Stopped:
            return Answer()
        except Exception as error:  # noqa: BLE001 - it is raised where the block was handed out
            return Answer(error=_sendable(error, here))


def _sendable(error: Exception, here: str) -> Exception:
    """Return an error that can be raised where its class, or what it holds, is not known."""
    if not isinstance(error, InfluenceError) and type(error).__module__ != "builtins":
        error = WorkError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    error.add_note(f"{here}:\n{''.join(traceback.format_exception(error))}")
    return error


def _stopping(claim: Claim) -> Callable[[Progress], None]:
    """Return what looks, while a block is computed, whether it is still to be.

    Raises:
        Stopped: it is not.
    """
    looked = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal looked
        if time.monotonic() - looked > HELD:
            looked = time.monotonic()
            if not claim.held():
                raise Stopped

    return report


@functools.cache
def _own_gpu() -> int | None:
    numbers = Path(tempfile.gettempdir()) / f"influence_pipeline_workers_{os.getuid()}"
    numbers.mkdir(exist_ok=True)
    return take_gpu(numbers)


def _use_own_gpu() -> None:
    """Use it in this thread: a worker computes now in one and now in another."""
    if torch.cuda.is_available() and (number := _own_gpu()) is not None:
        torch.cuda.set_device(number)
