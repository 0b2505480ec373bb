"""Claims: one owner at a time, and none for good."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from influence_pipeline.cache import claims


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "3.claim"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """Have claims expire soon."""
    monkeypatch.setattr(claims, "EXPIRY", 0.3)
    return 0.3


def of(machine: str, process: int = 1) -> str:
    return json.dumps({"token": "theirs", "machine": machine, "process": process, "started": "1"})


def gone() -> int:
    """Return the number of a process that is no more."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_is_claimed_is_not_claimed_again_until_released(path: Path) -> None:
    claim = claims.take(path)
    assert claim is not None
    assert claim.held()
    assert claims.take(path) is None
    assert claims.taken(path) == f"process {os.getpid()} on {os.uname().nodename}"
    claim.release()
    assert list(path.parent.iterdir()) == []
    assert claims.taken(path) is None
    assert claims.take(path) is not None


def test_of_many_that_claim_at_once_one_does(path: Path) -> None:
    found, start = [], threading.Barrier(16)

    def claim() -> None:
        start.wait()
        found.append(claims.take(path))

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in found) == 1
    assert [p.name for p in path.parent.iterdir()] == ["3.claim"]


def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(path: Path) -> None:
    path.write_text(of(claims._machine(), gone()))
    assert claims.taken(path) is None
    claim = claims.take(path)
    assert claim is not None
    assert claim.held()
    assert [p.name for p in path.parent.iterdir()] == ["3.claim"]


def test_a_process_number_that_is_used_again_is_not_the_owner(path: Path) -> None:
    path.write_text(of(claims._machine(), os.getpid()))
    assert claims.take(path) is not None


def test_a_claim_of_another_machine_holds_while_it_is_touched(path: Path, soon: float) -> None:
    path.write_text(of("elsewhere"))
    for _ in range(8):
        assert claims.take(path) is None
        time.sleep(soon / 4)
        os.utime(path)
    assert claims.taken(path) == "process 1 on elsewhere"
    assert claims.take(path) is None
    time.sleep(1.2 * soon)
    claim = claims.take(path)
    assert claim is not None
    assert claim.held()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"token": 3}'])
def test_a_claim_that_says_nothing_expires(path: Path, soon: float, content: str) -> None:
    path.write_text(content)
    assert claims.take(path) is None
    assert claims.taken(path) is not None
    time.sleep(1.2 * soon)
    assert claims.take(path) is not None


def test_an_owner_touches_its_claims(path: Path, soon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_heart", claims._Heart())
    claim = claims.take(path)
    assert claim is not None
    os.utime(path, ns=(1, 1))
    deadline = time.monotonic() + 15
    while path.stat().st_mtime_ns == 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.stat().st_mtime_ns > 1
    claim.release()


def test_an_owner_that_was_taken_for_dead_finds_out_and_leaves_the_new_one_alone(path: Path) -> None:
    mine = claims.take(path)
    assert mine is not None
    path.write_text(of("elsewhere"))
    assert not mine.held()
    mine.release()
    assert path.exists()
    path.unlink()
    assert not mine.held()


def test_a_claim_made_while_a_dead_one_was_being_removed_is_put_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(of(claims._machine(), gone()))
    rename, faster = Path.rename, []

    def late(self: Path, target: Path) -> Path:
        if not faster:
            faster.append(True)
            self.write_text(of("elsewhere").replace("theirs", "faster"))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert claims.take(path) is None
    assert json.loads(path.read_text())["machine"] == "elsewhere"
    assert [p.name for p in path.parent.iterdir()] == ["3.claim"]


def test_file_systems_without_hard_links_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    claim = claims.take(path)
    assert claim is not None
    assert claim.held()
    assert claims.take(path) is None
    claim.release()
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        claims.take(tmp_path / "gone" / "3.claim")


def test_whoever_needs_it_alone_waits_for_the_others(path: Path) -> None:
    order = []

    def second() -> None:
        with claims.exclusively(path):
            order.append("second")

    with claims.exclusively(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def count(path: Path, total: Path) -> None:
    for _ in range(20):
        with claims.exclusively(path):
            total.write_text(str(int(total.read_text()) + 1))


def test_processes_take_turns(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PAUSE", 0.001)
    total = tmp_path / "total"
    total.write_text("0")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=count, args=(path, total)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert total.read_text() == "60"
