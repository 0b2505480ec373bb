"""Blocks and tiles cover everything exactly once, and fit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import influence_pipeline as ip
from influence_pipeline import plan
from influence_pipeline.cache import Layout
from influence_pipeline.plan import Plan, StagePlan, show_bytes
from stages.influence import Influence
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
        return StagePlan(name, "0123456789ab", done, 4, 60, 2048, 4096, False, 1024, "1 pass", differs)

    shown = Plan("60 training samples", (stage("grad_z", 4), stage("s_test", 2), stage("influence", 0, ("a: 1 ≠ 2",))))
    lines = str(shown).splitlines()
    assert lines[0] == "60 training samples"
    assert "4 / 4" in lines[1]
    assert "complete" in lines[1]
    assert "to go on" in lines[2]
    assert "not begun" in lines[3]
    assert "2.0 KiB of at most 4.0 KiB" in lines[3]
    assert lines[4].endswith("differs from what is cached: a: 1 ≠ 2")
    assert not shown.complete
    assert shown["grad_z"].complete
