from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from stages import prefetch
from stages.prefetch import ahead

PARTS = [[0, 1], [2], [], [3, 4, 5], [6]]


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not running()


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_parts_come_in_order_and_each_is_read_once_by_the_thread(depth: int) -> None:
    by: list[tuple[int, str]] = []

    def read(i: int) -> int:
        by.append((i, threading.current_thread().name))
        return 10 * i

    assert list(ahead(read, PARTS, depth)) == [[10 * i for i in part] for part in PARTS]
    assert by == [(i, "read-ahead") for i in range(7)]


def test_no_parts_give_nothing() -> None:
    assert not list(ahead(str, []))


def test_it_reads_while_the_caller_computes_and_only_so_far_ahead() -> None:
    read: list[int] = []
    reader = ahead(lambda i: read.append(i), ([i] for i in itertools.count()), depth=2)
    next(reader)
    deadline = time.monotonic() + 10
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert read == [0, 1, 2]
    reader.close()


@pytest.mark.parametrize("raised", [ValueError("sample 3"), SystemExit(4), KeyboardInterrupt()], ids=repr)
def test_what_reading_raises_is_raised_by_the_callers_own_thread(raised: BaseException) -> None:
    threads: list[str] = []

    def read(i: int) -> int:
        if i == 3:
            threads.append(threading.current_thread().name)
            raise raised
        return i

    found: list[list[int]] = []
    with pytest.raises(type(raised)) as caught:  # noqa: PT012 - what came before is compared too
        for part in ahead(read, PARTS):
            found.append(part)  # noqa: PERF402
    assert caught.value is raised
    assert found == PARTS[:3]
    assert threads == ["read-ahead", threading.current_thread().name]


def test_what_only_the_callers_thread_may_read_is_read_there() -> None:
    home = threading.get_ident()

    def read(i: int) -> int:
        if threading.get_ident() != home:
            raise RuntimeError("objects created in a thread can only be used in that same thread")
        return i

    assert list(ahead(read, PARTS)) == PARTS


def test_parts_that_raise_do_so_in_the_caller() -> None:
    def parts() -> Iterator[list[int]]:
        yield [1]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ahead(str, parts()))


def test_an_interrupt_in_the_caller_ends_the_thread_after_the_one_read_under_way() -> None:
    read: list[int] = []

    def slow(i: int) -> int:
        read.append(i)
        time.sleep(0.05)
        return i

    reader = ahead(slow, [list(range(100 * k, 100 * k + 2 + 98 * (k > 0))) for k in range(3)])
    assert next(reader) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        reader.throw(KeyboardInterrupt())
    assert not running()
    assert len(read) <= 5, "the rest of the part under way is not read"


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE", 0.1)
    released, hangs = threading.Event(), threading.Event()

    def read(i: int) -> int:
        if i == 2:
            hangs.set()
            released.wait(30)
        return i

    reading = prefetch.ahead(read, [[i] for i in range(9)])
    assert next(reading) == [0]
    assert hangs.wait(10)
    began = time.monotonic()
    reading.close()
    assert time.monotonic() - began < 5
    released.set()
    for thread in running():
        thread.join(10)
