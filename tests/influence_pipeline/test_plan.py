"""Blocks and tiles cover everything exactly once, and fit."""

from __future__ import annotations

import fnmatch
import itertools
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import influence_pipeline as ip
from influence_pipeline import pipeline, plan, room
from influence_pipeline.cache import Layout
from influence_pipeline.plan import Plan, StagePlan, Timing, show_bytes, show_seconds
from stages.influence import Influence
from stages.projection import Projection
from stages.stage import ArraySpec, Axis, Grid

dims = st.integers(1, 2**28)
small = st.integers(1, 40)


# ---- grids -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(small, small), min_size=1, max_size=3))
def test_every_entry_is_in_exactly_one_block(axes: list[tuple[int, int]]) -> None:
    grid = Grid(tuple(Axis(f"axis{i}", length, band) for i, (length, band) in enumerate(axes)))
    seen = np.zeros([length for length, _ in axes], int)
    for block in grid:
        region = tuple(block.bounds[axis.name] for axis in grid.axes)
        seen[region] += 1
        assert block.rows == seen[region].size
        assert grid.block(block.index) == block
    assert (seen == 1).all()
    assert len(grid) == len(list(grid)) == math.prod(grid.shape)


@given(small, small, small, small)
def test_blocks_fill_every_kind_of_array_exactly_once(tests: int, rows: int, samples: int, columns: int) -> None:
    grid = Grid((Axis("test", tests, rows), Axis("sample", samples, columns)))
    test_bands, sample_bands = grid.shape
    specs = [
        ArraySpec("scores", ("test", "sample"), (tests, samples)),
        ArraySpec("candidates", ("sample_block", "test", "rank"), (sample_bands, tests, 3)),
        ArraySpec("sums", ("test_block", "sample"), (test_bands, samples)),
    ]
    layout = Layout(grid, specs, ())
    for spec in specs:
        seen, files = np.zeros(spec.shape, int), []
        for block in grid:
            region = spec.region(grid, block)
            seen[region] += 1
            files.append(frozenset(layout.files(spec, region)))
        assert (seen == 1).all()
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(files, 2)), spec.name


@given(st.integers(1, 2**40), dims)
def test_sums_are_kept_over_a_few_parts_of_the_training_set(samples: int, dim: int) -> None:
    parts = plan.parts(samples, dim)
    assert 1 <= parts <= 16
    assert parts == 1 or (samples >= 256 * parts and 8 * dim * parts <= 2**30)
    assert parts == 16 or samples < 256 * (parts + 1) or 8 * dim * (parts + 1) > 2**30


@given(small, small, st.integers(1, 3000))
def test_files_are_those_that_a_region_touches(length: int, band: int, columns: int) -> None:
    spec = ArraySpec("vectors", ("sample", "coordinate"), (length, columns))
    layout = Layout(Grid((Axis("sample", length, band),)), [spec], ())
    shard = layout.shard_shape(spec)
    for block in layout.grid:
        touched = {
            f"vectors/c/{row // shard[0]}/{column // shard[1]}"
            for row in block.ids("sample")
            for column in range(columns)
        }
        assert set(layout.files(spec, spec.region(layout.grid, block))) == touched


# ---- sizes -----------------------------------------------------------------------------------------------------------


@given(dims)
def test_a_block_is_a_power_of_two_of_rows_and_fits_a_shard(dim: int) -> None:
    rows = plan.block_rows(dim)
    assert rows & (rows - 1) == 0
    assert 1 <= rows <= plan.MOST_ROWS
    assert rows == 1 or 4 * rows * dim <= plan.DECODED_SHARD_BYTES
    assert rows == plan.MOST_ROWS or 4 * 2 * rows * dim > plan.DECODED_SHARD_BYTES


