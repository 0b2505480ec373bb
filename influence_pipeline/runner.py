"""The runner: finds the blocks that are missing, has them computed, and keeps them.

It knows no calculus. Each block is computed and written by one process, this one or a worker, its record last, so that
whatever happens the next run goes on with the first block that has no valid record. The only place that imports tqdm.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from tqdm import tqdm

from influence_pipeline.cache import Group
from influence_pipeline.engines import in_workers
from influence_pipeline.engines.local import threads_each
from influence_pipeline.engines.worker import Rebuild, named_errors
from influence_pipeline.errors import RequestError, WorkError
from influence_pipeline.peak import most_held, peak
from influence_pipeline.plan import Timing
from influence_pipeline.settings import RuntimeSettings
from influence_pipeline.shard import Shard
from influence_pipeline.signals import interrupted_once
from influence_pipeline.work import Work, pending
from stages.stage import Block, Blocks, Progress

log = logging.getLogger(__name__)

SHORT = 10.0
"""Seconds of a block below which what the first one costs beside may count, so that a second is measured."""
MOST_TRIES = 3
"""Times that a run computes a block before it gives up on one that does not stay valid."""
PAUSE = 0.2
"""Seconds between looks at what other processes compute."""


@dataclass(frozen=True)
class Outcome:
    """What a run of one stage did.

    Attributes:
        computed: blocks computed now.
        total: blocks in all.
        seconds: spent.
        left: blocks of other shards that are still missing.
        timing: of blocks, where they were to be measured, and some were missing.
    """

    computed: int
    total: int
    seconds: float
    left: int = 0
    timing: Timing | None = None


Room = Callable[[Blocks], Blocks]
"""Refuses blocks that do not fit the disk; returns those that may be computed before it is asked again."""


def run(
    work: Work,
    group: Group,
    runtime: RuntimeSettings,
    rebuild: Rebuild,
    token: str,
    room: Room,
    shard: Shard | None = None,
    *,
    wait: bool = True,
) -> Outcome:
    """Compute every missing block of a stage, beside whatever other processes do so, and merge them.

    Args:
        work: the stage.
        group: where it is kept, of the right size.
        runtime: workers and progress.
        rebuild: makes work and group in worker processes.
        token: tells one run's work from another's in workers that are used again.
        room: asked before blocks are computed.
        shard: which share of the blocks to compute; None for whatever no other process has claimed.
        wait: for the shares of other processes, too; otherwise whoever is last merges.

    Returns:
        What was done.

    Raises:
        RequestError: the model, the data or a setting makes the work impossible.
        WorkError: the work failed; finished blocks are kept.
    """
    began, computed = time.monotonic(), 0
    missing = pending(work, group)
    group.summarise(missing)
    if not missing and group.finished:
        return Outcome(0, len(work.stage.grid), time.monotonic() - began)
    log.info("%s: %d of %d blocks to compute, into %s", work.label, len(missing), len(work.stage.grid), group.path)
    tries: Counter[tuple[int, ...]] = Counter()
    with _computing(work, missing, runtime) as bar:
        while missing:
            own = missing if shard is None else shard.of(missing)
            if not own and not wait:
                break
            now = room(own) if own else own
            if not now or (not runtime.on_cluster and (runtime.processes == 1 or len(now) < 2)):
                done = _here(work, group, now, bar)
            else:
                done = in_workers(work.label, group, now, runtime, rebuild, token, bar.finished)
            tries.update(done)
            computed += len(done)
            if tries and max(tries.values()) > MOST_TRIES:
                raise WorkError(f"{group.path}: block {max(tries)} was written {MOST_TRIES} times and is not valid")
            looked = time.monotonic()
            missing = pending(work, group)
            if missing and not done:
                other = group.claimed(missing[0]) or (f"other shards than {shard}" if shard else "another process")
                bar.note(Progress(note=f"waiting for {other}"))
                time.sleep(max(PAUSE, time.monotonic() - looked))
            bar.at(missing)
            group.summarise(missing)
        if not missing:
            _give_back()  # what the last blocks freed
            work.finish(group, bar.note)
    seconds = time.monotonic() - began
    log.info("%s: %d blocks computed in %.1f s", work.label, computed, seconds)
    return Outcome(computed, len(work.stage.grid), seconds, len(missing))


def measure(work: Work, group: Group, runtime: RuntimeSettings, room: Room) -> Outcome:
    """Compute a missing block in this process as a run does, and a second one where that was short, and time them.

    Args:
        work: the stage.
        group: where it is kept, of the right size.
        runtime: workers, whose number of threads is used, and progress.
        room: asked before blocks are computed.
    """
    began = time.monotonic()
    missing = pending(work, group)
    if not missing and group.finished:
        return Outcome(0, len(work.stage.grid), time.monotonic() - began)
    blocks: list[tuple[int, float]] = []
    with _computing(work, missing, runtime) as bar, peak():
        if missing:
            work.ready()
        kept = time.monotonic()
        ready = kept - began
        while missing and len(blocks) < 2 and (not blocks or blocks[0][1] < SHORT):
            block, missing = room(missing)[:1], missing[1:]
            if _here(work, group, block, bar):
                blocks.append((block.rows, time.monotonic() - kept))
            kept = time.monotonic()
        if complete := not pending(work, group):
            work.finish(group, bar.note)
        timing = Timing(ready, tuple(blocks), time.monotonic() - kept, most_held())
    seconds = time.monotonic() - began
    # Where other processes are at work on all that is missing, nothing was measured.
    return Outcome(len(blocks), len(work.stage.grid), seconds, timing=timing if blocks or complete else None)


@contextmanager
def _computing(work: Work, missing: Blocks, runtime: RuntimeSettings) -> Iterator[_Bar]:
    """Surround whatever computes blocks that are missing; refuse them first where they do not fit the memory."""
    if missing:
        work.memory()
    _give_back()
    with (
        _threads(runtime.processes),
        named_errors(work.label),
        interrupted_once(),
        work.computing(),
        _Bar(work, missing, runtime.progress) as bar,
    ):
        yield bar


def _give_back() -> None:
    """Give back to the system what the stage before freed: each thread's part of the heap keeps it otherwise."""
    with contextlib.suppress(AttributeError, OSError):  # as the C library of Linux has it
        ctypes.CDLL(None).malloc_trim(0)


