"""How float32 rows are kept: as they are; in half precision, scaled by row; or in 8 bits, scaled by row and group.

Half precision takes a power of two for each row, so that rounding is all that is lost. 8 bits take a factor for each
row and each ``GROUP`` columns, whose largest magnitude becomes 127. PyTorch converts many times faster than NumPy does.

Shapes: ``n`` rows of ``D`` entries, ``g`` factors for each row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from stages.stage import Array
from stages.threads import own_memory

if TYPE_CHECKING:
    import torch

TOP = 15
"""Rows are scaled so that their largest magnitude is in [2¹⁴, 2¹⁵): within half precision, far from its underflow."""
BELOW_TOP = float(np.nextafter(np.float16(2**TOP), np.float16(0)))
LIMIT = 126
"""Scales are within 2^±126, so that they and their inverses are normal float32 numbers."""
GROUP = 128
"""Columns that share a factor in 8 bits."""
MOST = 127


SCALED = ("float16", "int8")
"""Encodings whose rows have factors."""


def factors(dim: int, encoding: str) -> int:
    """Return g, the factors that a row of ``dim`` entries has."""
    return 1 if encoding == "float16" else math.ceil(dim / GROUP)


def scales(rows_nD: Array, encoding: str) -> Array:
    """Return the factors that rows are multiplied by to be kept, (n, g) float32; 1 for zeros."""
    if encoding == "float16":
        largest = np.maximum(rows_nD.max(axis=1), -rows_nD.min(axis=1))[:, None]
        _, exponent = np.frexp(largest)
        scale = np.ldexp(np.float32(1), np.clip(TOP - exponent, -LIMIT, LIMIT)).astype(np.float32)
    else:
        edges = np.arange(0, rows_nD.shape[1], GROUP)
        largest = np.maximum(np.maximum.reduceat(rows_nD, edges, axis=1), -np.minimum.reduceat(rows_nD, edges, axis=1))
        with np.errstate(divide="ignore", over="ignore"):
            scale = np.clip(np.float32(MOST) / largest, np.float32(2.0**-LIMIT), np.float32(2.0**LIMIT))
    return np.where(largest == 0, np.float32(1), scale)


def scaled(rows_nD: Array, scale_ng: Array, encoding: str, start: int = 0) -> Array:
    """Return some columns of rows times their factors, float32, in this thread's own memory; converted, it is kept.

    Args:
        rows_nD: float32, finite.
        scale_ng: the factors of whole rows.
        encoding: "float16" or "int8".
        start: the position of the first column.
    """
    import torch

    found_nD = own_memory("scaled", rows_nD.shape, np.dtype(np.float32))
    out = torch.from_numpy(found_nD)
    _multiply(torch.from_numpy(rows_nD), torch.from_numpy(scale_ng), start, out)
    if encoding == "int8":
        out.round_()
    elif scale_ng.min(initial=1) <= 2.0 ** (TOP - 128):
        # Rounded up, the largest float32 numbers would come back as infinity.
        out.clamp_(-BELOW_TOP, BELOW_TOP)
    return found_nD


def convert(values: Array, out: Array) -> None:
    """Copy values to an array of another type, perhaps."""
    if values.dtype == out.dtype:
        np.copyto(out, values)
        return
    import torch

    torch.from_numpy(out).copy_(torch.from_numpy(values))


def decode_into(kept_nD: Array, scale_ng: Array | None, start: int, out_nD: Array) -> None:
    """Put some columns of rows that were kept into their place as float32.

    Args:
        kept_nD: as it is kept, or float32.
        scale_ng: the factors of whole rows; None for float32.
        start: the position of the first column.
        out_nD: float32.
    """
    import torch

    out = torch.from_numpy(out_nD)
    out.copy_(torch.from_numpy(kept_nD))
    if scale_ng is not None:
        _multiply(out, torch.from_numpy(1 / scale_ng), start, out)


def _multiply(rows: torch.Tensor, factors: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Multiply some columns of rows by the factors of whole rows, (n, g).

    Args:
        rows: (n, columns), each row in one piece.
        factors: one for each row, or one for each group of its columns.
        start: the position of the first column.
        out: likewise; it may be ``rows``.
    """
    import torch

    if factors.shape[1] == 1:
        torch.mul(rows, factors, out=out)
        return
    # What is left of the first group, whole groups, and what is there of the last.
    count = rows.shape[1]
    first = min(count, -start % GROUP)
    whole = first + (count - first) // GROUP * GROUP
    for part, width in ((slice(0, first), first), (slice(first, whole), GROUP), (slice(whole, count), count - whole)):
        if part.start < part.stop:
            group, groups = (start + part.start) // GROUP, (part.stop - part.start) // width
            shape = (len(rows), groups, width)
            of_groups, into = (each[:, part].as_strided(shape, (each.stride(0), width, 1)) for each in (rows, out))
            torch.mul(of_groups, factors[:, group : group + groups, None], out=into)


def round_trip(rows_nD: Array, encoding: str) -> Array:
    """Return rows as they would be read back from the cache."""
    rows_nD = np.ascontiguousarray(rows_nD, np.float32)
    if encoding not in SCALED:
        return rows_nD
    scale_ng, found = scales(rows_nD, encoding), np.empty_like(rows_nD)
    kept_nD = np.empty(rows_nD.shape, encoding)
    convert(scaled(rows_nD, scale_ng, encoding), kept_nD)
    decode_into(kept_nD, scale_ng, 0, found)
    return found
