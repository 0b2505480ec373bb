"""What scores lose by the encoding of gradients, and by their projection, measured on the first of them.

Shapes: ``n`` rows, ``D`` coordinates, ``P`` probes, ``B`` samples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stages.batch import take
from stages.grad_z import loop
from stages.parameters import ModelFunction
from stages.stage import Array, Batch

PROBES = 16
"""Gradients that stand for solutions: at most, and fewer where they have more than ``PROBE_ENTRIES``."""
PROBE_ENTRIES = 2**24
ROWS = 128
"""Samples whose gradients are compared with projected ones, at most: one in ``SHARE`` of all, but at least ``FEW``."""
SHARE = 32
FEW = 16
TOP = 100
AT_ONCE = 2**19
"""Entries that go there and back at once."""

RoundTrip = Callable[[Array], Array]
"""Rows (n, D) as they come back from where they are kept."""


class Comparison:
    """Products of rows with a few others, of rows as they are and as they have become."""

    def __init__(self) -> None:
        """Compare nothing yet."""
        self._products: tuple[list[Array], list[Array]] = [], []

    def add(self, exact_nP: Array, become_nP: Array) -> None:
        """Take the products of the next rows with ``P`` probes."""
        for known, found in zip(self._products, (exact_nP, become_nP), strict=True):
            known.append(found)

    def figures(self) -> Array:
        """Return, as means over all probes, Spearman's correlation and the share of the top 100 that is the same, (2,).

        The top is a tenth of the rows where these are fewer than a thousand. NaN where there are fewer than ten.
        """
        exact_Pn, become_Pn = (np.concatenate(products).T for products in self._products)
        count = exact_Pn.shape[1]
        if count < 10:
            return np.full(2, np.nan, np.float32)
        k = min(TOP, count // 10)
        pairs = list(zip(exact_Pn, become_Pn, strict=True))
        same = [len(np.intersect1d(np.argsort(-a)[:k], np.argsort(-b)[:k])) / k for a, b in pairs]
        return np.array([np.mean([spearman(a, b) for a, b in pairs]), np.mean(same)], np.float32)


class OfEncoding(Comparison):
    """Compares plain products of gradients with the first of them, exact and as they are kept."""

    def __init__(self, round_trip: RoundTrip) -> None:
        """Compare nothing yet."""
        super().__init__()
        self._round_trip = round_trip
        self._probes_PD: Array | None = None

    def take(self, rows_nD: Array) -> None:
        """Take the next exact gradients, float32."""
        if self._probes_PD is None:
            self._probes_PD = rows_nD[: _probes(rows_nD.shape[1])].copy()
        step = max(1, AT_ONCE // rows_nD.shape[1])
        for start in range(0, len(rows_nD), step):
            part_nD = rows_nD[start : start + step]
            self.add(part_nD @ self._probes_PD.T, self._round_trip(part_nD) @ self._probes_PD.T)


class OfProjection(Comparison):
    """Compares plain products of gradients with the first of them, as they are and projected.

    Unprojected gradients are computed for this alone, one sample at a time.
    """

    def __init__(self, function: ModelFunction, samples: int) -> None:
        """Compare nothing yet; ``function`` projects, and there are so many training samples."""
        super().__init__()
        self._function = function.unprojected()
        self._left = max(FEW, min(ROWS, samples // SHARE))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._probes: tuple[Tensor, Tensor] | None = None

    def take(self, batch: Batch, projected_BD: Tensor) -> None:
        """Take the next samples with their projected gradients."""
        for index in range(min(self._left, len(projected_BD))):
            exact_1P, _ = loop.gradients(self._function, self._function.losses, take(batch, index))
            self._waiting.append((exact_1P, projected_BD[index : index + 1]))
            self._left -= 1
            if self._probes is not None or len(self._waiting) == _probes(self._function.size):
                self._multiply()

    def figures(self) -> Array:
        """Return Spearman's correlation and the share of the top that is the same, as all comparisons do."""
        if self._waiting:
            self._multiply()
        return super().figures()

    def _multiply(self) -> None:
        """Compare the rows that wait; the first to do so are the probes."""
        exact, become = (torch.cat(rows) for rows in zip(*self._waiting, strict=True))
        self._waiting.clear()
        if self._probes is None:
            self._probes = exact, become
        pairs = zip((exact, become), self._probes, strict=True)
        self.add(*((rows @ probes.T).float().cpu().numpy() for rows, probes in pairs))


def probe_bytes(entries: int, itemsize: int) -> int:
    """Return what comparing projected gradients with exact ones of so many entries holds at once."""
    return (2 * _probes(entries) + 3) * entries * itemsize


def _probes(entries: int) -> int:
    return max(1, min(PROBES, PROBE_ENTRIES // entries))


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
