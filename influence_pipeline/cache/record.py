"""Records: what makes a block exist.

A block's arrays are written first, its record last. The record says what the block read and how long its files
are, so that a lost, emptied or cut file, or an input that changed, is seen before anything is read.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stages.stage import Array

MAGIC = b"ipr1"
DIGEST_BYTES = 16
NOTHING = bytes(DIGEST_BYTES)
_HEAD = struct.Struct(f"<4sQ{DIGEST_BYTES}s{DIGEST_BYTES}s")


def digest(parts: Iterable[bytes | Array]) -> bytes:
    """Return 16 bytes that depend on all parts, in order."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return state.digest()


@dataclass(frozen=True)
class Record:
    """The record of one block.

    Attributes:
        rows: entries that the block covers.
        samples: digest of the samples that it is of.
        inputs: digest of whatever else it read.
        lengths: of each of its files, in bytes.
    """

    rows: int
    samples: bytes
    inputs: bytes
    lengths: tuple[int, ...]

    @staticmethod
    def size(files: int) -> int:
        """Return the bytes of a record with this many files."""
        return _HEAD.size + 8 * files

    @property
    def content(self) -> bytes:
        """What later stages depend on: equal for a block that was recomputed from the same inputs."""
        return struct.pack("<Q", self.rows) + self.samples + self.inputs

    def to_bytes(self) -> Array:
        """Return the record as (byte,) uint8."""
        head = _HEAD.pack(MAGIC, self.rows, self.samples, self.inputs)
        return np.frombuffer(head + struct.pack(f"<{len(self.lengths)}Q", *self.lengths), np.uint8)

    @classmethod
    def from_bytes(cls, data: Array) -> Record | None:
        """Read a record; None where there is none."""
        raw = data.tobytes()
        magic, rows, samples, inputs = _HEAD.unpack_from(raw)
        if magic != MAGIC:
            return None
        files = (len(raw) - _HEAD.size) // 8
        return cls(rows, samples, inputs, struct.unpack_from(f"<{files}Q", raw, _HEAD.size))
