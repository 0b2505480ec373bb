"""How float32 rows are kept: as they are, or in half precision with a power of two for each row.

Shapes: ``n`` rows of ``D`` entries.
"""

from __future__ import annotations

import numpy as np

from stages.stage import Array

TOP = 15
"""Rows are scaled so that their largest magnitude is in [2¹⁴, 2¹⁵): within half precision, far from its underflow."""
BELOW_TOP = np.nextafter(np.float16(2**TOP), np.float16(0))
LIMIT = 126
"""Scales are powers of two within ±126, so that they and their inverses are normal float32 numbers."""


def encode(rows_nD: Array, encoding: str) -> tuple[Array, Array | None]:
    """Return rows as they are kept, and the factor that each row was multiplied by, (n, 1) float32.

    Args:
        rows_nD: float32, finite.
        encoding: "float32" or "float16"; the factor is None for "float32".

    Returns:
        The encoded rows and the factors; a row of zeros has factor 1.
    """
    if encoding == "float32":
        return np.ascontiguousarray(rows_nD, np.float32), None
    largest = np.abs(rows_nD).max(axis=1, keepdims=True)
    _, exponent = np.frexp(largest)
    scale = np.ldexp(np.float32(1), np.clip(TOP - exponent, -LIMIT, LIMIT)).astype(np.float32)
    scale[largest == 0] = 1
    kept = (rows_nD * scale).astype(np.float16)
    if exponent.max(initial=0) == np.finfo(np.float32).maxexp:
        # Rounded up, the largest float32 numbers would come back as infinity.
        np.clip(kept, -BELOW_TOP, BELOW_TOP, out=kept)
    return kept, scale


def decode(kept_nD: Array, scale_n1: Array | None) -> Array:
    """Return the float32 rows that were kept."""
    if scale_n1 is None:
        return kept_nD
    rows: Array = kept_nD.astype(np.float32)
    rows *= 1 / scale_n1
    return rows


def round_trip(rows_nD: Array, encoding: str) -> Array:
    """Return rows as they would be read back from the cache."""
    return decode(*encode(rows_nD, encoding))
