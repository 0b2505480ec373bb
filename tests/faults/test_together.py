"""Several processes share a cache: each block is computed once, and what comes out is what one process makes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_pipeline as ip
from influence_pipeline.cache import STAGES, Group, claims
from tests import tiny
from tests.faults import together
from tests.faults.children import Child, Server
from tests.faults.kills import RUN, Reference, Tally, left_over, read_events

ROUNDS, THOROUGH = 10, 50


@pytest.fixture(scope="module")
def rounds(thorough: bool) -> int:
    return THOROUGH if thorough else ROUNDS


@pytest.fixture(scope="module")
def shared(server: Server, reference: Reference, tmp_path_factory: pytest.TempPathFactory, rounds: int) -> Tally:
    """Return what came of processes that ran at the same time."""
    return together.many(server, reference, tmp_path_factory.mktemp("together"), rounds)


def test_everything_was_tried(shared: Tally, rounds: int) -> None:
    assert shared.tried == rounds
    assert all(shared.kinds[kind] for kind in together.KINDS)


def test_several_processes_make_the_bytes_of_one_and_compute_nothing_in_vain(shared: Tally) -> None:
    assert not shared.wrong, "\n".join(shared.wrong)


def test_several_processes_leave_nothing_over(shared: Tally) -> None:
    assert not shared.left, "\n".join(shared.left)


# ---- claims ----------------------------------------------------------------------------------------------------------


def until(what: Callable[[], Any], child: Child | None = None) -> None:
    """Wait for something.

    Raises:
        TimeoutError: it does not come, or the child that should do it has ended.
    """
    end = time.monotonic() + 30
    while not what():
        if time.monotonic() > end or (child is not None and child.exit is not None):
            raise TimeoutError("" if child is None else child.said)
        time.sleep(0.005)


def without(reference: Reference, cache: Path, stage: str) -> None:
    """Make a finished cache but for the blocks of one stage."""
    shutil.copytree(reference.path, cache)
    for record in records_of(reference, stage):
        (cache / record).unlink()


def records_of(reference: Reference, stage: str) -> list[str]:
    return [name for name in reference.records if name.startswith(f"{stage}/") and "/blocks/" in name]


@pytest.mark.parametrize("stage", ["grad_z", "s_test", "influence"])
def test_a_claim_of_a_killed_process_is_taken_over_at_once(
    server: Server, reference: Reference, tmp_path: Path, stage: str
) -> None:
    cache, events = tmp_path / "cache", [tmp_path / "0.events", tmp_path / "1.events"]
    without(reference, cache, stage)
    first = server.start(RUN, cache=cache, events=events[0], pause=0.5)
    until(lambda: read_events(events[0]), first)
    first.signal(signal.SIGSTOP)
    held = read_events(events[0])[0].record
    second = server.start(RUN, cache=cache, events=events[1])

    def missing() -> set[str]:
        return {name for name in records_of(reference, stage) if not (cache / name).exists()}

    # What it was writing, and what it had computed meanwhile.
    until(lambda: len(missing()) <= 2, second)
    time.sleep(0.5)
    left = missing()
    assert second.exit is None
    assert held in left
    assert not left & {event.record for event in read_events(events[1])}
    first.signal(signal.SIGKILL)
    assert first.wait() == -9
    assert second.wait() == 0
    assert {event.record for event in read_events(events[1]) if event.what == "kept"} >= left
    assert reference.differs(cache) == []
    assert left_over(cache) == []


def test_a_claim_of_another_machine_is_respected_while_it_is_touched(
    server: Server, reference: Reference, tmp_path: Path
) -> None:
    cache, clock, now = tmp_path / "cache", tmp_path / "clock", 1e6
    without(reference, cache, "s_test")
    theirs = next(cache.glob("s_test/*/blocks")) / "1.claim"
    theirs.write_text(json.dumps({"token": "theirs", "machine": "elsewhere/1/2", "process": 1, "started": "3"}))

    def at(moment: float) -> None:
        os.utime(clock, (moment, moment))

    clock.touch()
    at(now)
    run = server.start(RUN, cache=cache, clock=clock)
    until(lambda: sum(not (cache / name).exists() for name in records_of(reference, "s_test")) == 1, run)
    for _ in range(4):
        now += 0.6 * claims.EXPIRY
        at(now)
        os.utime(theirs)
        time.sleep(0.3)  # it looks several times
    at(now + 0.9 * claims.EXPIRY)
    time.sleep(0.3)
    assert run.exit is None
    assert json.loads(theirs.read_bytes())["token"] == "theirs"
    at(now + 2 * claims.EXPIRY)
    assert run.wait() == 0
    assert reference.differs(cache) == []
    assert left_over(cache) == []


@pytest.mark.parametrize("machine", ["mine", "elsewhere"])
def test_what_is_laid_out_waits_for_who_does_so_and_no_longer(
    server: Server, reference: Reference, tmp_path: Path, machine: str
) -> None:
    """The claim of a whole cache, left by a process that died while it laid out a group."""
    cache = tmp_path / "cache"
    cache.mkdir()
    claim = {"token": "theirs", "machine": claims._machine() if machine == "mine" else machine, "process": gone()}
    (cache / "layout.claim").write_text(json.dumps({**claim, "started": "3"}))
    began = time.monotonic()
    run = server.start(RUN, cache=cache, expiry=1.0)
    assert run.wait() == 0
    assert machine == "mine" or time.monotonic() - began > 1.0
    assert reference.differs(cache) == []
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("at", "number", "of"),
    [
        ("influence_pipeline.cache.group:write_description", 3, ""),
        ("influence_pipeline.cache.writing:ArrayWriting.appear", 2, ""),
        ("pathlib:Path.replace", 1, "/loss/c/"),
        ("influence_pipeline.cache.group:Group._record_merged", 0, ""),
    ],
    ids=["laying out", "between two arrays", "with a file half written", "merging"],
)
def test_a_process_that_was_stopped_until_it_was_taken_for_dead_goes_on_beside_who_took_its_place(
    server: Server, reference: Reference, tmp_path: Path, at: str, number: int, of: str
) -> None:
    cache = tmp_path / "cache"
    order = {"at": at, "number": number, "of": of, "when": "before", "by": signal.SIGSTOP}
    stopped = server.start("tests.faults.children:harmed", cache=cache, expiry=0.5, **order)
    until(lambda: state(stopped.process) == "T", stopped)
    assert server.start(RUN, cache=cache, expiry=0.5).wait() == 0
    stopped.signal(signal.SIGCONT)
    assert stopped.wait() == 0, stopped.said
    assert reference.differs(cache) == []
    assert left_over(cache) == []


def state(process: int) -> str:
    """Return a process's state, T where it is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def gone() -> int:
    """Return the number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


# ---- growing ---------------------------------------------------------------------------------------------------------

LARGER = {"train": 70, "tests": 13}


@pytest.fixture(scope="module")
def grown(server: Server, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a cache of which the training set and the test set got longer."""
    cache = tmp_path_factory.mktemp("grown") / "cache"
    shutil.copytree(reference.path, cache)
    run = server.start(RUN, cache=cache, **LARGER)
    assert run.wait() == 0, run.said
    return tiny.files(cache)


