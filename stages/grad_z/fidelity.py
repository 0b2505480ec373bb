"""What scores lose by the encoding of gradients, measured on the first of them.

Shapes: ``n`` rows, ``D`` coordinates, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stages.stage import Array

PROBES = 16
"""Gradients that stand for solutions: at most, and fewer where they have more than ``PROBE_ENTRIES``."""
PROBE_ENTRIES = 2**22
TOP = 100
AT_ONCE = 2**19
"""Entries that go there and back at once."""

RoundTrip = Callable[[Array], Array]
"""Rows (n, D) as they come back from where they are kept."""


class Fidelity:
    """Compares plain products of gradients with the first of them, exact and as they are kept."""

    def __init__(self, round_trip: RoundTrip) -> None:
        """Compare nothing yet."""
        self._round_trip = round_trip
        self._probes_PD: Array | None = None
        self._exact: list[Array] = []
        self._kept: list[Array] = []

    def add(self, rows_nD: Array) -> None:
        """Take the next exact gradients, float32."""
        if self._probes_PD is None:
            self._probes_PD = rows_nD[: max(1, min(PROBES, PROBE_ENTRIES // rows_nD.shape[1]))].copy()
        step = max(1, AT_ONCE // rows_nD.shape[1])
        for start in range(0, len(rows_nD), step):
            part_nD = rows_nD[start : start + step]
            self._exact.append(part_nD @ self._probes_PD.T)
            self._kept.append(self._round_trip(part_nD) @ self._probes_PD.T)

    def figures(self) -> Array:
        """Return, as means over all probes, Spearman's correlation and the share of the top 100 that is the same, (2,).

        The top is a tenth of the gradients where these are fewer than a thousand. NaN where there are fewer than ten.
        """
        exact_Pn, kept_Pn = np.concatenate(self._exact).T, np.concatenate(self._kept).T
        count = exact_Pn.shape[1]
        if count < 10:
            return np.full(2, np.nan, np.float32)
        k = min(TOP, count // 10)
        pairs = list(zip(exact_Pn, kept_Pn, strict=True))
        same = [len(np.intersect1d(np.argsort(-a)[:k], np.argsort(-b)[:k])) / k for a, b in pairs]
        return np.array([np.mean([spearman(a, b) for a, b in pairs]), np.mean(same)], np.float32)


def spearman(first: Array, second: Array) -> float:
    """Return Spearman's rank correlation; equal numbers share the mean of their ranks. 1 where either is constant."""
    a, b = (_ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 1.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
