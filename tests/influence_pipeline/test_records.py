"""Summaries of records say what the records say, or nothing: whatever is killed, damaged, rewritten or done twice."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache import Cache, Group, claims, records
from influence_pipeline.cache.record import NOTHING
from influence_pipeline.work import DIGESTS, Work, pending
from influence_pipeline.works import Committed
from stages.stage import Array, ArraySpec, Axis, Block, Blocks, Grid, Report, Stage, silent
from tests import tiny

Make = Callable[..., ip.Pipeline]
ATTRIBUTES: dict[str, Any] = {"stage": "grad_z", "tests": None, "reads": {}, "identity": {}}
ROWS, SEGMENT = 4, 2


class Counting(Stage):
    """Numbers from 0."""

    name = "counting"

    def __init__(self, *axes: Axis) -> None:
        self.grid = Grid(axes)
        shape = tuple(axis.length for axis in axes)
        self.arrays = (ArraySpec("number", tuple(axis.name for axis in axes), shape, "int64", about=""),)
        self.merged = (ArraySpec("total", (axes[0].name,), shape[:1], about=""),)

    def compute(self, block: Block, report: Report = silent) -> dict[str, Array]:
        raise AssertionError("blocks are written by the tests")


def work(samples: int = 26, **changes: Any) -> Work:
    """Return work of six blocks and a half."""
    return Work(Counting(Axis("sample", samples, ROWS)), "counting", **changes)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SEGMENT", SEGMENT)


@pytest.fixture
def group(cache: Path) -> Group:
    return Cache(cache).create("grad_z", "key", work().layout, ATTRIBUTES)


def write(group: Group, *numbers: int, inputs: bytes = NOTHING) -> None:
    for number in numbers:
        block = group.layout.grid.at(number)
        shape = [part.stop - part.start for part in block.bounds.values()]
        tiny.commit(group, block, {"number": np.full(shape, number)}, inputs=inputs)


def summaries(group: Group) -> set[str]:
    return {path.name for path in (group.path / records.FOLDER).glob("*")}


def none(group: Group) -> Blocks:
    """Return no block, as what is missing."""
    return Blocks(group.layout.grid, np.arange(0))


def unlike(group: Group) -> list[int]:
    """Return the blocks of which what is read at once is not what is read one by one."""
    found = group.records()
    return [
        number
        for number, block in enumerate(group.layout.grid)
        if ((record := group.record(block)) is None and found.there[number])
        or (
            record is not None
            and (record.rows, record.content) != (found.table["rows"][number], found.table["content"][number].tobytes())
        )
    ]


def missing(group: Group, of: Work | None = None) -> list[int]:
    found: list[int] = pending(of or work(), group).numbers.tolist()
    return found


def test_summaries_are_of_whole_segments_that_are_there(group: Group) -> None:
    write(group, 0, 1, 3, 4, 5)
    assert summaries(group) == {"0"}, "those before one that is being written"
    group.summarise(pending(work(), group))
    assert summaries(group) == {"0", "4"}
    assert missing(group) == [2, 6]
    write(group, 2, 6)
    group.summarise(none(group))
    assert summaries(group) == {"0", "2", "4"}, "the last is of half a segment"
    assert missing(group) == []
    assert unlike(group) == []


def test_records_are_not_read_where_there_is_a_summary(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    before, read = group.records(whole=True), []
    record = Group.record

    def counted(group: Group, block: Block) -> Any:
        read.append(block.index[0])
        return record(group, block)

    monkeypatch.setattr(Group, "record", counted)
    assert np.array_equal(group.records().table, before.table)
    assert read == [6]
    read.clear()
    assert np.array_equal(group.records(whole=True).table, before.table)
    assert len(read) == 4, "one of each"
    assert group.contents(group.layout.grid) == before.contents()


def test_stock_zarr_still_opens_records(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    found = zarr.open_array(group.path / "blocks", mode="r")
    assert found.shape[0] == 7
    assert found[...].any(axis=1).all()
    assert {name for name, _ in zarr.open_group(group.path, mode="r").arrays()} >= {"blocks", "number"}


@pytest.mark.parametrize("harm", [b"", b"half", None])
def test_a_damaged_summary_does_not_count(group: Group, harm: bytes | None) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    path = group.path / records.FOLDER / "2"
    raw = bytearray(whole := path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw) if harm is None else harm)
    assert missing(group) == []
    assert unlike(group) == []
    group.summarise(none(group))
    assert path.read_bytes() == whole
    path.write_bytes(bytes(raw) if harm is None else harm)
    assert records.discard_wrong(group) == [f"{path} is damaged"]
    assert summaries(group) == {"0", "4"}


def test_a_summary_that_says_something_else_is_found_by_looking(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    first, other = (group.path / records.FOLDER / name for name in ("0", "2"))
    other.write_bytes(first.read_bytes())
    write(group, 3, inputs=b"a" * 16)
    assert not other.exists()
    group.summarise(none(group))
    other.write_bytes(first.read_bytes())
    assert unlike(group) == [3]
    assert records.discard_wrong(group) == [f"{other} is damaged"]
    assert unlike(group) == []


def test_a_block_written_again_is_seen(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    changed = work(inputs=b"a" * 16)
    assert missing(group, changed) == list(range(7))
    write(group, 3, inputs=b"a" * 16)
    assert summaries(group) == {"0", "4"}
    assert missing(group, changed) == [0, 1, 2, 4, 5, 6]
    assert missing(group) == [3]


def test_a_block_discarded_is_missed(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    group.discard(group.layout.grid.at(5))
    assert missing(group) == [5]
    assert group.progress() == (6, 7)


def test_adopted_samples_are_seen(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    group.adopt(group.layout.grid.at(1), DIGESTS, np.zeros(0), b"b" * 16)
    assert np.flatnonzero(group.records().same("samples", b"b" * 16)).tolist() == [1]


def test_a_record_that_was_lost_is_found_when_its_block_is_read(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    (group.path / "blocks" / "c" / "2" / "0").unlink()
    (group.path / "number" / "c" / "2").unlink()
    with pytest.raises(ip.CacheDamaged, match=r"block \(2,\) of .* is not there"):
        group.array("number")[8:12]
    assert missing(group) == [2]


def test_a_file_that_was_cut_is_found_when_its_block_is_read(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    (group.path / "number" / "c" / "2").write_bytes(b"")
    with pytest.raises(ip.CacheDamaged, match="is missing or empty"):
        group.array("number")[8:12]
    assert missing(group) == [2]


def test_a_whole_array_that_was_lost_is_missed_at_once(group: Group) -> None:
    write(group, *range(7))
    group.summarise(none(group))
    for path in (group.path / "number" / "c").iterdir():
        path.unlink()
    assert missing(group) == list(range(7))
    assert summaries(group) == set()


def test_a_kill_before_the_summary_leaves_the_blocks(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(group: Group, start: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "summarise", killed)
        write(group, 0, 1, 2)
        with pytest.raises(KeyboardInterrupt):
            write(group, 3)
    assert summaries(group) == set()
    assert missing(group) == [4, 5, 6]


def test_what_a_killed_process_left_of_a_summary_is_removed(group: Group) -> None:
    write(group, *range(7))
    folder = group.path / records.FOLDER
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*"):
        path.unlink()
    (folder / "0.5f.partial").write_bytes(b"half")
    group.summarise(none(group))
    assert summaries(group) == {"0", "2", "4"}


@pytest.mark.parametrize("axis", [0, 1])
def test_summaries_of_a_grid_that_grew_are_of_their_blocks_or_of_none(cache: Path, axis: int) -> None:
    def grid(*lengths: int) -> Work:
        return Work(Counting(Axis("test", lengths[0], 1), Axis("sample", lengths[1], ROWS)), "counting")

    small, large = grid(3, 8), grid(4, 8) if axis == 0 else grid(3, 12)
    group = Cache(cache).create("grad_z", "key", small.layout, ATTRIBUTES)
    write(group, *range(6))
    group.summarise(none(group))
    stale = Group(group.path)
    assert stale.layout.grid.shape == (3, 2)
    group.resize(large.layout)
    assert unlike(group) == []
    assert len(pending(large, group)) == len(large.stage.grid) - 6
    write(group, *pending(large, group).numbers.tolist())
    group.summarise(none(group))
    assert missing(group, large) == []
    stale.discard(stale.layout.grid.block((1, 1)))  # by a process that does not know yet
    assert unlike(group) == []
    assert [block.index for block in pending(large, group)] == [(1, 1)]


def test_a_block_is_not_discarded_while_a_summary_is_written(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    write(group, *range(7))
    for path in (group.path / records.FOLDER).glob("*"):
        path.unlink()
    read, discarded = threading.Event(), threading.Event()
    one_by_one = records._one_by_one
    monkeypatch.setattr(claims, "PAUSE", 0.01)

    def slowly(*what: Any, **how: Any) -> Any:
        found = one_by_one(*what, **how)
        read.set()
        assert not discarded.wait(0.1), "the record went away while its summary was written"
        return found

    monkeypatch.setattr(records, "_one_by_one", slowly)

    def discard() -> None:
        read.wait()
        group.discard(group.layout.grid.at(0))
        discarded.set()

    other = threading.Thread(target=discard)
    other.start()
    records.summarise(group, 0)
    other.join()
    monkeypatch.undo()
    assert unlike(group) == []
    assert not group.records().there[0]


def rewrite(path: Path, seed: int, segment: int) -> None:
    """Write, discard and sum up random blocks, as one of several processes."""
    plan.SEGMENT = segment
    group, random = Group(path), np.random.default_rng(seed)
    for _ in range(30):
        number = int(random.integers(7))
        claim = group.claim(group.layout.grid.at(number))
        if claim is not None:
            with claim:
                if random.random() < 0.3:
                    group.discard(group.layout.grid.at(number))
                write(group, number, inputs=random.bytes(16))
        group.summarise(none(group))


def test_processes_that_rewrite_blocks_and_write_summaries_lose_nothing(group: Group) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=rewrite, args=(group.path, seed, SEGMENT)) for seed in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert unlike(group) == []
    group.summarise(pending(work(), group))
    assert unlike(group) == []


def test_sizes_are_those_of_all_files(group: Group) -> None:
    write(group, *range(7))
    group.commit_merged({"total": np.ones(26, np.float32)})
    group.summarise(none(group))
    files = tiny.files(group.path)
    assert group.size()[:2] == (sum(map(len, files.values())), len(files))
    assert len(files) == group.layout.file_count
    assert group.size()[2] > 0


def test_rows_that_are_there_are_known_without_a_list(group: Group) -> None:
    write(group, 0, 2, 6)
    there = Committed(group)
    expected = [*range(4), *range(8, 12), 24, 25]
    assert list(there) == expected
    assert len(there) == len(expected)
    assert there[-1] == 25
    assert there[:5] == expected[:5]
    assert [row for row in range(30) if row in there] == expected


@pytest.fixture
def summarised(make: Make, monkeypatch: pytest.MonkeyPatch) -> ip.Pipeline:
    pipeline = make(s_test={"solver": "identity"})
    pipeline.run()
    return pipeline


def test_a_run_finds_all_of_it_with_summaries(summarised: ip.Pipeline, make: Make) -> None:
    group = next(summarised.cache.groups("grad_z"))
    assert summaries(group) == {"0", "2"}
    found = make(s_test={"solver": "identity"}).plan()
    assert found.complete
    assert [stage.files for stage in found.stages] == [stage.files_expected for stage in found.stages]
    before = tiny.files(summarised.cache.path)
    make(s_test={"solver": "identity"}).run()
    assert tiny.files(summarised.cache.path) == before


def test_changed_gradients_make_scores_of_them_missing(summarised: ip.Pipeline, make: Make) -> None:
    group = next(summarised.cache.groups("grad_z"))
    block = group.layout.grid.at(1)
    record = group.record(block)
    assert record is not None
    group.discard(block)
    found = make(s_test={"solver": "identity"}).plan()
    assert found["grad_z"].done == found["grad_z"].total - 1
    assert not found["influence"].complete
    before = tiny.files(summarised.cache.path)
    make(s_test={"solver": "identity"}).run()
    after = tiny.files(summarised.cache.path)
    assert before.items() <= after.items()
    assert group.record(block) == record


def test_verify_mends_summaries(summarised: ip.Pipeline, make: Make) -> None:
    group = next(summarised.cache.groups("grad_z"))
    path = group.path / records.FOLDER / "0"
    path.write_bytes(path.read_bytes()[::-1])
    found = make(s_test={"solver": "identity"}).verify()
    assert found.damaged == [f"{path} is damaged"]
    make(s_test={"solver": "identity"}).run()
    assert not make(s_test={"solver": "identity"}).verify().damaged
    assert path.exists()