@given(dims, st.sampled_from(["float16", "float32"]), st.integers(1, 10**6))
def test_a_decoded_shard_is_at_most_256_mb(dim: int, encoding: str, count: int) -> None:
    rows = plan.block_rows(dim)
    spec = ArraySpec("vectors", ("sample", "coordinate"), (count, dim), encoding=encoding)
    layout = Layout(Grid((Axis("sample", count, rows),)), [spec], ())
    shard_rows, shard_columns = layout.shard_shape(spec)
    assert shard_rows == rows
    tile = plan.tile_shape((rows, dim))
    assert 4 * shard_rows * shard_columns <= max(plan.DECODED_SHARD_BYTES, 4 * dim) + 4 * shard_rows * tile[1]


@given(st.integers(1, 1024), dims)
def test_tiles_are_a_few_megabytes_and_divide_a_shard(rows: int, dim: int) -> None:
    tile_rows, tile_columns = plan.tile_shape((rows, dim))
    assert tile_rows * tile_columns <= max(plan.TILE_ENTRIES, plan.TILE_COLUMNS * plan.TILE_ROWS)
    count = math.ceil(dim / tile_columns)
    assert (count - 1) * tile_columns < dim <= count * tile_columns
    assert count * tile_columns - dim < count


@given(st.integers(0, 10).map(lambda n: 2**n), st.integers(1, 5000))
def test_a_band_of_scores_is_whole_blocks_of_at_least_sixteen_times_the_ranks(rows: int, top_k: int) -> None:
    band = plan.train_band(rows, top_k)
    assert band % rows == 0
    assert band >= 16 * top_k
    assert band - rows < 16 * top_k


def test_sizes_of_blocks_can_be_set_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_ROWS", 8)
    assert plan.block_rows(10) == 8


# ---- reading gradients -----------------------------------------------------------------------------------------------

sizes = st.integers(1, 2000)
memories = st.integers(10**3, 10**9)


@given(sizes, sizes, st.integers(1, 10**6), sizes, st.tuples(sizes, sizes), memories, st.booleans())
def test_reads_stay_within_memory_or_are_refused_with_the_numbers(
    tests: int, samples: int, dim: int, rows: int, bands: tuple[int, int], memory: int, computed: bool
) -> None:
    refusal = ""
    try:
        reads = plan.reads(tests, samples, dim, rows, bands, memory, computed=computed, encoding="float16", threads=2)
    except ip.RequestError as error:
        refusal = str(error)
    if refusal:
        assert "needs" in refusal
        assert f"runtime.memory is {show_bytes(memory)}: raise it" in refusal
        return
    assert 1 <= reads.rows <= min(rows, samples)
    assert min(dim, 256) <= reads.columns <= dim
    assert reads.tile_columns <= reads.columns
    assert reads.columns == dim or not reads.columns % reads.tile_columns
    held = 4 * min(tests, bands[0]) * (min(samples, bands[1]) + reads.columns) + 4 * reads.rows * reads.tile_columns
    assert held <= reads.memory_bytes <= memory
    assert reads.passes == math.ceil(tests / bands[0])


@given(sizes, sizes, st.integers(1, 10**5), sizes, st.tuples(sizes, sizes), st.booleans())
def test_what_a_refusal_asks_for_is_enough(
    tests: int, samples: int, dim: int, rows: int, bands: tuple[int, int], computed: bool
) -> None:
    arguments = tests, samples, dim, rows, bands
    enough = 1
    while True:
        try:
            reads = plan.reads(*arguments, enough, computed=computed, encoding="float16", threads=2)
            break
        except ip.RequestError:
            enough *= 2
    assert reads.memory_bytes <= enough
    with pytest.raises(ip.RequestError):
        plan.reads(*arguments, 1, computed=computed, encoding="float16", threads=2)