def _here(work: Work, group: Group, missing: Blocks, bar: _Bar) -> list[tuple[int, ...]]:
    """Compute blocks in this process, each of them kept while the next is computed; return which."""
    done: list[tuple[int, ...]] = []
    behind: deque[tuple[Block, Future[bool]]] = deque()

    def settle() -> None:
        block, kept = behind.popleft()
        if kept.result():
            done.append(block.index)
            bar.finished(block)

    # Whatever happens, leaving this waits for what is being written.
    with ThreadPoolExecutor(1, "keep") as keeper:
        for block in missing:
            keep = work.start(block, group, bar.within(block))
            if keep is not None:
                behind.append((block, keeper.submit(keep)))
            if len(behind) > 1:
                settle()
        while behind:
            settle()
    return done


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """Compute in this process with as many threads as each of several workers has, so that results are the same."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(threads_each(workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Bar:
    """A progress bar over samples, moved by whole blocks and by what is reported from inside one."""

    def __init__(self, work: Work, missing: Blocks, show: bool) -> None:
        self._total = work.stage.grid.entries
        self._done = self._total - missing.rows
        # None: tqdm shows itself on a terminal only.
        self._bar: Any = tqdm(
            total=self._total, initial=self._done, desc=work.label, unit=f" {work.unit}", unit_scale=True,
            disable=None if show else True, dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def within(self, block: Block) -> Callable[[Progress], None]:
        """Return what moves the bar from inside a block."""
        base = self._done

        def report(progress: Progress) -> None:
            if progress.total:
                self._bar.n = base + block.rows * min(progress.done, progress.total) // progress.total
            self.note(progress)

        return report

    def note(self, progress: Progress) -> None:
        """Show what is being done."""
        self._bar.set_postfix_str(progress.note, refresh=False)
        self._bar.update(0)

    def finished(self, block: Block) -> None:
        """Count a whole block."""
        self._done += block.rows
        self._bar.n = self._done
        self._bar.refresh()

    def at(self, missing: Blocks) -> None:
        """Count what is there, whoever made it."""
        self._done = self._total - missing.rows
        self._bar.n = self._done
        self._bar.refresh()


@contextmanager
def shared(value: Any) -> Iterator[Path]:
    """Keep a live object in a file outside the cache while worker processes may ask for it.

    Raises:
        RequestError: it cannot be pickled.
    """
    with tempfile.TemporaryDirectory(prefix="influence_pipeline_") as folder:
        path = Path(folder) / "experiment.pickle"
        try:
            path.write_bytes(cloudpickle.dumps(value))
        except Exception as error:
            raise RequestError(
                f"the experiment cannot be sent to worker processes: {error}. Put it into a file and name it as "
                '"file.py:function", or use runtime.workers = 1'
            ) from error
        yield path


def take_shared(path: Path) -> Any:
    """Load what :func:`shared` keeps, in a worker process."""
    return cloudpickle.loads(path.read_bytes())


@contextmanager
def watched(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Show how far something long is that is no stage; give what counts further."""
    with tqdm(total=total, desc=label, disable=None if show else True, dynamic_ncols=True) as bar:
        yield bar.update
