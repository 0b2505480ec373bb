"""Small arrays are described and kept as zarr does it: each reads what the other one wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from influence_pipeline.cache import Layout
from influence_pipeline.cache.chunks import Chunks
from influence_pipeline.cache.layout import RECORDS, Kept, description
from influence_pipeline.plan import tile_shape
from stages.stage import ArraySpec, Axis, Grid
from tests import tiny

SPECS = [
    ArraySpec("numbers", ("sample", "column"), (10, 3), "float32", about="some"),
    ArraySpec("numbers", ("sample", "column"), (10, 3), "float32", "float16", about="some"),
    ArraySpec("numbers", ("sample", "column"), (10, 3), "float32", "int8", about="some"),
    ArraySpec("numbers", ("sample",), (10,), "int64"),
    ArraySpec("numbers", ("sample_block", "column"), (3, 5), "float64"),
    ArraySpec("numbers", ("byte",), (7,), "uint8"),
    ArraySpec("numbers", (), (), "float64"),
]
LARGE = ArraySpec("numbers", ("sample", "column"), (3000, 5000), "float32", about="of shards")


def laid_out(spec: ArraySpec, band: int = 4) -> Layout:
    length = next((n for dim, n in zip(spec.dims, spec.shape, strict=True) if dim == "sample"), 10)
    return Layout(Grid((Axis("sample", length, band),)), (spec,))


def by_zarr(folder: Path, layout: Layout, spec: ArraySpec) -> Any:
    """Have zarr make an array."""
    dtype, shard = spec.encoding or spec.dtype, layout.shard_shape(spec)
    tile = shard if spec.name == RECORDS else tile_shape(shard)
    size = np.dtype(dtype).itemsize
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle" if size > 1 else "noshuffle", typesize=size)
    return zarr.create_array(
        folder,
        shape=spec.shape,
        dtype=dtype,
        chunks=tile,
        shards=None if tile == shard else shard,
        fill_value=np.nan if dtype.startswith("float") else 0 if dtype == "uint8" else -1,
        compressors=[Crc32cCodec()] if spec.name == RECORDS else [blosc, Crc32cCodec()],
        dimension_names=list(spec.dims),
        attributes=description(layout, spec)["attributes"],
        config={"write_empty_chunks": True},
    )


@pytest.mark.parametrize("spec", [*SPECS, LARGE, laid_out(SPECS[0]).records], ids=str)
def test_descriptions_are_those_that_zarr_writes(tmp_path: Path, spec: ArraySpec) -> None:
    layout = laid_out(spec if spec.name != RECORDS else SPECS[0], 1000 if spec is LARGE else 4)
    array = by_zarr(tmp_path, layout, spec)
    found = description(layout, spec)
    assert json.dumps(found) == json.dumps(json.loads((tmp_path / "zarr.json").read_text()))
    kept = Kept.described(found)
    assert (kept.shape, kept.dtype, kept.shards, kept.chunks) == (array.shape, array.dtype, array.shards, array.chunks)
    np.testing.assert_equal(kept.fill_value, array.fill_value)
    assert bool(kept.shards) == (spec is LARGE)
    assert kept.compressed == (spec.name != RECORDS)


@pytest.mark.parametrize("change", [
    {"data_type": "string"},
    {"codecs": [{"name": "bytes"}, {"name": "gzip"}]},
    {"codecs": []},
])  # fmt: skip
def test_other_codecs_and_types_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it has "):
        Kept.described({**description(laid_out(SPECS[0]), SPECS[0]), **change})


def everything(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


@pytest.mark.parametrize("spec", [*SPECS, laid_out(SPECS[0]).records], ids=str)
def test_files_are_those_that_zarr_writes(tmp_path: Path, spec: ArraySpec) -> None:
    layout = laid_out(spec if spec.name != RECORDS else SPECS[0])
    theirs = by_zarr(tmp_path / "theirs", layout, spec)
    by_zarr(tmp_path / "ours", layout, spec)
    ours = Chunks(tmp_path / "ours", Kept.described(description(layout, spec)))
    values = np.arange(1, 1 + math.prod(spec.shape)).reshape(spec.shape).astype(theirs.dtype)
    theirs[...] = values
    ours.write(everything(spec.shape), values)
    assert tiny.files(tmp_path / "ours") == tiny.files(tmp_path / "theirs")
    np.testing.assert_array_equal(ours.read(everything(spec.shape)), values)


def test_parts_are_read_and_written_by_whole_files(tmp_path: Path) -> None:
    spec = SPECS[0]
    layout = laid_out(spec)
    by_zarr(tmp_path, layout, spec)
    chunks = Chunks(tmp_path, Kept.described(description(layout, spec)))
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    chunks.write((slice(4, 8), slice(0, 3)), values[4:8])
    assert np.isnan(chunks.read((slice(0, 4), slice(0, 3)))).all(), "what has no file is fill values"
    np.testing.assert_array_equal(chunks.read((slice(5, 7), slice(1, 3))), values[5:7, 1:])
    chunks.write((slice(8, 10), slice(0, 3)), values[8:])
    chunks.write((slice(0, 4), slice(0, 3)), values[:4])
    np.testing.assert_array_equal(zarr.open_array(tmp_path, mode="r")[...], values)
    np.testing.assert_array_equal(chunks.read((slice(2, 9), slice(0, 2))), values[2:9, :2])


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], laid_out(SPECS[0]).records], ids=str)
def test_a_file_with_any_other_byte_is_refused(tmp_path: Path, spec: ArraySpec) -> None:
    layout = laid_out(spec if spec.name != RECORDS else SPECS[0])
    (tmp_path / spec.name).mkdir()
    kept = Kept.described(description(layout, spec))
    chunks = Chunks(tmp_path / spec.name, kept)
    chunks.write(everything(spec.shape), np.ones(spec.shape, kept.dtype))
    path = chunks.path([0] * len(spec.shape))
    whole = path.read_bytes()
    for harmed in (b"", whole[:3], whole[:-1], whole + b"x", *(flipped(whole, at) for at in range(len(whole)))):
        path.write_bytes(harmed)
        with pytest.raises(ValueError, match=r"damaged|another size"):
            chunks.read(everything(spec.shape))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = laid_out(SPECS[3])
    chunks = Chunks(tmp_path, Kept.described(description(layout, SPECS[3])))

    def refuse(*what: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            chunks.write((slice(0, 4),), np.arange(4))
    assert [path.name for path in tmp_path.rglob("*")] == ["c"]
    gone = Chunks(tmp_path / "gone", Kept.described(description(layout, SPECS[3])))
    with pytest.raises(FileNotFoundError):
        gone.write((slice(0, 4),), np.arange(4))
