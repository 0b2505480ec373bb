"""What is damaged on disk is found: it is computed again, or named; it never reads as numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import zarr

import influence_pipeline as ip
from influence_pipeline.cache import STAGES, Cache, Group, Layout
from influence_pipeline.cache.chunks import Chunks
from influence_pipeline.work import Work
from stages.stage import ArraySpec, Axis, Block, Grid
from tests import tiny

Make = Callable[..., ip.Pipeline]

ARRAYS = {
    "grad_z": ("gradients", "scale", "norm", "loss", "label", "batch", "fidelity", "digests", "blocks"),
    "curvature": ("gradient_sum", "probe_sum", "blocks"),
    "s_test": ("vectors", "residual", "iterations", "measurement", "label", "damping", "batch", "digests", "blocks"),
    "influence": (
        "scores", "part_helpful_ids", "part_helpful_scores", "part_harmful_ids", "part_harmful_scores", "part_sum",
        "part_total", "blocks",
    ),
}  # fmt: skip
MERGED = (
    "curvature_samples", "helpful_ids", "helpful_scores", "harmful_ids", "harmful_scores", "offset", "mean_scores",
    "mean_helpful_ids", "mean_harmful_ids", "train_ids", "test_ids", "finished",
)  # fmt: skip
OF_CURVATURE = tuple(
    ("curvature", name) for name in ("gradient_norm", "mean_eigenvalue", "probe_loss", "digests", "finished")
)
OF_BLOCKS = [(stage, name) for stage, names in ARRAYS.items() for name in names]


def chunks(cache: Path, stage: str, name: str) -> list[Path]:
    """Return the data files of an array."""
    return sorted(path for path in cache.glob(f"{stage}/*/{name}/c") if path.is_file()) or sorted(
        path for path in cache.glob(f"{stage}/*/{name}/c/**/*") if path.is_file()
    )


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


HARMS = (delete, empty, truncate, lengthen)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which the stage of every block is added that is computed from now on."""
    found: list[str] = []
    commit = Group.commit

    def committed(group: Group, block: Any, *args: Any, **kwargs: Any) -> bool:
        found.append(group.path.parent.name)
        return commit(group, block, *args, **kwargs)

    monkeypatch.setattr(Group, "commit", committed)
    return found


def test_the_table_above_has_every_array(done: Path) -> None:
    found = {(path.parts[-4], path.parts[-2]) for path in done.glob("*/*/*/zarr.json")}
    assert found == {*OF_BLOCKS, *(("influence", name) for name in MERGED), *OF_CURVATURE}
    assert all(chunks(done, stage, name) for stage, name in found)


