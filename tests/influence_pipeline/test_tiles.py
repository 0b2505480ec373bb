"""Files of tiles are those of Zarr's sharding codec: each reads what the other wrote, and damage is found."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from influence_pipeline.cache.encoding import GROUP, round_trip, scales
from influence_pipeline.cache.record import FileSum
from influence_pipeline.cache.tiles import Filling, Region, Tiles
from stages.threads import one_core_threads

SHAPES = [
    # array, file, tile
    ((10, 7), (8, 8), (4, 3)),
    ((16, 9), (8, 9), (8, 3)),
    ((5, 33), (4, 36), (2, 12)),
    ((3, 11, 6), (1, 8, 6), (1, 4, 3)),
]
DTYPES = ("float16", "float32", "int8", "int64")


def make(folder: Path, shapes: tuple[tuple[int, ...], ...], dtype: str) -> Any:
    shape, shards, chunks = shapes
    shards = tuple(c * -(-s // c) for s, c in zip(shards, chunks, strict=True))
    size = np.dtype(dtype).itemsize
    shuffle: Any = "shuffle" if size > 1 else "noshuffle"
    return zarr.create_array(
        folder,
        shape=shape,
        shards=shards,
        chunks=chunks,
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("float") else -1,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle=shuffle, typesize=size), Crc32cCodec()],
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)


def fill(tiles: Tiles, region: Region, values: np.ndarray, step: int = 10**9) -> dict[Path, FileSum]:
    """Write a region, some rows at a time."""
    filling = Filling(
        tiles, region, lambda rows, first: lambda columns: rows[(slice(None), *columns)], one_core_threads()
    )
    for start in range(0, len(values), step):
        filling.add(values[start : start + step])
    filling.finish()
    return filling.appear()


def write(tiles: Tiles, values: np.ndarray, step: int = 10**9) -> None:
    """Write a whole array, one band of files at a time as blocks do."""
    for start in range(0, len(values), tiles.file_shape[0]):
        stop = min(start + tiles.file_shape[0], len(values))
        region = (slice(start, stop), *(slice(0, n) for n in values.shape[1:]))
        for path, found in fill(tiles, region, values[start:stop], step).items():
            assert found == FileSum().then(path.read_bytes())


def read(tiles: Tiles, region: Region, *, strict: bool = True) -> np.ndarray:
    out = np.empty([part.stop - part.start for part in region], tiles.dtype)
    tiles.read(region, out, lambda tile, cell, place: np.copyto(place, tile), strict=strict)
    return out


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_zarr_reads_what_is_written_here_and_the_other_way_round(
    tmp_path: Path, shapes: Any, dtype: str, step: int
) -> None:
    values = numbers(shapes[0], dtype)
    ours, theirs = make(tmp_path / "ours", shapes, dtype), make(tmp_path / "theirs", shapes, dtype)
    write(Tiles(tmp_path / "ours", ours), values, step)
    theirs[...] = values
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours")[...], values)
    for folder, array in ((tmp_path / "ours", ours), (tmp_path / "theirs", theirs)):
        np.testing.assert_array_equal(read(Tiles(folder, array), tuple(slice(0, n) for n in shapes[0])), values)
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (tmp_path / "ours", tmp_path / "theirs")]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiles, np.ndarray]:
    folder = tmp_path_factory.mktemp("written")
    values = numbers(SHAPES[2][0], "float32")
    tiles = Tiles(folder, make(folder, SHAPES[2], "float32"))
    write(tiles, values)
    return tiles, values


@given(st.data())
def test_any_region_is_read(written: tuple[Tiles, np.ndarray], data: st.DataObject) -> None:
    tiles, values = written
    region = []
    for length in values.shape:
        start = data.draw(st.integers(0, length))
        region.append(slice(start, data.draw(st.integers(start, length))))
    np.testing.assert_array_equal(read(tiles, tuple(region)), values[tuple(region)])


def test_what_was_never_written_is_fill_values_or_refused(tmp_path: Path) -> None:
    array = make(tmp_path, SHAPES[0], "float32")
    tiles, values = Tiles(tmp_path, array), numbers(SHAPES[0][0], "float32")
    fill(tiles, (slice(0, 8), slice(0, 7)), values[:8])
    found = read(tiles, (slice(0, 10), slice(0, 7)), strict=False)
    np.testing.assert_array_equal(found[:8], values[:8])
    assert np.isnan(found[8:]).all()
    with pytest.raises(FileNotFoundError):
        read(tiles, (slice(0, 10), slice(0, 7)))


def test_every_flipped_byte_of_a_file_is_found_by_whoever_reads_all_of_it(tmp_path: Path) -> None:
    array = make(tmp_path, ((4, 6), (4, 6), (4, 3)), "float16")
    tiles, values = Tiles(tmp_path, array), numbers((4, 6), "float16")
    write(tiles, values)
    path, whole = tiles.path((0, 0)), (slice(0, 4), slice(0, 6))
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|never written|another size"):
            read(tiles, whole)
    for length in (0, 1, len(data) - 1, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged"):
            read(tiles, whole)
    path.write_bytes(data)
    np.testing.assert_array_equal(read(tiles, whole), values)


@pytest.mark.parametrize("dim", [1, GROUP - 1, GROUP, 3 * GROUP + 17])
def test_eight_bits_lose_less_than_a_254th_of_the_largest_of_each_group(dim: int) -> None:
    rows = np.random.default_rng(1).standard_normal((9, dim)).astype(np.float32)
    rows[:, ::3] *= np.exp(np.random.default_rng(2).uniform(-20, 20, rows[:, ::3].shape)).astype(np.float32)
    rows[4] = 0
    found = round_trip(rows, "int8")
    for start in range(0, dim, GROUP):
        group = slice(start, start + GROUP)
        largest = np.abs(rows[:, group]).max(axis=1, keepdims=True)
        assert (np.abs(found - rows)[:, group] <= largest / 254 * 1.0001).all()
    assert (found[4] == 0).all()
    assert scales(rows, "int8").shape == (9, -(-dim // GROUP))


def test_what_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    tiles, values = Tiles(tmp_path, make(tmp_path, SHAPES[1], "float32")), numbers(SHAPES[1][0], "float32")
    before = sorted(tmp_path.rglob("*"))
    region = slice(0, 8), slice(0, 9)
    filling = Filling(
        tiles, region, lambda rows, first: lambda columns: rows[(slice(None), *columns)], one_core_threads()
    )
    filling.add(values[:8])
    filling.finish()
    assert any(path.suffix == ".partial" for path in tmp_path.rglob("*"))
    filling.abandon()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [p for p in before if p.is_file()]


def test_an_error_of_a_thread_is_raised(tmp_path: Path) -> None:
    tiles, values = Tiles(tmp_path, make(tmp_path, SHAPES[1], "float32")), numbers(SHAPES[1][0], "float32")

    def refuse(rows: Any, first: int) -> Any:
        raise OSError(28, "full")

    filling = Filling(tiles, (slice(0, 8), slice(0, 9)), refuse, one_core_threads())

    def write() -> None:
        filling.add(values[:8])
        filling.finish()

    with pytest.raises(OSError, match="full"):
        write()
    filling.abandon()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_region_may_begin_in_any_file(tmp_path: Path) -> None:
    values = numbers((8, 20), "float32")
    tiles = Tiles(tmp_path, make(tmp_path, ((8, 20), (4, 8), (2, 4)), "float32"))
    for region in itertools.product((slice(0, 4), slice(4, 8)), (slice(0, 8), slice(8, 16), slice(16, 20))):
        fill(tiles, region, values[region], 3)
    np.testing.assert_array_equal(zarr.open_array(tmp_path)[...], values)
