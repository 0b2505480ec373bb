"""Room on the disk: is there enough for what is to be computed, and if not, what would fit?"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from influence_pipeline.cache import DESCRIPTION, Group, Layout, array_bytes
from influence_pipeline.context import Context
from influence_pipeline.errors import RequestError
from influence_pipeline.location import Location, ObjectPath
from influence_pipeline.place import Place
from influence_pipeline.plan import ENDLESS, Suggestion, block_rows, show_bytes, suggestions
from influence_pipeline.work import Work
from stages.stage import Blocks, Grid

SPARE = 16 * 2**20
"""Bytes that are left free."""


def free_bytes(path: Location) -> int:
    """Return the free bytes of the disk that a folder is on, or will be; an object store has no end."""
    if isinstance(path, ObjectPath):
        return ENDLESS
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def expected_bytes(
    work: Work, group: Group | None, shares: Mapping[str, float] = MappingProxyType({})
) -> tuple[int, bool]:
    """Return what all of a stage will take on disk, and whether that was measured.

    Blocks are extrapolated by their entries; what describes the arrays is there, and what is merged is bounded.

    Args:
        work: the stage.
        group: whose blocks that are there are measured.
        shares: measured elsewhere, for where there are none; see :func:`shares`.
    """
    bound = work.layout.bytes_bound(shares)
    if group is None:
        return bound, bool(shares)
    records = group.records()
    rows = int(group.layout.grid.rows[records.there].sum())
    if not rows:
        return bound, bool(shares)
    beside = group.bytes_on_disk() - records.file_bytes + (0 if group.finished else work.layout.merged_bytes)
    return min(bound, beside + records.file_bytes * work.stage.grid.entries // rows), True


def shares(group: Group) -> dict[str, float]:
    """Return what each array takes on disk of what it has in memory, as far as its blocks are there.

    Beside arrays, by their files' name, what descriptions take of their bound.
    """
    layout = group.layout
    done = int(layout.grid.rows[group.records().there].sum()) / layout.grid.entries
    taken: Counter[str] = Counter()
    for file in group.files():
        taken[DESCRIPTION if file.name.endswith(DESCRIPTION) else file.name.partition("/")[0]] += file.length
    found = {DESCRIPTION: taken[DESCRIPTION] / layout.described_bytes}
    for spec in layout.all:
        there = array_bytes(spec) * (float(group.finished) if spec in layout.merged else done)
        if there and taken[spec.name]:
            found[spec.name] = taken[spec.name] / there
    return found


def gradients_bytes(work: Work, dim: int, encoding: str) -> int:
    """Return what training gradients of so many coordinates take at most: less than ``work``'s, or another encoding."""
    grid = Grid((replace(work.stage.grid.axes[0], band=block_rows(dim)),))
    count = grid.axes[0].length
    arrays = [
        replace(spec, shape=(count, dim), encoding=encoding) if spec.encoding else spec for spec in work.layout.arrays
    ]
    return Layout(grid, arrays).bytes_bound()


def advice(context: Context, work: Work, available: Callable[[int], int]) -> list[Suggestion]:
    """Return settings of gradients under which these would fit.

    Args:
        context: of them.
        work: of them.
        available: gives the bytes that gradients of so many coordinates may take.
    """
    sizes = {name: parameter.numel() for name, parameter in context.function.params.items()}
    needed = functools.partial(gradients_bytes, work)
    return suggestions(sizes, context.dim, context.settings.grad_z.encoding, needed, available)


def refuse(place: Place, work: Work, group: Group, context: Context, missing: Blocks) -> Blocks:
    """Refuse missing blocks that do not fit the disk; return those to compute before this is asked again.

    How far arrays can be compressed is not known before: where their bound does not fit, one block is computed and
    measured.

    Raises:
        RequestError: with the bytes, and what would fit.
    """
    free = free_bytes(group.path) - SPARE
    expected, measured = expected_bytes(work, group)
    needed = expected - group.bytes_on_disk()
    if needed <= free:
        return missing
    one = needed // len(missing)
    if not measured and one <= free:
        return missing[:1]
    how = "measured on the blocks that are there" if measured else "before compression"
    raise RequestError(
        f"{work.label} needs {show_bytes(needed)} more ({how}), and the disk of {group.path} has "
        f"{show_bytes(max(0, free))} free, beside {show_bytes(SPARE)} that are left alone. "
        f"{_what_fits(place, work, context, max(0, free))}"
    )


def _what_fits(place: Place, work: Work, context: Context, free: int) -> str:
    """Say what would fit in the free bytes."""
    if place.stage != "grad_z":
        return "Free some (`gc` removes what nothing refers to), or name a cache on another disk"
    fits = "; ".join(map(str, advice(context, work, lambda dim: free)))
    return f"Would fit: {fits}; or a cache on another disk"