@pytest.mark.parametrize("seed", range(6))
def test_two_processes_that_grow_a_cache_make_the_bytes_of_one(
    server: Server, reference: Reference, grown: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    cache, draw, runs = tmp_path / "cache", random.Random(seed), []
    shutil.copytree(reference.path, cache)
    for _ in range(2):
        runs.append(server.start(RUN, cache=cache, **LARGER))
        time.sleep(draw.choice((0.0, draw.uniform(0.0, 0.05))))
    assert [run.wait() for run in runs] == [0, 0], "\n".join(run.said for run in runs)
    assert tiny.files(cache) == grown


@pytest.mark.parametrize("seed", range(4))
def test_runs_that_are_killed_while_they_grow_a_cache_go_on_to_the_same_bytes(
    server: Server, reference: Reference, grown: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    cache, draw = tmp_path / "cache", random.Random(seed)
    shutil.copytree(reference.path, cache)
    for most in (0.15, 0.2, 0.3, 0.4, 0.6):
        run = server.start(RUN, cache=cache, **LARGER)
        assert run.killed(draw.uniform(0.0, most)) in (-9, 0), run.said
    run = server.start(RUN, cache=cache, **LARGER)
    assert run.wait() == 0, run.said
    assert tiny.files(cache) == grown


# ---- looking on ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def final(reference: Reference) -> dict[tuple[str, str], np.ndarray]:
    """Return what every array holds in the end, by group and name."""
    groups = [Group(path) for path in reference.path.glob("*/*/")]
    return {
        (group.path.name, spec.name): group.array(spec.name)[...] for group in groups for spec in group.layout.stored
    }


def test_who_reads_while_another_writes_sees_only_finished_blocks(
    server: Server, reference: Reference, final: dict[tuple[str, str], np.ndarray], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    expected = ip.Influences.open(reference.path, "holdout").helpful(60)
    run = server.start(RUN, cache=cache, pause=0.01)
    looks, blocks, opened = 0, 0, 0
    while run.exit is None:
        looks += 1
        for path in (path for stage in STAGES for path in cache.glob(f"{stage}/*/zarr.json")):
            group = Group(path.parent)
            for block in group.layout.grid:
                if group.record(block) is None:
                    continue
                blocks += 1
                for spec in group.layout.stored:
                    region = spec.region(group.layout.grid, block) or ...
                    found = group.zarr_array(spec.name)[region]
                    assert found.tobytes() == final[group.path.name, spec.name][region].tobytes()
        if any(cache.glob("influence/*")):
            try:
                found = ip.Influences.open(cache, "holdout").helpful(60)
            except ip.MissingStage:
                continue
            opened += 1
            assert np.array_equal(found, expected)
    assert run.exit == 0, run.said
    assert looks > 3
    assert blocks > len(reference.records)
    assert reference.differs(cache) == []
    assert left_over(cache) == []


def test_who_verifies_while_others_write_finds_no_damage_and_disturbs_nobody(
    server: Server, reference: Reference, tmp_path: Path
) -> None:
    for number in range(3):
        cache, stop = tmp_path / str(number), tmp_path / f"{number}.stop"
        events = [tmp_path / f"{number}.{writer}.events" for writer in range(2)]
        looking = server.start("tests.faults.children:look_on", cache=cache, stop=stop)
        writing = [server.start(RUN, cache=cache, events=path) for path in events]
        assert [child.wait() for child in writing] == [0, 0], [child.said for child in writing]
        stop.touch()
        assert looking.wait() == 0, looking.said
        assert looking.value["damaged"] == []
        written = [event.record for path in events for event in read_events(path) if event.what == "writing"]
        assert sorted(written) == sorted(reference.records)
        assert reference.differs(cache) == []
        assert left_over(cache) == []


def test_a_block_that_is_finished_while_somebody_looks_for_damage_is_not_taken_for_damaged(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is written after it was looked for, and before its file is."""
    cache = tmp_path / "cache"
    shutil.copytree(reference.path, cache)
    group = Group(next(cache.glob("grad_z/*/zarr.json")).parent)
    block = group.layout.grid.block((1,))
    path = group.path / "blocks/c/1/0"
    path.rename(tmp_path / "record")
    look = Group.record

    def finished_after_the_look(self: Group, of: Any) -> Any:
        found = look(self, of)
        if not path.exists():
            shutil.copy(tmp_path / "record", path)
        return found

    monkeypatch.setattr(Group, "record", finished_after_the_look)
    assert list(group.damage([block])) == []
