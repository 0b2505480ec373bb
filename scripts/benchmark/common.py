"""What the rows of the benchmark share: how they are timed, evicted from the page cache, and printed."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Size = TypeVar("Size")
MOST_RESIDENT = 0.02
"""Share of a file's pages that may stay in memory where it counts as evicted."""


@dataclass(frozen=True)
class Row:
    """One target: what it takes here, what it takes otherwise, and how they should compare.

    Attributes:
        name: for ``--only``.
        work: what was measured.
        against: what it is compared with.
        ours: the figure of ``work``.
        theirs: the figure of ``against``.
        unit: of both figures.
        bar: what the ratio must reach; None where the target does not apply.
        at_most: the ratio is ours / theirs and must not exceed the bar; else it is theirs / ours, at least the bar.
        note: whatever else is to be known.
    """

    name: str
    work: str
    against: str
    ours: float
    theirs: float
    unit: str
    bar: float | None
    at_most: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        """How the figures compare."""
        return self.ours / self.theirs if self.at_most else self.theirs / self.ours

    @property
    def verdict(self) -> str:
        """Whether the bar was met."""
        if self.bar is None:
            return "n/a"
        return "met" if (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar) else "missed"

    def cells(self) -> tuple[str, ...]:
        """Return its cells in the printed table."""
        bar = "n/a" if self.bar is None else f"{'≤' if self.at_most else '≥'} {self.bar:g}x"
        figures = (f"{figure:.4g} {self.unit}" for figure in (self.ours, self.theirs))
        return (self.name, self.work, self.against, *figures, f"{self.ratio:.3g}x", bar, self.verdict, self.note)


HEADING = ("row", "work", "against", "work takes", "against takes", "ratio", "bar", "verdict", "note")


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Return cells as a table in Markdown, its columns aligned."""
    lines = [HEADING, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADING))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


@dataclass(frozen=True)
class Bench:
    """How large the measurements are, and where they may write.

    Attributes:
        folder: an empty one.
        quick: tiny sizes, for a look whether everything runs.
        repeats: measurements of which the median is taken.
    """

    folder: Path
    quick: bool
    repeats: int

    def size(self, full: Size, quick: Size) -> Size:
        """Choose a size."""
        return quick if self.quick else full

    def fresh(self, name: str) -> Path:
        """Return a path in the folder at which there is nothing."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        run: what is timed.
        prepare: what comes before it every time, untimed.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


def alternate(bench: Bench, *sides: Side) -> list[float]:
    """Return the median seconds of each side, in turn; but for a look, after a round that is not counted."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(bench.quick, bench.repeats + 1):
        for side, found in zip(sides, seconds, strict=True):
            side.prepare()
            gc.collect()
            began = time.perf_counter()
            side.run()
            if number:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def evict(path: Path) -> float:
    """Have the page cache let go of all files at or below a path; return the share of pages that stayed."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file() and file.stat().st_size]
    if not hasattr(os, "posix_fadvise"):
        return 1.0
    os.sync()  # pages that are not written yet stay
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    pages = [resident_pages(file) for file in files]
    return sum(there for there, _ in pages) / max(1, sum(count for _, count in pages))


def resident_pages(file: Path) -> tuple[int, int]:
    """Return how many pages of a file are in memory, and how many it has."""
    count = -(-file.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, size, found)
        del view
    return (count if failed else sum(byte & 1 for byte in bytes(found))), count