@given(small, small, small, small, small, small, st.booleans())
def test_tiles_that_are_read_cover_a_block_exactly_once(
    samples: int, band: int, dim: int, read_rows: int, read_columns: int, start: int, rows_first: bool
) -> None:
    ids = np.arange(samples), np.arange(1)
    stage = Influence(
        np.zeros((1, dim), np.float32), np.zeros((samples, dim), np.float32), *ids, bands=(1, band),
        read_rows=read_rows, read_columns=read_columns, tile_columns=read_columns, rows_first=rows_first,
            curvature_samples=samples, top_k=1, store_scores=True,
    )  # fmt: skip
    seen = np.zeros((samples, dim), int)
    for block in stage.grid:
        for region in stage._reads(block.bounds["sample"]):
            assert seen[region].size <= read_rows * read_columns
            seen[region] += 1
    assert (seen == 1).all()


@given(dims, st.sampled_from([4, 8]))
def test_the_best_batch_of_gradients_is_small(dim: int, itemsize: int) -> None:
    batch = plan.gradient_batch(dim, itemsize)
    assert batch & (batch - 1) == 0
    assert 1 <= batch <= 256
    assert batch <= 4 or batch * dim * itemsize <= 30 * 2**20


@given(sizes, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**9)), max_size=3))
def test_a_batch_that_fits_is_the_most_or_the_largest_power_of_two(most: int, bounds: list[tuple[int, int]]) -> None:
    def fits(batch: int) -> bool:
        return all(each * batch <= available for each, available in bounds)

    found = plan.fitting(most, *bounds)
    assert 1 <= found <= most
    assert found == 1 or fits(found)
    assert found == most or not fits(2 * found) or 2 * found > most
    if not fits(most):
        assert found & (found - 1) == 0


# ---- what would fit --------------------------------------------------------------------------------------------------

ENCODINGS = ["float32", "float16", "int8"]
names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4).map(".".join)
parameters = st.dictionaries(names, st.integers(1, 10**7), min_size=1, max_size=12)


@given(parameters, st.sampled_from(ENCODINGS), st.integers(1, 10**6), st.integers(0, 10**14), st.integers(0, 10**3))
def test_every_suggestion_fits(sizes: dict[str, int], encoding: str, count: int, free: int, each: int) -> None:
    dim = sum(sizes.values())

    def needed(dim: int, encoding: str) -> int:
        return count * (dim * np.dtype(encoding).itemsize + 32)

    def available(dim: int) -> int:
        return free - each * dim

    found = plan.suggestions(sizes, dim, encoding, needed, available)
    assert found[-1].setting == "store = false"
    for suggestion in found[:-1]:
        settings = tomllib.loads(f"[grad_z]\n{suggestion.setting}")["grad_z"]
        kept = settings.get("encoding", encoding)
        assert suggestion.grad_z_bytes == needed(suggestion.dim, kept) <= available(suggestion.dim)
        if "projection" in settings:
            projection = Projection(**settings["projection"])
            coordinates = sum(r * c for r, c in projection.sizes({name: (n,) for name, n in sizes.items()}).values())
            assert coordinates <= suggestion.dim == projection.dim < dim
            assert 2 * suggestion.grad_z_bytes <= available(suggestion.dim)
            more = 2 * suggestion.dim
            assert more >= min(dim, 8192) or 2 * needed(more, encoding) > available(more)
        if "parameters" in settings:
            matched = {name for glob in settings["parameters"] for name in fnmatch.filter(sizes, glob)}
            assert sum(sizes[name] for name in matched) == suggestion.dim < dim
            assert list(sizes)[-1] in matched


def test_a_network_of_eleven_million_parameters_is_to_be_projected_to_4096_coordinates() -> None:
    sizes = {"conv1.weight": 11_168_832, "fc.weight": 5120, "fc.bias": 10}

    def needed(dim: int, encoding: str) -> int:
        return 50_000 * dim * np.dtype(encoding).itemsize

    for free, settings in {
        10**11: ["projection", "parameters", "store"],
        6 * 10**11: ["encoding", "projection", "parameters", "store"],
        10**8: ["projection", "store"],
        10**3: ["store"],
    }.items():
        found = plan.suggestions(sizes, sum(sizes.values()), "float16", needed, lambda dim, free=free: free)
        assert [suggestion.setting.partition(" ")[0] for suggestion in found] == settings
        shown = "\n".join(map(str, found))
        if free > 10**8:
            assert '[grad_z] projection = { kind = "kronecker", dim = 4096 } (D = 4096: 391 MiB)' in shown
            assert '[grad_z] parameters = ["fc.*"] (D = 5130: 489 MiB)' in shown
        elif "projection" in settings:
            assert "dim = 256 }" in shown


