"""Ranks of numbers."""

from __future__ import annotations

import numpy as np

from stages.stage import Array


def ranks(values: Array) -> Array:
    """Return the rank of each number, 1 for the least, (n,) float64; equal numbers share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return found
