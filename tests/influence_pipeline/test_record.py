"""Records say what a block read and how long its files are."""

from __future__ import annotations

import google_crc32c
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from influence_pipeline.cache.record import NOTHING, FileSum, Record, digest

digests = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, 2**64 - 1)
files = st.lists(st.builds(FileSum, numbers, st.integers(0, 2**32 - 1)), max_size=30).map(tuple)
records = st.builds(Record, numbers, digests, digests, digests, files)
new = st.builds(Record.new, numbers, digests, digests, files)


def chunk(data: NDArray[np.uint8]) -> bytes:
    """Return bytes as Zarr's crc32c codec keeps them."""
    return data.tobytes() + google_crc32c.value(data.tobytes()).to_bytes(4, "little")


@given(records)
def test_a_record_reads_back_as_it_was(record: Record) -> None:
    data = record.to_bytes()
    assert data.dtype == np.uint8
    assert len(data) == Record.size(len(record.files))
    assert Record.from_chunk(chunk(data)) == record


@given(records, st.data())
def test_a_changed_byte_changes_the_record(record: Record, data: st.DataObject) -> None:
    raw = bytearray(chunk(record.to_bytes()))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1
    assert Record.from_chunk(bytes(raw)) is None


@given(records, st.data())
def test_a_cut_record_is_none(record: Record, data: st.DataObject) -> None:
    raw = chunk(record.to_bytes())
    assert Record.from_chunk(raw[: data.draw(st.integers(0, len(raw) - 1))]) is None


def test_zeros_are_no_record() -> None:
    assert Record.from_chunk(chunk(np.zeros(Record.size(3), np.uint8))) is None


@given(new, new)
def test_content_is_what_was_read_not_how_the_files_are(one: Record, other: Record) -> None:
    longer = Record.new(one.rows, one.samples, one.inputs, (*one.files, FileSum(7, 7)))
    assert longer.content == one.content
    same = (one.rows, one.samples, one.inputs) == (other.rows, other.samples, other.inputs)
    assert (one.content == other.content) == same


def test_a_digest_depends_on_every_part_and_on_their_order() -> None:
    parts = [b"a", np.arange(3), b"c"]
    assert digest(parts) == digest([b"a", np.arange(3), b"c"])
    assert digest(parts) != digest(parts[::-1])
    assert digest(parts) != digest([b"a", np.arange(4), b"c"])
    assert len({digest([np.arange(n)]) for n in range(5)}) == 5
    assert len(digest([])) == len(NOTHING)


def test_a_digest_reads_strided_arrays_by_their_entries() -> None:
    table = np.arange(12).reshape(3, 4)
    assert digest([table[:, 1]]) == digest([np.array([1, 5, 9])])