def test_gradients_take_no_more_than_suggested(make: Callable[..., ip.Pipeline], tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    big, made = make(model=model, grad_z={"encoding": "float32"}), 0
    work = big._works.work(big._works.grad_z_place())
    for suggestion in room.advice(big._works.context, work, lambda dim: 10**9)[:-1]:
        settings = tomllib.loads(f"[grad_z]\n{suggestion.setting}")["grad_z"]
        small = make(tmp_path / str(made), model=model, grad_z={"encoding": "float32", **settings})
        planned = small.plan()["grad_z"]
        assert planned.bytes_expected <= suggestion.grad_z_bytes + 5000, "a projection's fidelity is kept, too"
        made += 1
    assert made == 4


def test_a_plan_that_may_not_fit_says_what_would(
    make: Callable[..., ip.Pipeline], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert make().plan().suggestions == ()
    monkeypatch.setattr(pipeline, "LARGE_BYTES", 1)
    assert 'would take less:\n  [grad_z] encoding = "int8" (D = 83: ' in str(make().plan())
    monkeypatch.setattr(room, "free_bytes", lambda path: room.SPARE + 1000)
    monkeypatch.setattr(pipeline, "LARGE_BYTES", 10**10)
    assert "would fit:\n  [grad_z] store = false" in str(make().plan())
    assert not cache.exists()


def test_files_are_as_many_as_planned(make: Callable[..., ip.Pipeline], cache: Path) -> None:
    planned = {f"{stage.stage}/{stage.key}": stage.files_expected for stage in make().plan().stages}
    make().run()
    assert planned == {name: sum(path.is_file() for path in (cache / name).rglob("*")) for name in planned}
    assert all(stage.files == stage.files_expected for stage in make().plan().stages)


# ---- seconds ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 8), st.floats(0, 10), st.floats(0, 10))
def test_what_first_blocks_cost_beside_is_not_multiplied(
    rows: int, left: int, workers: int, ready: float, first: float
) -> None:
    timing = Timing(ready, ((rows, 3.0 * rows + first), (rows, 3.0 * rows)))
    expected = ready + 3.0 * rows * left / min(workers, max(1, left)) if left else 0.0
    assert timing.left(rows * left, left, workers) == pytest.approx(expected)


# ---- for people ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 * 1024, "200 KiB"),
        (2 * 2**30, "2.0 GiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_amounts_of_memory_are_written_for_people(count: int, text: str) -> None:
    assert show_bytes(count) == text


def test_a_printed_plan_says_where_things_stand() -> None:
    def stage(name: str, done: int, differs: tuple[str, ...] = ()) -> StagePlan:
        return StagePlan(name, "0123456789ab", done, 4, 60, 9, 12, 2048, 4096, False, 1024, "1 pass", differs)

    shown = Plan("60 training samples", (stage("grad_z", 4), stage("s_test", 2), stage("influence", 0, ("a: 1 ≠ 2",))))
    lines = str(shown).splitlines()
    assert lines[0] == "60 training samples"
    assert "4 / 4" in lines[1]
    assert "complete" in lines[1]
    assert "to go on" in lines[2]
    assert "not begun" in lines[3]
    assert "12 files" in lines[3]
    assert "2.0 KiB of at most 4.0 KiB" in lines[3]
    assert lines[4].endswith("differs from what is cached: a: 1 ≠ 2")
    assert lines[5].startswith("to be written: at most 4.0 KiB in 6 files, free on that disk: 0 B: may not fit")
    assert not shown.complete
    assert shown["grad_z"].complete


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (119, "119 s"), (180, "3.0 min"), (9000, "2.5 h"), (2e5, "2.3 d")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
