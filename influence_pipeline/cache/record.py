"""Records: what makes a block exist.

A block's arrays are written first, its record last. The record says what the block read, and the length and checksum
of each of its files, so that a lost, emptied or cut file, or an input that changed, is seen before anything is read,
and any other damage when it is looked for.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import google_crc32c
import numpy as np

from stages.stage import Array

MAGIC = b"ipr2"
DIGEST_BYTES = 16
NOTHING = bytes(DIGEST_BYTES)
_HEAD = struct.Struct(f"<4sQ{DIGEST_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s")
_FILE = struct.Struct("<QI")


def digest(parts: Iterable[bytes | Array]) -> bytes:
    """Return 16 bytes that depend on all parts, in order."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return state.digest()


@dataclass(frozen=True)
class FileSum:
    """What a file was when it was written.

    Its checksum is zlib's CRC-32, not the CRC-32C that each part of these files ends with: over a file of such parts
    another CRC-32C would be the same whatever they hold, as long as each is whole and as long as it was.

    Attributes:
        length: in bytes.
        checksum: its CRC-32.
    """

    length: int = 0
    checksum: int = 0

    def then(self, data: bytes) -> FileSum:
        """Return what the file is with some bytes more."""
        return FileSum(self.length + len(data), zlib.crc32(data, self.checksum))


@dataclass(frozen=True)
class Record:
    """The record of one block.

    Attributes:
        rows: entries that the block covers.
        samples: digest of the samples that it read, as they are today.
        inputs: digest of whatever else it read.
        content: what later stages depend on. It is of the samples as they were when the block was computed, so that
            samples that were accepted as the same change nothing after it.
        files: of the block, in the order of the layout.
    """

    rows: int
    samples: bytes
    inputs: bytes
    content: bytes
    files: tuple[FileSum, ...]

    @staticmethod
    def size(files: int) -> int:
        """Return the bytes of a record with this many files."""
        return _HEAD.size + _FILE.size * files

    @classmethod
    def new(cls, rows: int, samples: bytes, inputs: bytes, files: Iterable[FileSum]) -> Record:
        """Return the record of a block that was computed now."""
        return cls(rows, samples, inputs, digest([struct.pack("<Q", rows), samples, inputs]), tuple(files))

    def to_bytes(self) -> Array:
        """Return the record as (byte,) uint8."""
        head = _HEAD.pack(MAGIC, self.rows, self.samples, self.inputs, self.content)
        return np.frombuffer(head + b"".join(_FILE.pack(f.length, f.checksum) for f in self.files), np.uint8)

    @classmethod
    def from_chunk(cls, chunk: bytes) -> Record | None:
        """Read a record as Zarr keeps it: its bytes, and their CRC-32C; None where it is damaged."""
        raw, checksum = chunk[:-4], chunk[-4:]
        whole = len(raw) >= _HEAD.size and (len(raw) - _HEAD.size) % _FILE.size == 0
        if not whole or google_crc32c.value(raw) != int.from_bytes(checksum, "little"):
            return None
        magic, rows, samples, inputs, content = _HEAD.unpack_from(raw)
        if magic != MAGIC:
            return None
        files = tuple(FileSum(*found) for found in _FILE.iter_unpack(raw[_HEAD.size :]))
        return cls(rows, samples, inputs, content, files)
