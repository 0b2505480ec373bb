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
from stages.ranks import ranks
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

    def __init__(self, function: ModelFunction, probes: int, samples: int) -> None:
        """Compare nothing yet.

        Args:
            function: projects.
            probes: unprojected gradients that are held.
            samples: training samples in all.
        """
        super().__init__()
        self._function, self._left = function, max(FEW, min(ROWS, samples // SHARE))
        dtype, device = function.dtype, function.device
        sizes = {name: parameter.numel() for name, parameter in function.params.items()}
        self._exact_Pn = {name: torch.empty(probes, size, dtype=dtype, device=device) for name, size in sizes.items()}
        self._projected_PD = torch.empty(probes, function.size, dtype=dtype, device=device)
        self._known = 0

    def take(self, batch: Batch, projected_BD: Tensor) -> None:
        """Take the next samples with their projected gradients."""
        for index in range(min(self._left, len(projected_BD))):
            self._left -= 1
            found, _ = loop.gradient(self._function, self._function.losses, take(batch, index))
            flat = {name: part.reshape(-1).to(self._function.dtype) for name, part in found.items()}
            if self._known < len(self._projected_PD):
                for name, part in flat.items():
                    self._exact_Pn[name][self._known] = part
                self._projected_PD[self._known] = projected_BD[index]
                self._known += 1
                if self._known == len(self._projected_PD):
                    self._of_probes()
            else:
                exact_nP = torch.stack([self._exact_Pn[name] @ part for name, part in flat.items()]).sum(
                    0, keepdim=True
                )
                self._add(exact_nP, projected_BD[index : index + 1])
            del found, flat

    def figures(self) -> Array:
        """Return Spearman's correlation and the share of the top that is the same, as all comparisons do."""
        if self._known < len(self._projected_PD):
            self._of_probes()
        return super().figures()

    def _of_probes(self) -> None:
        """Compare the rows that are the probes."""
        known = slice(0, self._known)
        exact_PP = torch.stack([part[known] @ part[known].T for part in self._exact_Pn.values()]).sum(0)
        self._add(exact_PP, self._projected_PD[known])

    def _add(self, exact_nP: Tensor, projected_nD: Tensor) -> None:
        projected_nP = projected_nD @ self._projected_PD[: exact_nP.shape[1]].T
        self.add(*(products.float().cpu().numpy() for products in (exact_nP, projected_nP)))


def probes_within(entries: int, itemsize: int, memory_bytes: int) -> int:
    """Return how many gradients of so many entries stand for solutions where there is so much memory; perhaps none."""
    fits = memory_bytes // (entries * itemsize) - 1
    return max(0, min(_probes(entries), fits))


def probe_bytes(probes: int, entries: int, itemsize: int) -> int:
    """Return what comparing projected gradients with exact ones of so many entries holds at once."""
    return (probes + 1) * entries * itemsize if probes else 0


def _probes(entries: int) -> int:
    return max(1, min(PROBES, PROBE_ENTRIES // entries))


def spearman(first: Array, second: Array) -> float:
    """Return Spearman's rank correlation; equal numbers share the mean of their ranks. 1 where either is constant."""
    a, b = (ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 1.0
