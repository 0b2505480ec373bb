"""Disks that are full, that refuse to be written, and that go away: an error that says so, and nothing lost by it.

Every full disk here is a real one of some pages, where one can be mounted; the name of each test says which way was
used (see ``small_disk``).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

import influence_pipeline as ip
from influence_pipeline import room
from influence_pipeline.cache import Cache, Group
from influence_pipeline.cache.writing import ArrayWriting
from influence_pipeline.cli import app
from influence_pipeline.plan import show_bytes
from stages.influence import Influence
from tests import tiny
from tests.faults import small_disk
from tests.faults.small_disk import PAGE, Disk

Make = Callable[..., ip.Pipeline]
Computed = list[tuple[str, ...]]
MOMENTS = 20
"""Points at which a disk gets full."""
PAGES = 1024
"""Of a small disk: four times what a finished cache of the tiny experiment takes."""
WAY = small_disk.way()


@pytest.fixture(params=[WAY])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Return a small disk; the test's name says how it was made."""
    with small_disk.small_disk(tmp_path / "disk", PAGES) as made:
        yield made


@pytest.fixture
def no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody ask beforehand whether the disk has room."""
    monkeypatch.setattr(room, "free_bytes", lambda path: 2**50)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """Return the list to which every block is added that is written from now on."""
    found: Computed = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        done = commit(group, block, *args, **kwargs)
        found.append((group.path.parent.name, group.path.name, *map(str, block.index)))
        return done

    monkeypatch.setattr(Group, "commit", committed)
    return found


def kept_blocks(folder: Path) -> set[tuple[str, ...]]:
    """Return all blocks that have a record, after checking that each is whole and that nothing half done lies about."""
    assert leftovers(folder) == []
    if not folder.exists():
        return set()
    found = set()
    cache = Cache(folder)
    for stage in ("grad_z", "curvature", "s_test", "influence"):
        for group in cache.groups(stage):
            assert list(group.damage(group.layout.grid)) == []
            assert group.damage_of_merged() is None
            for block in group.layout.grid:
                if group.record(block) is not None:
                    assert group.whole(block)
                    found.add((stage, group.path.name, *map(str, block.index)))
    assert found == tiny.blocks(folder)
    return found


def leftovers(folder: Path) -> list[Path]:
    """Return claims and partial files; where one chunk was refused, others may be under way a little longer."""
    end = time.monotonic() + 2
    while True:
        found = [path for pattern in ("*.partial", "*.claim") for path in folder.rglob(pattern)]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


def half_written(folder: Path) -> int:
    """Count blocks that have files and no record."""
    count = 0
    for stage in ("grad_z", "curvature", "s_test", "influence"):
        for group in Cache(folder).groups(stage):
            for block in group.layout.grid:
                there = any((group.path / name).exists() for name in group.layout.block_files(block))
                count += there and group.record(block) is None
    return count


def goes_on(make: Callable[[], ip.Pipeline], folder: Path, computed: Computed, kept: set[tuple[str, ...]]) -> None:
    """Run again, and check that what was kept is not computed again, and that everything else is, once."""
    computed.clear()
    pipeline = make()
    pipeline.run()
    assert not kept & set(computed)
    assert len(computed) == len(set(computed))
    assert kept | set(computed) == tiny.blocks(folder)
    assert pipeline.plan().complete
    assert leftovers(folder) == []


# ---- a full disk -----------------------------------------------------------------------------------------------------


def pages(folder: Path) -> int:
    """Return the pages that a folder's files take on a small disk."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, finished: Path, moment: int
) -> None:
    folder = disk.path / "cache"
    disk.leave(moment * pages(finished) // MOMENTS)
    with pytest.raises(ip.WorkError, match="No space left on device") as refused:
        make(folder).run()
    assert refused.value.exit_code == 1
    assert str(folder) in str(refused.value)
    # A group that could not be laid out leaves nothing.
    assert disk.free_pages <= 2 or "cannot be written" in str(refused.value)
    kept = kept_blocks(folder)
    assert kept == set(computed)
    disk.lighten()
    goes_on(lambda: make(folder), folder, computed, kept)
    assert tiny.files(folder) == tiny.files(finished)


def test_a_ballast_that_shrinks_step_by_step_lets_every_run_get_further(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, finished: Path
) -> None:
    folder = disk.path / "cache"
    stopped = dict.fromkeys(("cannot be written", "block", "inside a block", "merged"), 0)
    kept: set[tuple[str, ...]] = set()
    steps = range(5, pages(finished), 9)
    for held in steps:
        disk.leave(held - (pages(folder) if folder.exists() else 0))
        with pytest.raises(ip.WorkError, match="No space left on device") as refused:
            make(folder).run()
        now = kept_blocks(folder)
        assert kept <= now
        kept = now
        for what in ("cannot be written", "block", "merged"):
            stopped[what] += bool(re.search(rf"\b{what}\b", str(refused.value)))
        stopped["inside a block"] += half_written(folder) > 0
    disk.lighten()
    make(folder).run()
    assert len(computed) == len(set(computed)) == len(tiny.blocks(folder))
    assert tiny.files(folder) == tiny.files(finished)
    assert all(stopped.values()), stopped


@pytest.mark.parametrize("moment", range(3))
def test_a_disk_without_inodes_is_a_full_one(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, finished: Path, moment: int
) -> None:
    """Files and folders run out before bytes do, as they do on disks of many small files."""
    folder = disk.path / "cache"
    needed = 2 + sum(1 for _ in finished.rglob("*"))
    disk.set_inodes(disk.inodes + 1 + moment * needed // 3)
    with pytest.raises(ip.WorkError, match="No space left on device"):
        make(folder).run()
    kept = kept_blocks(folder)
    disk.set_inodes(10 * needed)
    goes_on(lambda: make(folder), folder, computed, kept)
    assert tiny.files(folder) == tiny.files(finished)


def test_a_disk_that_is_full_when_blocks_are_merged(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, finished: Path
) -> None:
    folder = disk.path / "cache"
    shutil.copytree(finished, folder)
    for record in folder.glob("*/*/finished/c/0"):
        record.unlink()
        for free in (0, 1):
            disk.leave(free)
            with pytest.raises(ip.WorkError, match="No space left on device") as refused:
                make(folder).run()
            assert "merged" in str(refused.value)
            assert len(kept_blocks(folder)) == len(tiny.blocks(finished))
        disk.lighten()
        make(folder).run()
        assert computed == []
        assert tiny.files(folder) == tiny.files(finished)


def test_a_claim_that_there_is_no_room_for_is_not_left_half_made(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk without hard links, too; a claim that says nothing would be waited for."""

    def link(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "no hard links")

    folder = disk.path / "cache"
    shutil.copytree(finished, folder)
    for record in folder.glob("grad_z/*/blocks/c/1/0"):
        record.unlink()
    monkeypatch.setattr(os, "link", link)
    disk.leave(1)
    with pytest.raises(ip.WorkError, match="No space left on device"):
        make(folder).run()
    kept = kept_blocks(folder)
    disk.lighten()
    goes_on(lambda: make(folder), folder, computed, kept)
    assert tiny.files(folder) == tiny.files(finished)


def wide() -> dict[str, Any]:
    """Return an experiment of 4003 coordinates, whose files take many pages."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 400), torch.nn.Tanh(), torch.nn.Linear(400, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
    return {"model": model, "s_test": {"solver": "identity"}}


@pytest.mark.parametrize("moment", range(3))
def test_a_disk_that_is_full_in_the_middle_of_a_file(
    disk: Disk, make: Make, no_refusal: None, computed: Computed, tmp_path: Path, moment: int
) -> None:
    fresh, folder = tmp_path / "fresh", disk.path / "cache"
    make(fresh, **wide()).run()
    sizes = sorted(fresh.glob("grad_z/*/gradients/c/*/*")), sorted(fresh.glob("s_test/*/vectors/c/*/*"))
    assert all(path.stat().st_size > 4 * PAGE for paths in sizes for path in paths)
    computed.clear()
    if moment < 2:
        free = 1 + len(list(fresh.glob("grad_z/**/zarr.json"))) + 1 + 3 + 22 * moment
    else:
        make(folder, **wide()).grad_z()
        free = len(list(fresh.glob("s_test/**/zarr.json"))) + 1 + 3 + 18 * (moment - 2)
    disk.leave(free)
    with pytest.raises(ip.WorkError, match=r"block \(\d,\) could not be written.*No space left on device"):
        make(folder, **wide()).run()
    kept = kept_blocks(folder)
    disk.lighten()
    goes_on(lambda: make(folder, **wide()), folder, computed, kept)
    assert tiny.files(folder) == tiny.files(fresh)


@pytest.mark.parametrize(("free", "large"), [(0, False), (14, False), (20, False), (4, True)])
def test_a_disk_that_is_full_while_blocks_are_written_again(
    disk: Disk, make: Make, no_refusal: None, finished: Path, tmp_path: Path, free: int, large: bool
) -> None:
    """The training set grew: its last block of gradients and what comes of it are written anew, over what is there."""
    folder, fresh = disk.path / "cache", tmp_path / "fresh"
    changes = wide() if large else {}
    if large:
        make(folder, **changes).grad_z()
    else:
        shutil.copytree(finished, folder)
    changes["train"] = tiny.points(64 if large else 70, 1)
    make(fresh, **changes).run()
    disk.leave(free)
    with pytest.raises(ip.WorkError, match="No space left on device"):
        make(folder, **changes).run()
    assert leftovers(folder) == []
    for path in folder.glob("*/*/blocks"):
        group = Group(path.parent)
        assert list(group.damage(group.layout.grid)) == []
    disk.lighten()
    make(folder, **changes).run()
    assert tiny.files(folder) == tiny.files(fresh)


# ---- room, asked beforehand ------------------------------------------------------------------------------------------


@pytest.fixture
def no_spare(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have room for all that is free, on disks that have less than what is spared elsewhere."""
    monkeypatch.setattr(room, "SPARE", 0)
    if WAY == "patched":
        monkeypatch.setattr(room, "free_bytes", lambda path: disk.free_pages * PAGE)


def refusal(make: Callable[[], Any]) -> str:
    """Return with what a run is refused."""
    with pytest.raises(ip.RequestError) as refused:
        make()
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_a_disk_with_less_than_the_spare_is_refused_with_numbers(disk: Disk, project: Path) -> None:
    text = project.read_text().replace('"runs"', f'"{disk.path / "cache"}"')
    project.write_text(text)
    assert room.SPARE > PAGES * PAGE
    if WAY == "patched":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "free_bytes", lambda path: disk.free_pages * PAGE)
            result = CliRunner().invoke(app, ["run", str(project)])
    else:
        result = CliRunner().invoke(app, ["run", str(project)])
    assert result.exit_code == 2, result.output
    assert re.search(r"error: grad_z needs [\d.]+ KiB more \(before compression\), .* has 0 B free", result.stderr)
    assert "store = false" in result.stderr
    assert "cache on another disk" in result.stderr
    assert kept_blocks(disk.path / "cache") == set()


def test_less_than_one_block_is_refused_before_anything_is_computed(
    disk: Disk, make: Make, no_spare: None, computed: Computed
) -> None:
    folder = disk.path / "cache"
    disk.leave(40)
    said = refusal(lambda: make(folder, **wide()).run())
    free = show_bytes(disk.free_pages * PAGE)
    assert re.search(rf"grad_z needs [45]\d\d KiB more \(before compression\), .*{folder}.* has {free} free", said)
    assert computed == []
    assert kept_blocks(folder) == set()
    disk.lighten()
    make(folder, **wide()).run()
    assert make(folder, **wide()).plan().complete


ADVICE: dict[str, tuple[str, dict[str, Any]]] = {
    "encoding": ('[grad_z] encoding = "float16" (D = 4003: ', {"grad_z": {"encoding": "float16"}}),
    "parameters": (
        '[grad_z] parameters = ["2.*"] (D = 1203: ',
        {"grad_z": {"encoding": "float32", "parameters": ["2.*"]}},
    ),
    "store": ("[grad_z] store = false", {"grad_z": {"encoding": "float32", "store": False}}),
}


@pytest.mark.parametrize("advice", ADVICE)
def test_what_is_refused_after_one_block_fits_as_the_refusal_says(
    disk: Disk, make: Make, no_spare: None, computed: Computed, advice: str
) -> None:
    """Before the first block nobody knows how far it can be compressed; what is advised then does fit."""
    text, changes = ADVICE[advice]
    folder, exact = disk.path / "cache", {**wide(), "grad_z": {"encoding": "float32"}}
    disk.leave(215)
    said = refusal(lambda: make(folder, **exact).grad_z())
    free = show_bytes(disk.free_pages * PAGE)
    assert re.search(
        rf"grad_z needs 6\d\d KiB more \(measured on the blocks that are there\), .*{folder}.* has {free} free", said
    )
    assert text in said
    assert [block[0] for block in computed] == ["grad_z"]
    assert kept_blocks(folder) == set(computed)
    again = refusal(lambda: make(folder, **exact).grad_z())
    assert again == said
    assert len(computed) == 1
    shutil.rmtree(folder)
    followed = make(folder, **{**exact, **changes, "s_test": {"solver": "identity"}})
    if advice == "store":
        disk.leave(260)  # the other stages, too, need some
        followed.run()
        assert not list(folder.glob("grad_z/*"))
    else:
        assert followed.grad_z().computed == 4
    assert leftovers(folder) == []


def test_a_block_is_measured_where_the_bound_does_not_fit(
    disk: Disk, make: Make, no_spare: None, computed: Computed
) -> None:
    """Gradients that are mostly zero take far less than their bound."""
    labels = torch.arange(60) % 3
    inputs = torch.zeros(60, 2000)
    inputs[torch.arange(60), torch.arange(60)] = 1.0
    model = torch.nn.Linear(2000, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    sparse: dict[str, Any] = {
        "model": model,
        "train": TensorDataset(inputs, labels),
        "tests": {"holdout": TensorDataset(inputs[:10], labels[:10])},
        "s_test": {"solver": "identity"},
    }
    folder = disk.path / "cache"
    disk.leave(90 + 150)
    bound = make(folder, **sparse).plan()["grad_z"].bytes_expected
    make(folder, **sparse).grad_z()
    assert len(computed) == 4
    assert bound > 160 * PAGE > 100 * PAGE > pages(folder) * PAGE
    shutil.rmtree(folder)
    computed.clear()
    disk.leave(bound // PAGE - 20)
    asked: list[int] = []
    ask = room.refuse
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any) -> Any:
            asked.append(len(args[-1]))
            return ask(*args)

        patch.setattr(room, "refuse", spy)
        make(folder, **sparse).grad_z()
    assert asked == [4, 3], "one block, and then the others, which by its measure fit"
    assert len(computed) == 4


def test_another_stage_is_refused_with_numbers_too(
    disk: Disk, make: Make, no_spare: None, computed: Computed, tmp_path: Path
) -> None:
    folder = disk.path / "cache"
    make(folder, **wide()).grad_z()
    computed.clear()
    disk.leave(35)
    said = refusal(lambda: make(folder, **wide()).run())
    assert re.search(r"s_test holdout needs [\d.]+ KiB more \(.*\), .* has [\d.]+ KiB free", said)
    assert "`gc`" in said
    kept = kept_blocks(folder)
    disk.lighten()
    goes_on(lambda: make(folder, **wide()), folder, computed, kept)
    make(tmp_path / "fresh", **wide()).run()
    assert tiny.files(folder) == tiny.files(tmp_path / "fresh")


# ---- a disk that refuses writing -------------------------------------------------------------------------------------


@pytest.fixture
def read_only(disk: Disk, finished: Path) -> Path:
    """Return a finished cache on a disk that cannot be written."""
    shutil.copytree(finished, disk.path / "cache")
    disk.set_read_only()
    with pytest.raises(OSError, match="Read-only"):
        (disk.path / "cache" / "new").write_text("")
    return disk.path / "cache"


def test_a_finished_cache_that_cannot_be_written_is_complete(
    read_only: Path, make: Make, computed: Computed, finished: Path
) -> None:
    pipeline = make(read_only)
    assert pipeline.plan().complete
    assert pipeline.garbage() == []
    assert pipeline.grad_z().computed == 0
    assert pipeline.s_test("holdout").computed == 0
    influences = pipeline.run()["holdout"]
    assert (influences.scores[:] == ip.Influences.open(finished, "holdout").scores[:]).all()
    found = make(read_only).verify(sample=3)
    assert found.exit_code == 0
    assert found.rows == 3
    assert make(read_only).refresh() == make(read_only).accept_data() == {}
    assert computed == []


def test_everything_of_a_finished_cache_that_cannot_be_written_can_be_read(
    read_only: Path, finished: Path, tmp_path: Path
) -> None:
    influences, expected = (ip.Influences.open(folder, "holdout") for folder in (read_only, finished))
    for k in (1, 5, 60):
        for side in ("helpful", "harmful", "helpful_on_average", "harmful_on_average"):
            for found, wanted in zip(getattr(influences, side)(k), getattr(expected, side)(k), strict=True):
                np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(influences.scores[:], expected.scores[:])
    np.testing.assert_array_equal(influences.mean_scores(), expected.mean_scores())
    np.testing.assert_array_equal(influences.residual, expected.residual)
    np.testing.assert_array_equal(influences.offset, expected.offset)
    for found, wanted in zip(influences.labels(), expected.labels(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert influences.damping == expected.damping
    assert influences.gradient_norm == expected.gradient_norm
    assert influences.to_xarray().identical(expected.to_xarray())
    for name, of in (("found", influences), ("wanted", expected)):
        of.to_json(tmp_path / name)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


@pytest.mark.parametrize("command", ["run", "plan", "status", "show", "verify", "gc"])
def test_every_command_that_computes_nothing_works_on_a_disk_that_cannot_be_written(
    read_only: Path, project: Path, command: str
) -> None:
    project.write_text(project.read_text().replace('"runs"', f'"{read_only}"'))
    result = CliRunner().invoke(app, [command, str(project)])
    assert result.exit_code == 0, result.output


def lost_record(folder: Path) -> None:
    next(folder.glob("grad_z/*/blocks/c/1/0")).unlink()


def lost_merging(folder: Path) -> None:
    next(folder.glob("influence/*/finished/c/0")).unlink()


def lost_group(folder: Path) -> None:
    shutil.rmtree(next(folder.glob("s_test/*/zarr.json")).parent)


def lost_root(folder: Path) -> None:
    (folder / "zarr.json").unlink()


def lost_description(folder: Path) -> None:
    next(folder.glob("grad_z/*/norm/zarr.json")).unlink()


def lost_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def nothing_lost(folder: Path) -> None:
    pass


LOSSES = (lost_record, lost_merging, lost_group, lost_root, lost_description, lost_everything)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_an_unfinished_cache_that_cannot_be_written_is_an_error_that_says_so(
    disk: Disk, make: Make, computed: Computed, finished: Path, loss: Callable[[Path], None], no_refusal: None
) -> None:
    folder = disk.path / "cache"
    shutil.copytree(finished, folder)
    loss(folder)
    disk.set_read_only()
    with pytest.raises(ip.WorkError, match="Read-only file system") as refused:
        make(folder).run()
    assert refused.value.exit_code == 1
    assert str(folder) in str(refused.value)
    assert computed == []
    if loss in {lost_record, lost_group, lost_everything, lost_merging}:
        assert not make(folder).plan().complete


def test_more_samples_on_a_disk_that_cannot_be_written_are_an_error_that_says_so(read_only: Path, make: Make) -> None:
    for grown in ({"train": tiny.points(70, 1)}, {"tests": {"holdout": tiny.points(13, 2)}}):
        with pytest.raises(ip.WorkError, match="Read-only file system"):
            make(read_only, **grown).run()
    assert make(read_only).plan().complete


def test_what_a_killed_run_left_does_not_matter_on_a_disk_that_cannot_be_written(
    disk: Disk, make: Make, finished: Path
) -> None:
    """Nothing is missing, so that nothing has to be tidied."""
    folder = disk.path / "cache"
    shutil.copytree(finished, folder)
    (folder / "grad_z" / "zarr.5f.partial").write_text("half")
    disk.set_read_only()
    make(folder).run()


# ---- a cache that goes away ------------------------------------------------------------------------------------------


class Acting(Dataset[Any]):
    """A data set that does something when a sample is fetched and it is time."""

    def __init__(self, data: TensorDataset, position: int, now: Callable[[], bool], action: Callable[[], None]) -> None:
        self.data, self.position, self.now, self.action = data, position, now, action

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Any:
        if position == self.position and self.now():
            self.action()
        return self.data[position]


def remove(folder: Path) -> None:
    while folder.exists():  # what is being written meanwhile makes it fail
        shutil.rmtree(folder, ignore_errors=True)


def remove_from_another_thread(folder: Path) -> None:
    thread = threading.Thread(target=remove, args=(folder,))
    thread.start()
    thread.join()


def has_blocks(cache: Path, stage: str, count: int) -> bool:
    return len(list(cache.glob(f"{stage}/*/blocks/c/*/0"))) >= count


def gone(make: Callable[[], ip.Pipeline], cache: Path, computed: Computed, finished: Path) -> None:
    """Check the error of a run whose cache goes away, and that the next run makes all of it."""
    with pytest.raises(ip.WorkError) as lost:
        make().run()
    assert lost.value.exit_code == 1
    assert str(cache) in str(lost.value)
    assert re.search(r"gone|No such file|is missing", str(lost.value)), str(lost.value)
    assert not cache.exists() or leftovers(cache) == []


@pytest.mark.parametrize(("data", "position", "stage", "count", "remover"), [
    ("train", 0, "grad_z", 0, remove), ("train", 40, "grad_z", 1, remove_from_another_thread),
    ("train", 59, "grad_z", 4, remove), ("tests", 9, "s_test", 1, remove_from_another_thread),
])  # fmt: skip
def test_a_cache_that_goes_away_while_samples_are_read(
    make: Make,
    cache: Path,
    computed: Computed,
    finished: Path,
    data: str,
    position: int,
    stage: str,
    count: int,
    remover: Callable[[Path], None],
) -> None:
    fired: list[None] = []

    def now() -> bool:
        there = cache.exists() and has_blocks(cache, stage, count) and not fired
        fired.extend([None] * there)
        return there

    def acting(points: TensorDataset) -> Acting:
        return Acting(points, position, now, lambda: remover(cache))

    changes = (
        {"train": acting(tiny.points(60, 1))} if data == "train" else {"tests": {"holdout": acting(tiny.points(10, 2))}}
    )
    gone(lambda: make(**changes), cache, computed, finished)
    assert fired
    goes_on(make, cache, computed, set())
    assert tiny.files(cache) == tiny.files(finished)


@pytest.mark.parametrize("block", [7, 12])
def test_a_cache_that_goes_away_while_scores_are_computed(
    make: Make, cache: Path, computed: Computed, finished: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Twelve blocks of scores, and then they are merged."""
    calls: list[None] = []
    compute, finish = Influence.compute, Influence.finish

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(stage: Influence, *args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == block + 1:
                remove(cache)
            return method(stage, *args, **kwargs)

        return call

    monkeypatch.setattr(Influence, "compute", counted(compute))
    monkeypatch.setattr(Influence, "finish", counted(finish))
    gone(make, cache, computed, finished)
    goes_on(make, cache, computed, set())
    assert tiny.files(cache) == tiny.files(finished)


@pytest.mark.parametrize(("write", "whole"), [
    (3, True), (20, True), (60, False), (134, True),
])  # fmt: skip
def test_a_cache_that_goes_away_while_a_block_is_written(
    make: Make,
    cache: Path,
    computed: Computed,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
    whole: bool,
) -> None:
    calls: list[None] = []
    appear = ArrayWriting.appear

    def counted(writing: ArrayWriting) -> Any:
        calls.append(None)
        if len(calls) == write + 1:
            remove(cache if whole else writing.group.path)
        return appear(writing)

    monkeypatch.setattr(ArrayWriting, "appear", counted)
    gone(make, cache, computed, finished)
    goes_on(make, cache, computed, tiny.blocks(cache) if cache.exists() else set())
    assert tiny.files(cache) == tiny.files(finished)


@pytest.mark.parametrize("stage", ["grad_z", "curvature", "s_test"])
def test_an_input_that_goes_away_while_scores_are_computed_is_named_or_made_again(
    make: Make, cache: Path, computed: Computed, finished: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    calls: list[None] = []
    compute = Influence.compute

    def counted(self: Influence, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 6:
            remove(next(cache.glob(f"{stage}/*/zarr.json")).parent)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Influence, "compute", counted)
    said = str(cache / stage)
    try:
        make().run()
    except ip.WorkError as lost:
        said = str(lost)
    # What is of a curvature that is gone is not there either.
    assert str(cache / stage) in said or (stage == "curvature" and "s_test of holdout is not complete" in said)
    assert said == str(cache / stage) or re.search(r"gone|No such file|is missing|not there|removed", said), said
    kept = tiny.blocks(cache)
    goes_on(make, cache, computed, kept)
    assert tiny.files(cache) == tiny.files(finished)


# ---- a folder that cannot be made ------------------------------------------------------------------------------------


def test_a_folder_below_a_file_cannot_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file" / "cache", tmp_path / "file" / "further" / "cache"):
        pipeline = make(folder)
        assert not pipeline.plan().complete
        with pytest.raises(ip.WorkError, match=rf"cache {folder} cannot be written: .*Not a directory"):
            pipeline.run()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_on_a_disk_that_cannot_be_written_cannot_be_made(disk: Disk, make: Make, no_refusal: None) -> None:
    disk.set_read_only()
    folder = disk.path / "further" / "cache"
    pipeline = make(folder)
    assert not pipeline.plan().complete
    with pytest.raises(ip.WorkError, match=rf"cache {folder} cannot be written: .*Read-only file system"):
        pipeline.run()


def test_a_file_is_no_cache(make: Make, cache: Path) -> None:
    cache.write_text("precious")
    with pytest.raises(ip.RequestError, match=f"cache {cache} is a file"):
        make()
    assert cache.read_text() == "precious"


@pytest.mark.parametrize("command", ["run", "plan", "status", "show"])
def test_commands_refuse_a_file_as_a_cache(project: Path, command: str) -> None:
    (project.parent / "runs").write_text("precious")
    result = CliRunner().invoke(app, [command, str(project)])
    assert result.exit_code == 2
    assert re.fullmatch(r"error: cache .*/runs is a file: name a folder\n", result.stderr)


@pytest.mark.parametrize("target", ["absent", "cache", "file"], ids=["dangling", "to itself", "to a file"])
def test_a_symlink_to_no_folder_is_named(make: Make, cache: Path, target: str) -> None:
    (cache.parent / "file").write_text("precious")
    cache.symlink_to(cache.parent / target)
    with pytest.raises(ip.InfluenceError, match=rf"cache {cache}") as refused:
        make().run()
    said = str(refused.value).replace(str(cache), "")
    assert re.search("symlink|symbolic link|is a file", said), said
    assert cache.is_symlink()
    assert not (cache.parent / "absent").exists()


def test_a_symlink_to_a_folder_is_as_good_as_the_folder(make: Make, cache: Path, finished: Path) -> None:
    (cache.parent / "elsewhere").mkdir()
    cache.symlink_to(cache.parent / "elsewhere")
    make().run()
    assert tiny.files(cache.parent / "elsewhere") == tiny.files(finished)


def test_a_group_that_is_a_symlink_is_left_alone(make: Make, done: Path, tmp_path: Path) -> None:
    """Somebody moved it to a larger disk."""
    group = next(done.glob("grad_z/*/zarr.json")).parent
    group.rename(tmp_path / "moved")
    group.symlink_to(tmp_path / "moved")
    make().run()
    assert make().plan().complete