@pytest.mark.parametrize("case", list(enumerate(OF_BLOCKS)), ids=lambda case: "-".join(case[1]))
def test_a_lost_or_cut_file_of_a_block_is_computed_again(
    done: Path, make: Make, computed: list[str], case: tuple[int, tuple[str, str]]
) -> None:
    number, (stage, name) = case
    before = tiny.files(done)
    found = chunks(done, stage, name)
    harm = HARMS[number % len(HARMS)]
    harm(found[len(found) // 2])
    pipeline = make()
    assert not pipeline.plan()[stage].complete
    pipeline.run()
    assert computed == [stage]
    assert tiny.files(done) == before


@pytest.mark.parametrize("harm", HARMS)
def test_every_kind_of_loss_is_found(done: Path, make: Make, computed: list[str], harm: Callable[[Path], None]) -> None:
    before = tiny.files(done)
    for stage, name in (("grad_z", "gradients"), ("s_test", "vectors"), ("influence", "scores")):
        harm(chunks(done, stage, name)[0])
    make().run()
    assert computed == ["grad_z", "s_test", "influence"]
    assert tiny.files(done) == before


@pytest.mark.parametrize("case", list(enumerate(MERGED)), ids=lambda case: case[1])
def test_a_lost_or_cut_file_of_what_is_merged_is_merged_again(
    done: Path, make: Make, computed: list[str], case: tuple[int, str]
) -> None:
    before = tiny.files(done)
    HARMS[case[0] % len(HARMS)](chunks(done, "influence", case[1])[0])
    assert not make().plan()["influence"].complete
    make().run()
    assert computed == []
    assert tiny.files(done) == before


def test_a_lost_block_is_missing_to_the_stage_after_it(done: Path, make: Make) -> None:
    delete(chunks(done, "grad_z", "gradients")[1])
    with pytest.raises(ip.MissingStage, match="1 of 4 blocks"):
        make(influence={"top_k": 2}).influence("holdout")


# ---- flipped bits, which keep a file's length ------------------------------------------------------------------------


def other_scores(make: Make) -> None:
    make(influence={"top_k": 2}).run()


def other_damping(make: Make) -> None:
    make(s_test={"solver": "cg", "damping": {"relative": 0.2}}).run()


def same_again(make: Make) -> None:
    make().run()


def without_gradients(make: Make) -> None:
    """Compare the training set with what the solver prepared of it."""
    shutil.rmtree(next(make().cache.path.glob("grad_z/*/zarr.json")).parent)
    make().s_test("holdout")
    make().run()


def merge_again(make: Make) -> None:
    folder = make().cache.path
    delete(chunks(folder, "influence", "finished")[0])
    make().run()


def sum_again(make: Make) -> None:
    delete(chunks(make().cache.path, "curvature", "finished")[0])
    make().run()


def everything_shown(make: Make) -> None:
    influences = make().run()["holdout"]
    influences.helpful(1), influences.harmful(1), influences.helpful(60), influences.helpful_on_average(3)
    influences.to_json(make().cache.path.parent / "all.json")
    influences.labels()
    assert influences.residual is not None
    assert influences.damping is not None


FLIPS = [
    ("grad_z", "gradients", other_scores),
    ("grad_z", "scale", other_scores),
    ("grad_z", "digests", same_again),
    ("grad_z", "label", everything_shown),
    ("curvature", "gradient_sum", sum_again),
    ("curvature", "probe_sum", sum_again),
    ("curvature", "mean_eigenvalue", other_damping),
    ("curvature", "digests", without_gradients),
    ("s_test", "vectors", other_scores),
    ("s_test", "digests", same_again),
    ("s_test", "label", everything_shown),
    ("s_test", "residual", everything_shown),
    ("s_test", "damping", everything_shown),
    ("influence", "scores", everything_shown),
    *(("influence", name, merge_again) for name in ARRAYS["influence"] if name.startswith("part_")),
    *(("influence", name, everything_shown) for name in MERGED if not name.startswith("mean_h") and name != "finished"),
]


def complaint(read: Callable[[Make], None], make: Make) -> str:
    """Return what is said of damage that is not healed on the way."""
    try:
        read(make)
    except ip.CacheDamaged as found:
        return f"{found} (exit code {found.exit_code})"
    return ""


@pytest.mark.parametrize(("stage", "name", "read"), FLIPS, ids=lambda part: getattr(part, "__name__", part))
def test_a_flipped_bit_is_found_by_whoever_reads_it_and_healed_by_the_next_run(
    done: Path, make: Make, caplog: pytest.LogCaptureFixture, stage: str, name: str, read: Callable[[Make], None]
) -> None:
    before = tiny.files(done)
    for path in chunks(done, stage, name):
        flip(path)
    place = next(done.glob(f"{stage}/*/{name}"))
    told = complaint(read, make)
    assert str(place) in told + caplog.text
    assert not told or re.search(r"Run again.*\(exit code 1\)", told)
    make().verify()  # what nobody read yet
    make().run()
    assert make().verify().exit_code == 0
    assert before.items() <= tiny.files(done).items()


def test_a_flipped_bit_in_a_record_is_a_block_without_record(done: Path, make: Make, computed: list[str]) -> None:
    before = tiny.files(done)
    flip(chunks(done, "grad_z", "blocks")[1])
    make().run()
    assert computed == ["grad_z"]
    assert tiny.files(done) == before


@pytest.mark.parametrize("harm", [delete, empty, truncate, flip])
@pytest.mark.parametrize(("stage", "name"), [*OF_BLOCKS, ("grad_z", ""), ("s_test", ""), ("influence", "finished")])
def test_a_damaged_description_is_mended(
    done: Path, make: Make, computed: list[str], stage: str, name: str, harm: Callable[[Path], None]
) -> None:
    before = tiny.files(done)
    harm(next(done.glob(f"{stage}/*/{name}/zarr.json" if name else f"{stage}/*/zarr.json")))
    assert make().verify().exit_code == 1
    make().run()
    assert computed == []
    assert tiny.files(done) == before


def test_a_damaged_description_is_said_once_by_verify(done: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    path = next(done.glob("grad_z/*/norm/zarr.json"))
    path.write_bytes(path.read_bytes()[:-3])
    found = make().verify()
    assert len(found.damaged) == 1
    assert str(path) in found.damaged[0]
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert make().verify().damaged == []


def test_lengths_that_disagree_are_mended(done: Path, make: Make, computed: list[str]) -> None:
    before = tiny.files(done)
    path = next(done.glob("influence/*/train_ids/zarr.json"))
    text = path.read_text()
    assert text.count("60") == 1
    path.write_text(text.replace("60", "62"))
    with pytest.raises(ip.CacheDamaged, match="checksum does not fit"):
        ip.Influences.open(done, "holdout")
    make().run()
    assert computed == []
    assert tiny.files(done) == before


# ---- what a group promises -------------------------------------------------------------------------------------------


def layout(rows: int, band: int = 4, encoding: str = "float16") -> Layout:
    arrays = (
        ArraySpec("vectors", ("sample", "coordinate"), (rows, 5), encoding=encoding),
        ArraySpec("number", ("sample",), (rows,), "int64"),
    )
    merged = (ArraySpec("total", ("sample",), (rows,)),)
    return Layout(Grid((Axis("sample", rows, band),)), arrays, merged)


def values(rows: range) -> dict[str, np.ndarray]:
    return {
        "vectors": np.outer(np.arange(rows.start, rows.stop), np.arange(5)).astype(np.float32),
        "number": np.arange(rows.start, rows.stop),
    }


def fill(group: Group, of: Layout) -> None:
    for block in of.grid:
        tiny.commit(group, block, values(block.ids("sample")))


ATTRIBUTES: dict[str, Any] = {"stage": "grad_z", "tests": None, "reads": {}, "identity": {}}


@pytest.fixture
def group(cache: Path) -> Group:
    return Cache(cache).create("grad_z", "key", layout(10), ATTRIBUTES)


def test_a_block_without_a_record_does_not_exist(group: Group) -> None:
    assert not any(group.whole(block) for block in layout(10).grid)
    assert group.progress() == (0, 3)
    block = layout(10).grid.block((1,))
    tiny.commit(group, block, values(range(4, 8)))
    assert [bool(group.whole(block)) for block in layout(10).grid] == [False, True, False]
    assert group.progress() == (1, 3)
    group.zarr_array("blocks")[1] = 0
    assert not group.whole(block)


def test_a_block_of_other_inputs_does_not_exist(group: Group) -> None:
    block = layout(10).grid.block((0,))
    tiny.commit(group, block, values(range(4)), inputs=b"a" * 16)
    same, other = (Work(cast(Any, None), "vectors", inputs=lambda block, of=of: of * 16) for of in (b"a", b"b"))
    assert same.valid(group, block)
    assert not other.valid(group, block)


@pytest.mark.parametrize("fails_at", ["vectors", "scale", "number", "blocks"])
def test_a_block_that_could_not_be_written_again_does_not_exist(
    group: Group, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    fill(group, layout(10))

    def full(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(chunks: Chunks, *what: Any) -> Any:
            if chunks.path(()).parent.name == fails_at:
                raise OSError("No space left on device")
            return write(chunks, *what)

        return written

    block = layout(10).grid.block((1,))
    with monkeypatch.context() as patch:
        for name in ("write", "write_once"):
            patch.setattr(Chunks, name, full(getattr(Chunks, name)))
        with pytest.raises(ip.WorkError, match="No space left on device"):
            tiny.commit(group, block, values(range(4, 8)))
    assert [bool(group.whole(block)) for block in layout(10).grid] == [True, False, True]


def test_what_was_never_written_reads_as_an_error(group: Group) -> None:
    tiny.commit(group, layout(10).grid.block((0,)), values(range(4)))
    with pytest.raises(ip.CacheDamaged, match="is not there"):
        group.rows("vectors")[0:5]
    np.testing.assert_array_equal(group.rows("vectors")[0:4], values(range(4))["vectors"])


def test_growing_keeps_whole_blocks(group: Group) -> None:
    fill(group, layout(10))
    group.commit_merged({"total": np.ones(10, np.float32)})
    assert group.finished
    grown = layout(13)
    assert group.fits(grown)
    group.resize(grown)
    assert [bool(group.whole(block)) for block in grown.grid] == [True, True, False, False]
    assert not group.finished
    for block in list(grown.grid)[2:]:
        tiny.commit(group, block, values(block.ids("sample")))
    group.commit_merged({"total": np.ones(13, np.float32)})
    assert group.finished
    reopened = Group(group.path)
    assert reopened.finished
    np.testing.assert_array_equal(reopened.rows("vectors")[:], values(range(13))["vectors"])
    np.testing.assert_array_equal(reopened.array("number")[:], np.arange(13))


@pytest.mark.parametrize("harm", HARMS)
def test_a_last_block_that_is_not_full_is_written_again_over_a_damaged_one(
    group: Group, harm: Callable[[Path], None]
) -> None:
    fill(group, layout(10))
    for name in ("vectors/c/2/0", "number/c/2", "blocks/c/2/0"):
        harm(group.path / name)
    block = layout(10).grid.block((2,))
    assert not group.whole(block)
    tiny.commit(group, block, values(range(8, 10)))
    assert group.whole(block)
    np.testing.assert_array_equal(group.rows("vectors")[:], values(range(10))["vectors"])


def test_another_shape_does_not_fit(group: Group) -> None:
    assert group.fits(layout(10))
    assert group.fits(layout(9)), "nothing was computed yet"
    fill(group, layout(10))
    assert not group.fits(layout(9))
    wider = layout(10)
    wider.arrays = wider.stored = (ArraySpec("vectors", ("sample", "coordinate"), (10, 6)),)
    assert not group.fits(wider)


def test_a_damaged_root_is_an_error_whose_advice_works(done: Path, make: Make, computed: list[str]) -> None:
    before = tiny.files(done)
    truncate(done / "zarr.json")
    with pytest.raises(ip.CacheDamaged, match=f"{done}/zarr.json cannot be read.*delete that file"):
        make()
    delete(done / "zarr.json")
    make().run()
    assert computed == []
    assert tiny.files(done) == before


def test_leftovers_of_a_kill_are_removed(done: Path, make: Make) -> None:
    before = tiny.files(done)
    folder = next(done.glob("grad_z/*/zarr.json")).parent
    leftovers = [
        folder / "gradients" / "c" / "0" / "0.5f.partial",
        folder / "zarr.5f.partial",
        done / "abc.5f.partial" / "zarr.json",
        done / "grad_z" / "zarr.5f.partial",
    ]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half")
    delete(chunks(done, "grad_z", "gradients")[0])
    make().run()
    assert tiny.files(done) == before


def test_two_that_lay_out_the_same_group_share_it(cache: Path) -> None:
    one = Cache(cache).create("grad_z", "key", layout(10), ATTRIBUTES)
    fill(one, layout(10))
    two = Cache(cache).create("grad_z", "key", layout(10), ATTRIBUTES)
    assert all(two.whole(block) for block in layout(10).grid)


def test_a_removed_group_is_gone_and_can_be_made_again(cache: Path, group: Group) -> None:
    fill(group, layout(10))
    Cache(cache).remove(group.path)
    assert Cache(cache).find("grad_z", "key") is None
    assert list(cache.glob("*.partial")) == []
    again = Cache(cache).create("grad_z", "key", layout(10), ATTRIBUTES)
    assert again.progress() == (0, 3)


def test_a_cache_of_another_format_is_refused(cache: Path) -> None:
    zarr.create_group(cache, attributes={"influence_pipeline": 999})
    with pytest.raises(ip.CacheMismatch, match="format 999"):
        Cache(cache)


def test_a_cache_that_cannot_be_written_is_an_error_of_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ip.RequestError, match="is a file"):
        Cache(tmp_path / "file")
    with pytest.raises(ip.WorkError, match="cannot be written"):
        Cache(tmp_path / "file" / "cache").create("grad_z", "key", layout(10), {})


# ---- other readers ---------------------------------------------------------------------------------------------------


def test_plain_zarr_opens_everything_with_dimension_names(done: Path) -> None:
    root = zarr.open_group(done, mode="r")
    assert {name.split("/")[0] for name, _ in root.members(max_depth=None)} == set(ARRAYS)
    for name, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array):
            assert None not in (member.metadata.dimension_names or ()), name
            assert len(member.metadata.dimension_names or ()) == member.ndim, name
            assert member[...].shape == member.shape


def test_identities_stand_readable_in_the_attributes(done: Path) -> None:
    for path in done.glob("*/*/zarr.json"):
        identity = json.loads(path.read_text())["attributes"]["identity"]
        assert identity
    solved = json.loads(next(done.glob("s_test/*/zarr.json")).read_text())["attributes"]
    assert solved["tests"] == "holdout"
    assert solved["identity"]["s_test"]["solver"] == "cg"


def test_xarray_opens_every_group(done: Path) -> None:
    xarray = pytest.importorskip("xarray")
    for path in done.glob("*/*"):
        if path.is_dir():
            with xarray.open_zarr(path, consolidated=False, chunks=None) as data:
                assert data.load().data_vars
    scores = xarray.open_zarr(next(done.glob("influence/*/scores")).parent, consolidated=False, chunks=None)["scores"]
    assert scores.dims == ("test", "sample")
    assert scores.shape == (10, 60)


def test_floats_never_written_are_nan_and_whole_numbers_are_minus_one(group: Group) -> None:
    assert np.isnan(group.array("vectors").filled(...)).all()
    assert (group.array("number").filled(...) == -1).all()
    assert (group.array("blocks").filled(...) == 0).all()
    with pytest.raises(ip.CacheDamaged, match="is not there"):
        group.array("number")[0]


def test_zeros_are_written_not_left_out(group: Group) -> None:
    of = layout(10)
    block: Block = of.grid.block((0,))
    tiny.commit(group, block, {"vectors": np.zeros((4, 5), np.float32), "number": np.full(4, -1)})
    for name in of.block_files(block):
        assert (group.path / name).stat().st_size > 0
    assert (group.rows("vectors")[0:4] == 0).all()


def test_the_files_of_a_block_are_those_of_its_region_of_each_array(finished: Path) -> None:
    for stage in STAGES:
        for group in Cache(finished).groups(stage):
            for block in group.layout.grid:
                regions = [(spec, spec.region(group.layout.grid, block)) for spec in group.layout.stored]
                assert group.layout.block_files(block) == [
                    name for spec, region in regions for name in group.layout.files(spec, region)
                ]
